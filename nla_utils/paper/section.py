"""``paper/section11.md`` and ``.tex``: §11 as a section to print, made from the JSON on disk and nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Mapping, Optional, Sequence

import pandas as pd

from nla_utils.config import ROOT
from nla_utils.paper import claims, figures, tables
from nla_utils.paper.audit import audit_of_all
from nla_utils.paper.card import facts_table, slips_table
from nla_utils.paper.findings import easy_table, findings_table, reading_table, verdict_counts
from nla_utils.paper.pages import FigureSpec, Page, Table, references
from nla_utils.paper.published import BACKBONES, POOL, SECTION_11, TARGETS, TITLES, card, published, published_null
from nla_utils.paper.released import released_runs, released_table
from nla_utils.paper.results import (
    COMMITTED,
    RunResults,
    device_of,
    find_results,
    foremost,
    largest,
    weights_note,
    without_variants,
)
from nla_utils.paper.verdicts import YES, decide
from nla_utils.scores import rows

SECTION = ROOT / "paper" / "section11.md"
FIGURE_1 = FigureSpec(
    "fig1_k_curves", figures.figure_1,
    "The best of K texts, centred. Above, as published: curves with their ceilings (dashed) and floors (dotted). Diamonds "
    "are the headline best of K, of another evaluation than the curve: Qwen's is of the final checkpoint, its curve of an "
    "earlier one; Llama's has fewer targets, and its ceiling is NN-in-pool, that of the others the best of eight "
    "paraphrases. Of gemma-4 only the triangles are printed. The paper prints no intervals. "
    "Below, ours, held out and corrected: the rise with K is there for texts that have nothing to do with v. Two such nulls "
    "lie close together: unrelated texts (wide pale line) and the AV's rollouts of other targets (dots). What the AV adds is "
    "its distance from them. The best of eight paraphrases and the nearest stored text are levels, not curves. Bands are "
    "95 % intervals over targets.",
)  # fmt: skip
READING = FigureSpec(
    "fig8_reading", figures.figure_reading,
    "What v saves the AV, in nats a token, while it is trained: against the v of another target, and against the mean μ. "
    "Above zero it reads v. Lines are validation texts; their spread was not kept, so they have no intervals. Marks with a "
    "black edge are the kept AV on the held-out targets, with 95 % intervals over targets.",
)  # fmt: skip
# Widths of a label, a published and two columns with intervals; and of a label and three pairs, raw and centred.
NARROW, WIDE = (28, 13, 25, 25), (17, 9, 9, 13, 13, 13, 13)
# The same with a column, or a pair, of the released AV.
NARROW_RELEASED, WIDE_RELEASED = (24, 10, 20, 20, 20), (13, 7, 7, 11, 11, 11, 11, 11, 11)


def tables_of_run(results: RunResults, released: Optional[RunResults] = None) -> dict[str, Table]:
    """The tables of §11 and the scorecard for one run, by name; with ``released``, our run of the AV that was released for
    §11's backbone, its numbers stand beside the published ones."""
    evaluated = (*rows.EVALUATION, rows.CONSTANT_MU)
    beside = released is not None and released is not results
    narrow, wide = (NARROW_RELEASED, WIDE_RELEASED) if beside else (NARROW, WIDE)
    curve = (8, 8, 15, 15, 15, 15, 15) if beside else (12, 10, 16, 17, 16, 17)

    def shown(make: Callable[[RunResults], pd.DataFrame]) -> pd.DataFrame:
        return tables.with_released(make, results, released)

    made = {
        "ceilings": ("Table 1. Ceilings", shown(partial(tables.both_kinds_table, rows.CEILINGS)), wide),
        "evaluation": ("Table 2. Evaluation", shown(partial(tables.both_kinds_table, evaluated)), wide),
        "rho-short": ("Table 3. The same as ρ, centred", shown(tables.rho_table), narrow),
        "k-curve": ("Table 4. The best of K, centred", shown(tables.short_k_curve_table), curve),
        "reranks": ("Table 5. Cheap reranks, centred", shown(tables.rerank_table), narrow),
        "verdicts": ("Scorecard", claims.short_scorecard(results), (29, 11, 11, 19, 19)),
    }  # fmt: skip
    return {key: Table(f"{results.stem}-{key}", *what, of=results.label) for key, what in made.items()}


def shared_tables(
    shown: Sequence[RunResults], about: Sequence[RunResults], released: Mapping[str, RunResults]
) -> dict[str, Table]:
    """The tables over all backbones, by name."""

    def shared(width: float) -> tuple[float, ...]:
        """A width for the columns of our backbones together."""
        return tuple(width / len(about) for _ in about)

    # A question, ours, its notebook; the label, three published backbones, ours; a slip, what it is, ours.
    found, facts, audit = (26, *shared(55), 8), (15, 9, 9, 9, *shared(42)), (15, 18, *shared(58))
    return {
        "findings": Table("findings", "What was found", findings_table(shown), found),
        "facts": Table("facts", "The backbones and the trainings", facts_table(about), facts),
        "null": Table("published-null", "The published best of K beside the null that the paper itself prints",
                      tables.published_null_table(released),
                      (14, 5, 12, 14, 14, 26) if released else (20, 6, 18, 24, 20)),
        "card": Table("card", "What the card says, and what is wrong with it", slips_table(about), (34, 60)),
        "audit": Table("audit", "Audit: what each slip moves", audit_of_all(about, shown), audit, long=True),
        "reading": Table("reading", "What the AV takes from v", reading_table(shown), (15, 6, 6, 14, 14, 14, 14)),
    }  # fmt: skip


