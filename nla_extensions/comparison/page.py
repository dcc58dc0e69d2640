"""``paper/comparison.md``: the ways of reading side by side, from JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_extensions.comparison.tables import (
    directions_table,
    ends_table,
    findings_table,
    price_table,
    shown,
    ways_table,
)
from nla_utils.config import ROOT
from nla_utils.report.claims import COMPARISON as RESULTS
from nla_utils.report.figures import NULL_GREY, WIDTH, colour, name_points, style, styled
from nla_utils.report.pages import FigureSpec, Page, Table, provenance
from nla_utils.report.results import COMMITTED, RunResults, find_results, weights_note

PAGE = ROOT / "paper" / "comparison.md"


@styled
def figure_9(everything: Sequence[RunResults]) -> Figure:
    """Centred score against nats a token: each way's likeliest text and its best, and the guided search at every price."""
    fig, axes = plt.subplots(
        len(everything), 1, figsize=(WIDTH, 3.7 * len(everything)), layout="constrained", sharey=True, squeeze=False
    )
    for ax, results in zip(axes[:, 0], everything):
        style(ax, "nats a token of the text itself (less is more fluent)", "centred fve_nrm", results.label)
        _draw_frontier(ax, results.optional(RESULTS)["rows"], colour(results.backbone))
    return fig


def _draw_frontier(ax: Axes, ways: Sequence[dict], color: str) -> None:
    searched, labels = [w for w in ways if w["method"].startswith("guided")], []
    ax.plot([w["best_nats"] for w in searched], [w["best_cen"] for w in searched], "-", color=color)
    for way in ways:
        priced, written = way in searched[1:], way["k"] > 1
        tint = color if written or way in searched else NULL_GREY
        best, greedy = ((way[f"{name}_nats"], way[f"{name}_cen"]) for name in ("best", "greedy"))
        bars = [[[abs(end - at)] for end in way["ci95"][f"best_{key}"]] for at, key in zip(best, ("nats", "cen"))]
        ax.errorbar(
            *best, xerr=bars[0], yerr=bars[1], fmt="o", markersize=2.5 if priced else 5, color=tint, elinewidth=0.6
        )
        if written:
            ax.plot(*zip(greedy, best), ":", color=tint, linewidth=0.8)
            ax.plot(*greedy, "o", markersize=5, color=tint, markerfacecolor="white")
        if not priced:
            labels.append((shown(way["method"]) + (f", best of {way['k']}" if written else ""), *best, tint))
    ax.margins(x=0.12, y=0.08)
    name_points(ax, labels)


FRONTIER = FigureSpec(
    "fig9_fluency",
    figure_9,
    "How close a text comes to v against what its words cost the language model. Filled: the best "
    "of as many texts as the budget buys; hollow, joined to it: the likeliest text. The line is the guided search, paying "
    "more for fluent words from right to left. Grey: texts that nobody wrote for v. Upper left is best. Bars are 95 % intervals "
    "over sources.",
)


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
        "findings": findings,
        "of_runs": of_runs,
        "facts": facts,
        "weights": weights_note(compared),
        "provenance": provenance(everything, (RESULTS,)),
    }
    made = [findings, *(table for tables in of_runs.values() for table in tables)]
    return Page(PAGE, Path(__file__).with_name("page.md.j2"), made, {FRONTIER: compared} if compared else {}, values)
