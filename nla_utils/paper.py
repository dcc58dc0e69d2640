"""``paper/section11.md``, its tables and figures, made from the JSON on disk and nothing else.

No model and no torch is loaded, so this takes seconds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import pandas as pd

from nla_utils import beyond, claims, figures, paper_text, tables
from nla_utils.audit import audit_table
from nla_utils.config import ROOT
from nla_utils.published import SECTION_11
from nla_utils.results import NAMES, RunResults, committed_results, find_runs
from nla_utils.store import atomic_write

FIGURES = (
    ("fig1_k_curves", figures.figure_1, "K-curves: published above, each run below under both protocols, with "
     "floor, ceiling and the controls that the paper lacks. Bands are 95 % bootstrap intervals over targets."),
    ("fig2_mu_and_floor", figures.figure_2, "‖μ‖ against the random floor: raw fve rises with ‖μ‖, centred fve "
     "stays at one half."),
    ("fig3_replay_ladder", figures.figure_3, "Replay of the same targets: as published, and with the last token, the "
     "text's lost ids and EOS, the missing BOS corrected. Which of them costs most differs between backbones."),
    ("fig4_slip_by_slip", figures.figure_4, "Slip by slip: the paper's procedure at the top, each line below corrects "
     "one more of its slips; the last is the corrected protocol. Bands are 95 % bootstrap intervals."),
    ("fig5_beyond", figures.figure_5, "Beyond §11: score against forward tokens, held out. The tail reader writes "
     "without the language model; its guided search spends what the AV's best-of-K does."),
    ("fig6_reader_scaling", figures.figure_6, "The tail reader's greedy score against its training sequences; dotted: "
     "NN-retrieval."),
)  # fmt: skip


SHARED_NOTES = (
    "Gemma-3-270M and SmolLM2-135M are not the paper's backbones. Their columns say what the paper's procedure "
    "gives on another model of the same kind; they are not expected to repeat the published values.",
    "NN-in-pool among 200 and NN-retrieval from 2,000 are the best of 199 and of 2,000 unrelated texts: two "
    "points of a null line against log K, read off at the K of the published best-of-K. Those texts are encoded "
    "behind BOS and the rollouts are not, and the first point uses the targets' own mean: a rough comparison.",
    "A verdict is *stands* where the whole interval passes the test, *falls* where all of it fails, and *not decided "
    "at this n* otherwise. Controls are what §11 should have tested.",
    "The paper takes the centred gap for a property of the backbone. Where two runs' intervals overlap, they do "
    "not tell their backbones apart by it.",
)


@dataclass(frozen=True)
class Table:
    """One generated table: file stem, caption, contents, and where its rows come from."""

    stem: str
    caption: str
    frame: pd.DataFrame
    results_name: str = ""
    rows: tuple = ()


def tables_of_run(run: RunResults) -> list[Table]:
    """All tables of §11 for one run, beside the published numbers of §11's backbone."""
    stem = f"{run.backbone}-{run.profile}"
    ref = SECTION_11
    made = [
        Table(f"{stem}-scorecard", "Scorecard", claims.scorecard(run, ref)),
        Table(f"{stem}-headline", "Headline of §11", tables.headline_table(run, ref)),
    ]
    for kind, word in (("cen", "centred"), ("raw", "raw")):
        made.append(
            Table(f"{stem}-ceilings-{kind}", f"Ceilings, {word} fve_nrm", tables.ceilings_table(run, ref, kind),
                  "oracle_ceiling", tables.CEILING_ROWS)
        )  # fmt: skip
        made.append(
            Table(f"{stem}-evaluation-{kind}", f"Evaluation, {word} fve_nrm", tables.evaluation_table(run, ref, kind),
                  "centered_eval", tables.EVAL_ROWS)
        )  # fmt: skip
    made += [
        Table(f"{stem}-rho", "ρ_cen", tables.rho_table(run, ref), "centered_eval", tables.RHO_ROWS),
        Table(f"{stem}-k-curve", "K-curve, centred fve_nrm", tables.k_curve_table(run, ref)),
        Table(f"{stem}-reranks", "Cheap reranks, centred fve_nrm", tables.rerank_table(run, ref), "rerank_eval",
              tables.RERANK_ROWS),
        Table(f"{stem}-audit", "Audit: what each slip moves", audit_table(run)),
        Table(f"{stem}-reader", "Beyond §11: the tail reader", beyond.reader_table(run)),
        Table(f"{stem}-reader-scorecard", "Beyond §11: scorecard", claims.reader_scorecard(run)),
        Table(f"{stem}-meaning", "Beyond §11: what the texts share with their sources", beyond.meaning_table(run)),
    ]  # fmt: skip
    record = beyond.ablation_record(run)
    if record:
        made.append(Table(f"{stem}-reader-ablation", "Beyond §11: one change at a time", beyond.ablation_table(record)))
    return made


