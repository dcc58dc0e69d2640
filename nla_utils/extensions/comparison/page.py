"""``paper/comparison.md``: the ways of reading side by side, from JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from nla_utils.config import ROOT
from nla_utils.extensions.comparison.tables import (
    RESULTS,
    directions_table,
    ends_table,
    findings_table,
    price_table,
    shown,
    ways_table,
)
from nla_utils.paper.figures import NULL_GREY, colour, same_limits, style
from nla_utils.paper.pages import FigureSpec, Page, Table, provenance
from nla_utils.paper.results import COMMITTED, RunResults, find_results, weights_note

PAGE = ROOT / "paper" / "comparison.md"
# Where labels stand, in points from their dot, that would touch another there.
BESIDE = {
    "guided": (-40, 9), "reader": (7, -9), "lens": (-90, 9), "the source's last 4": (-35, -13),
    "the source's last 8": (-30, 8),
}  # fmt: skip


def figure_9(everything: Sequence[RunResults]) -> Figure:
    """Centred score against nats a token: each way's likeliest text and its best, and the guided search at every price."""
    fig, axes = plt.subplots(1, len(everything), figsize=(6 * len(everything), 4.6), layout="constrained", squeeze=False)
    for ax, results in zip(axes[0], everything):
        _draw_frontier(ax, results.optional(RESULTS)["rows"], colour(results.backbone))
        style(ax, "nats a token of the text itself (less is more fluent)", "centred fve_nrm", results.label)
    same_limits(axes[0])
    return fig


def _draw_frontier(ax: plt.Axes, ways: Sequence[dict], shade: str) -> None:
    searched = [w for w in ways if w["method"].startswith("guided")]
    ax.plot([w["best_nats"] for w in searched], [w["best_cen"] for w in searched], ".-", color=shade, linewidth=1.5)
    for way in ways:
        if way in searched[1:]:
            continue
        ends = [(way[f"{name}_nats"], way[f"{name}_cen"]) for name in ("greedy", "best")]
        written = way["k"] > 1
        ax.plot(*zip(*ends), ":", color=shade if written else NULL_GREY, linewidth=0.8)
        ax.plot(*ends[0], "o", markersize=5, color=shade, markerfacecolor="white")
        ax.plot(*ends[1], "o", markersize=5, color=shade if written or way in searched else NULL_GREY)
        label = shown(way["method"]) + (f", best of {way['k']}" if written else "")
        ax.annotate(label, ends[1], BESIDE.get(way["method"], (7, 3)), textcoords="offset points", fontsize=7)


FRONTIER = FigureSpec(
    "fig9_fluency", figure_9, "How close a text comes to v against what its words cost the language model. Filled: the best "
    "of as many texts as the budget buys; hollow, joined to it: the likeliest text. The line is the guided search, paying "
    "more for fluent words from right to left. Grey: texts that nobody wrote for v. Upper left is best.",
)  # fmt: skip


def tables_of_run(results: RunResults) -> list[Table]:
    """The tables of one comparison."""
    record = results.optional(RESULTS)
    made: tuple[tuple[str, str, pd.DataFrame], ...] = (
        ("ways", "Ways of reading at the same forward tokens", ways_table(record)),
        ("ends", "Beyond the last words", ends_table(record)),
        ("price", "The guided search, paying for fluent words", price_table(record)),
        ("directions", "Directions that are no activation of a text", directions_table(record)),
    )
    return [Table(f"{results.stem}-{end}", caption, frame, of=results.label) for end, caption, frame in made]


def comparison_page(roots: Iterable[Path] = (COMMITTED,)) -> Page:
    """The page of the results below ``roots``."""
    everything = find_results(roots)
    compared = [r for r in everything if r.optional(RESULTS)]
    of_runs = {r.label: tables_of_run(r) for r in compared}
    facts = {r.label: r.optional(RESULTS) for r in compared}
    findings = Table("comparison-findings", "What was found", findings_table(facts))
    values = {
        "findings": findings, "of_runs": of_runs, "facts": facts, "weights": weights_note(compared),
        "provenance": provenance(everything, (RESULTS,)),
    }  # fmt: skip
    made = [findings, *(table for tables in of_runs.values() for table in tables)]
    return Page(PAGE, "comparison.md.j2", made, {FRONTIER: compared} if compared else {}, values)