def _reading_runs(measured: list[RunResults]) -> str:
    """The runs whose own v makes a source more likely than another's; their verdicts are one family."""
    gained = rows.NATS_GAINED[0].key
    words = decide({r.label: claims.claimed(r.source_loss, gained, low=0) for r in measured})
    return ", ".join(label for label, word in words.items() if word == YES)


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _how_made(results: RunResults) -> str:
    sizes = results.data["targets"]["sizes"]
    training = results.data["training"]
    machine = "a CPU" if device_of(training) == "cpu" else "a GPU"
    made = f"trained on {machine} and kept at step {training['best_step']} of {training['steps']}"
    if training.get("released"):
        made = "a released AV"
    return (
        f"{results.name} ({results.size}, {made}, M = {sizes['M']} held-out targets with K = {sizes['K']} rollouts each)"
    )


def said(about: Sequence[RunResults]) -> dict[str, object]:
    """The numbers of the section's sentences, as text; those of runs one after the other, always in the same order."""

    def each(text: Callable[[RunResults], str], runs: Sequence[RunResults] = about) -> str:
        found = [text(r) for r in runs]
        return listed(found[:1] if len(set(found)) == 1 else found)

    def of(row: rows.Row, protocol: str = "corrected", kind: str = "cen", show=None) -> str:
        show = show or (lambda column, key: tables.number(column[key]))
        return each(lambda r: show(r.column(row.file, protocol), row.at(kind)))

    stated, later = published(SECTION_11), published("gemma4_31b")
    nulls = {TITLES[name]: published_null(name, published(name)["centred_eval"]["K"]) for name in BACKBONES}
    least = min(best - null for null, best in nulls.values())
    read = [r for r in about if r.source_loss]
    # Whose null is read off the same points as the published one.
    same = [r for r in about if (r.data["targets"]["sizes"]["M"], r.data["targets"]["sizes"]["pool"]) == (TARGETS, POOL)]
    return {
        "names": each(lambda r: r.name), "shown": each(lambda r: r.spec.shown), "small": all(r.spec.weights for r in about),
        "card": card(), "K": stated["centred_eval"]["K"],
        "margins": ", ".join(f"{best - null:+.3f} on {title}" for title, (null, best) in nulls.items()),
        "retrieval": ", ".join(
            f"{tables.number(r['best_of_k']['cen'])} against {tables.number(r['nn_retrieval']['cen'])} on {TITLES[name]}"
            for name, r in ((name, published(name)["centred_eval"]) for name in BACKBONES)
        ),
        "later": later, "replay": of(rows.REPLAY, "paper"), "replay_corrected": of(rows.REPLAY),
        "best": of(rows.BEST), "unrelated": of(rows.UNRELATED), "gained": of(rows.BEST_MINUS_UNRELATED, show=tables.signed),
        "greedy": of(rows.GREEDY_MINUS_OTHERS, show=tables.signed),
        "nearest": of(rows.GREEDY_MINUS_RETRIEVAL, show=tables.signed),
        "nats": each(lambda r: tables.signed(r.source_loss, rows.NATS_GAINED[0].key), read),
        "within": bool(same) and all(0 < least < tables.null_mismatch(r) for r in same),
        "same": each(lambda r: r.name, same), "mismatch": each(lambda r: f"{tables.null_mismatch(r):.3f}", same),
        "encoding": each(lambda r: f"{tables.null_encoding(r):.3f}", same),
        "steps": each(lambda r: str(r.data["training"]["best_step"])), "undertrained": listed([r.name for r in about if r.undertrained]),
        "ks": each(lambda r: str(r.data["targets"]["sizes"]["K"])),
        "made": each(_how_made), "held_out": each(lambda r: str(r.data["targets"]["sizes"]["M"])),
        "mu": of(rows.CONSTANT_MU, kind="raw"), "best_raw": of(rows.BEST, kind="raw"),
    }  # fmt: skip


def section_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The section of the results below ``roots``: of the largest run of each backbone, or of ``own`` (backbone, profile) in
    its backbone's place, and first."""
    shown = without_variants(find_results(roots), own)
    main = foremost(shown, own)
    about = [main, *(r for r in largest(shown) if r.backbone != main.backbone)] if main else []
    of_released = released_runs(shown)
    shared = shared_tables(shown, about, of_released)
    of_runs = {r.label: tables_of_run(r, of_released.get(SECTION_11)) for r in about}
    easy = easy_table(shown)
    if not easy.empty:
        shared["easy"] = Table("easy", "Where reading is easy", easy, (22, 14, 15, 14, 14, 9))
    released = {
        name: Table(f"{name}-released", f"The released AV on {TITLES[name]}, run here", released_table(name, r), (30, 12, 28, 24),
                    of=r.label)
        for name, r in of_released.items()
    }  # fmt: skip
    read = [r for r in largest(shown) if r.source_loss]
    drawn = {FIGURE_1: shown} | ({READING: shown} if read else {})
    values = {
        **shared, "of_runs": of_runs, "released": released, "claims": [c for c in claims.CLAIMS if c.where != "control"],
        "counts": {r.label: verdict_counts(r) for r in about}, "reads": _reading_runs(read), "said": said(about),
        "weights": weights_note(shown), "references": references(),
    }  # fmt: skip
    made = [*shared.values(), *released.values(), *(t for tables_ in of_runs.values() for t in tables_.values())]
    return Page(SECTION, "section11.md.j2", made, drawn, values, "section11.tex.j2")
