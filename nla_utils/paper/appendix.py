"""``paper/appendix.md``: what stands behind the section, run by run, and where each number comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Optional, Sequence

import pandas as pd

from nla_utils.config import ROOT
from nla_utils.paper import claims, figures, tables
from nla_utils.paper.audit import audit_table
from nla_utils.paper.findings import ITERATION, STUDY, iteration_table, study_table
from nla_utils.paper.pages import FigureSpec, Page, Table, provenance
from nla_utils.paper.results import COMMITTED, NAMES, RunResults, find_results, weights_note, without_variants
from nla_utils.scores import rows

APPENDIX = ROOT / "paper" / "appendix.md"
FIGURE_SPECS = (
    FigureSpec("figA_k_curves_by_run", figures.figure_by_run, "K-curves of every run under both protocols, with floor, "
               "ceiling and controls, all on one scale. The two controls often coincide: dots on the wide pale line. Bands "
               "are 95 % intervals over targets."),
    FigureSpec("fig2_mu_and_floor", figures.figure_2, "The score of unrelated pairs, raw (filled) and centred (open), "
               "paper protocol. Left, ours: the raw one is ½ (1 + the share of the mean square that lies along μ). Right: by "
               "‖μ‖, which grows with the scale of the activations, backbones come in another order; the paper prints ‖μ‖ "
               "but not the share, and no intervals. Ours have 95 % intervals over targets."),
    FigureSpec("fig3_replay_ladder", figures.figure_3, "Replay of the same targets: as published, with the last "
               "token found from the mask, and from there with the sampled ids, with BOS, or with both. The rows are no path "
               "along which one slip after another is corrected, so no line joins them. Bars are 95 % intervals over targets."),
    FigureSpec("fig4_slip_by_slip", figures.figure_4, "The paper's procedure on the left, each step to the right corrects "
               "one more of its slips; the last is the corrected protocol. In the last step of ρ the numerator becomes the best "
               "of as many rollouts as there are paraphrases below it, so no line joins it to the others. Bars are 95 % "
               "intervals over targets."),
)  # fmt: skip


def runs_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """What each run is."""
    table = []
    for r in everything:
        facts, training, s = r.data["targets"], r.data["training"], r.data["targets"]["sizes"]
        table.append({
            "run": r.title, "layer": f"{r.layer} of {facts['num_layers']}", "d": facts["hidden_size"], "N": s["N"],
            "training pairs": training["train_pairs"], "steps": training["steps"], "M": s["M"], "K": s["K"],
            "pool": s["pool"],
        })  # fmt: skip
    columns = ["run", "layer", "d", "N", "training pairs", "steps", "M", "K", "pool"]
    return pd.DataFrame(table, columns=columns).set_index("run").map(lambda x: "–" if x is None else str(x))


def keys_table() -> pd.DataFrame:
    """Each row of the tables, its key in the results file, and its key in the published one."""
    parts = (("ceilings", rows.CEILINGS), ("evaluation", rows.EVALUATION), ("ρ", rows.RHO), ("reranks", rows.RERANKS))
    table = [
        {"table": name, "row": row.title, "JSON key": f"`{row.key}`", "results file": f"{row.file}.json",
         "published key": f"`{row.published_path}`" if row.published_path else "–"}
        for name, registered in parts for row in registered
    ]  # fmt: skip
    return pd.DataFrame(table).set_index("table")


def tables_of_run(results: RunResults) -> list[Table]:
    """All tables of §11 for one run, beside the published numbers of §11's backbone."""
    made = [("scorecard", "Scorecard", claims.scorecard(results))]
    made.append(("headline", "Headline of §11", tables.headline_table(results)))
    for kind, word in (("cen", "centred"), ("raw", "raw")):
        made.append((f"ceilings-{kind}", f"Ceilings, {word} fve_nrm", tables.ceilings_table(results, kind)))
        made.append((f"evaluation-{kind}", f"Evaluation, {word} fve_nrm", tables.evaluation_table(results, kind)))
    made += [
        ("rho", "ρ_cen", tables.rho_table(results)),
        ("k-curve-all", "K-curve, centred fve_nrm", tables.k_curve_table(results)),
        ("reranks-cen", "Cheap reranks, centred fve_nrm", tables.rerank_table(results)),
    ]
    made.append(("slips", "Audit: what each slip moves", audit_table(results)))
    if results.optional(STUDY):
        kept = results.data["training"]["best_step"]
        caption = f"Training in other ways, measured at the last step; the run's own AV at the step that was kept, {kept}"
        made.append(("study", caption, study_table(results)))
    if results.optional(ITERATION):
        made.append(("iteration", "Search made into a policy", iteration_table(results)))
    return [Table(f"{results.stem}-{end}", caption, frame, of=results.label) for end, caption, frame in made]


def shared_tables(shown: Sequence[RunResults]) -> dict[str, Table]:
    """Tables over all backbones and runs, by stem."""
    made = (
        Table("runs", "The runs", runs_table(shown)),
        Table("backbones", "The backbones side by side", tables.backbones_table(shown)),
        Table("claims", "The claims and what a verdict on them means", claims.claims_table()),
        Table("gap", "Centred gap, paraphrase best-of-8 minus floor", claims.gap_table(shown)),
    )  # fmt: skip
    return {t.stem: t for t in made}


def seeds_tables(everything: Sequence[RunResults]) -> list[Table]:
    """Tables over runs that differ in their seed alone."""
    return [
        Table(f"{next(iter(g.values())).stem}-seeds", "Repeated with other seeds", tables.seeds_table(g))
        for g in tables.seed_groups(everything)
    ]


def appendix_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The appendix of the results below ``roots``; ``own`` (backbone, profile) is a run to show in any case."""
    everything = find_results(roots)
    shown = without_variants(everything, own)
    shared, seeds = shared_tables(shown), seeds_tables(everything)
    of_runs = {f"{r.label}: {r.title}": tables_of_run(r) for r in shown}
    # The floors of a sweep's layers are points of figure 2.
    drawn = {spec: everything if spec.draw is figures.figure_2 else shown for spec in FIGURE_SPECS if shown}
    values = {
        "shared": shared, "seeds": seeds, "of_runs": of_runs, "keys": tables.markdown(keys_table()),
        "weights": weights_note(everything),
        "provenance": provenance(everything, (*NAMES, STUDY, ITERATION)),
    }  # fmt: skip
    made = [*shared.values(), *seeds, *(t for part in of_runs.values() for t in part)]
    return Page(APPENDIX, "appendix.md.j2", made, drawn, values)
