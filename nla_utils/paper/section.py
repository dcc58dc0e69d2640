"""``paper/section11.md`` and ``.tex``: §11 as a section to print, made from the JSON on disk and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Optional

from nla_utils.config import ROOT
from nla_utils.paper import claims, figures, tables
from nla_utils.paper.audit import audit_table
from nla_utils.paper.findings import easy_table, findings_table, reading_table, verdict_counts
from nla_utils.paper.pages import FigureSpec, Page, Table
from nla_utils.paper.results import COMMITTED, RunResults, find_results, foremost, largest, weights_note, without_variants
from nla_utils.scores import rows

SECTION = ROOT / "paper" / "section11.md"
FIGURE_1 = FigureSpec(
    "fig1_k_curves", figures.figure_1,
    "The best of K texts, centred. Left, as published: a curve that rises with K, its floor (dotted) and ceiling (dashed). "
    "Right, ours, held out: the same rise is there for K texts that have nothing to do with v (black). What the AV adds is "
    "the distance between the two curves; looking up the nearest stored text is above both. Bands are intervals.",
)  # fmt: skip
READING = FigureSpec(
    "fig8_reading", figures.figure_reading,
    "What v saves the AV, in nats a token of validation texts, while it is trained. Above zero it reads v. At first "
    "the mean in every slot serves it better than the right vector.",
)  # fmt: skip


def main_tables(results: RunResults) -> dict[str, Table]:
    """The four tables of §11, the scorecard and the audit of one run, by name."""
    made = {
        "ceilings": ("Table 1. Ceilings, centred", tables.ceilings_table(results, "cen"), (28, 13, 25, 25)),
        "evaluation": ("Table 2. Evaluation, centred", tables.evaluation_table(results, "cen"), (28, 13, 25, 25)),
        "k-curve": ("Table 3. The best of K", tables.short_k_curve_table(results), (15, 13, 31, 31)),
        "reranks": ("Table 4. Cheap reranks, centred", tables.rerank_table(results), (28, 13, 25, 25)),
        "verdicts": ("Scorecard", claims.short_scorecard(results), (29, 11, 11, 19, 19)),
        "audit": ("Audit: what each slip moves", audit_table(results).drop(columns="acts in"), (18, 36, 38)),
    }  # fmt: skip
    return {key: Table(f"{results.stem}-{key}", *what, of=results.label) for key, what in made.items()}


def _reading_runs(measured: list[RunResults]) -> str:
    """The runs whose own v makes a source likelier than another's, by the whole interval."""
    gained = rows.NATS_GAINED[0].key
    return ", ".join(r.label for r in measured if r.source_loss["ci95"][gained][0] > 0)


def section_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The section of the results below ``roots``; ``own`` (backbone, profile) is the run that it is about, if not the
    largest of the default backbone."""
    shown = without_variants(find_results(roots), own)
    main = foremost(shown, own)
    shared = {
        "findings": Table("findings", "What was found", findings_table(shown), (34, 24, 24, 9)),
        "reading": Table("reading", "What the AV takes from v", reading_table(shown),
                         (15, 6, 6, 14, 14, 14, 14)),
    }  # fmt: skip
    own_tables, easy = main_tables(main) if main else {}, easy_table(shown)
    if not easy.empty:
        own_tables["easy"] = Table("easy", "Where reading is easy", easy, (22, 14, 15, 14, 14, 9))
    read = [r for r in largest(shown) if r.source_loss]
    drawn = {FIGURE_1: shown} | ({READING: shown} if read else {})
    values = {
        **shared, "main": own_tables, "about": main, "claims": [c for c in claims.CLAIMS if c.where != "control"],
        "counts": verdict_counts(main) if main else "", "reads": _reading_runs(read), "weights": weights_note(shown),
    }  # fmt: skip
    return Page(SECTION, "section11.md.j2", [*shared.values(), *own_tables.values()], drawn, values, "section11.tex.j2")