def shared_tables(runs: Sequence[RunResults]) -> list[Table]:
    """Tables over all backbones and runs."""
    return [
        Table("backbones", "The backbones side by side", tables.backbones_table(runs)),
        Table("published-null", "Published best-of-K beside the null that the paper itself prints",
              tables.published_null_table()),
        Table("claims", "The claims and what a verdict on them means", claims.claims_table()),
        Table("gap", "Centred gap, paraphrase best-of-8 minus floor", claims.gap_table(runs)),
    ]  # fmt: skip


def build_paper(
    roots: Sequence[Path] = (committed_results(),),
    section: Path = ROOT / "paper" / "section11.md",
    figure_folder: Path = ROOT / "figures",
) -> list[Path]:
    """Regenerate section, tables and figures from the runs found below ``roots``; returns what was written."""
    runs = find_runs(roots)
    for stem, draw, _ in FIGURES:
        figures.save_figure(draw(runs), figure_folder, stem)
    written = [figure_folder / f"{stem}.{end}" for stem, _, _ in FIGURES for end in ("png", "pdf")]
    made = shared_tables(runs) + [t for run in runs for t in tables_of_run(run)]
    folder = section.parent / "tables"
    for table in made:
        atomic_write(folder / f"{table.stem}.md", tables.markdown(table.frame).encode())
        label = f"tab:{table.stem}"
        atomic_write(folder / f"{table.stem}.tex", tables.latex(table.frame, table.caption, label).encode())
        written += [folder / f"{table.stem}.md", folder / f"{table.stem}.tex"]
    atomic_write(section, section_text(runs, section.parent, figure_folder).encode())
    return [section, *written]


def section_text(runs: Sequence[RunResults], base: Path, figure_folder: Path) -> str:
    """The section as Markdown; every figure in it is formatted from a results file."""
    parts = [paper_text.introduction(runs)]
    for table, note in zip(shared_tables(runs), SHARED_NOTES):
        parts.append(f"## {table.caption}\n\n{tables.markdown(table.frame)}\n{note}\n")
    for stem, _, caption in FIGURES:
        path = Path(os.path.relpath(figure_folder, base), f"{stem}.png").as_posix()
        parts.append(f"![{caption}]({path})\n\n*{caption}*\n")
    parts += [_run_part(run) for run in runs]
    parts.append(_provenance(runs))
    return "\n".join(parts)


def _run_part(run: RunResults) -> str:
    parts = [f"## {run.title}\n", paper_text.reading(run)]
    for table in tables_of_run(run):
        parts.append(f"### {table.caption}\n\n{tables.markdown(table.frame)}")
        if table.stem.endswith("-reader"):
            parts.append(paper_text.beyond(run))
    return "\n".join(parts)


def _provenance(runs: Sequence[RunResults]) -> str:
    files = []
    for run in runs:
        for name in NAMES:
            data = run.data[name]
            files.append(
                {
                    "results file": f"{run.backbone}/{run.profile}/{name}.json",
                    "sha256": run.sha256(name)[:16],
                    "made from": ", ".join(f"{k} {v[:12]}" for k, v in data["made_from"].items()),
                    "git commit": _commit(data["code"]),
                    "written on": ", ".join(
                        (data["identity"]["device"], data["identity"]["dtype"], "torch " + data["libraries"]["torch"])
                    ),
                }
            )
    keys = [
        {
            "table": t,
            "row": label,
            "JSON key": f"`{key}`",
            "results file": f"{name}.json",
            "published key": f"`{path}`" if path else "–",
        }
        for t, name, rows in (
            ("ceilings", "oracle_ceiling", tables.CEILING_ROWS),
            ("evaluation", "centered_eval", tables.EVAL_ROWS),
            ("ρ", "centered_eval", tables.RHO_ROWS),
            ("reranks", "rerank_eval", tables.RERANK_ROWS),
        )
        for label, path, key in rows
    ]
    parts = [
        "## Where each number comes from\n",
        "Results files are in `paper/results`; `made from` names the artefacts of the run and the start of their "
        "sha256; the commit is that of the code that wrote the file.\n",
    ]
    if files:
        parts.append(tables.markdown(pd.DataFrame(files).set_index("results file")))
    parts.append("Rows and their keys, under `protocols.paper` and `protocols.corrected` ({kind}: raw or cen); "
                 "K-curves are `kcurve_*` and `slope_per_doubling_*` in `rerank_eval.json`.\n")  # fmt: skip
    parts.append(tables.markdown(pd.DataFrame(keys).set_index("table")))
    return "\n".join(parts)


def _commit(code: dict) -> str:
    if not code["git_commit"]:
        return "–"
    return code["git_commit"][:12] + (" + changes" if code["dirty"] else "")
