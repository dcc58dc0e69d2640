"""``paper/tail_reader.md``: the tail reader's tables and figures, from JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Optional, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_extensions.tail_reader import tables
from nla_utils import rows
from nla_utils.config import ROOT
from nla_utils.report.claims import COMPARISON, cell, claimed, decide
from nla_utils.report.figures import (
    NULL_GREY,
    SMALL,
    WIDTH,
    colour,
    in_two_lines,
    name_ends,
    name_points,
    shade,
    style,
    styled,
)
from nla_utils.report.pages import FigureSpec, Page, Table, provenance
from nla_utils.report.results import COMMITTED, RunResults, find_results, largest, weights_note, without_variants
from nla_utils.report.tables import with_interval

PAGE = ROOT / "paper" / "tail_reader.md"
FILES = (tables.RESULTS, tables.ABLATION_RESULTS, tables.SEEDS_RESULTS)
FOUND = (rows.GREEDY_MINUS_RETRIEVAL, tables.GUIDED_MINUS_TAIL)
SCALED_LINES = {"reader": "o-", "retrieval": "s:", "probe": "^--"}


def draw_compute(ax: Axes, curves: dict[str, list[dict]], color: str, title: str) -> None:
    """Draw centred score against forward tokens: AV, its null, the reader, and the reader's guided search."""
    looks = {
        "AV": (color, "o:"),
        "unrelated text": (NULL_GREY, "s--"),
        "reader": (color, "o-"),
        "reader, guided": ("black", ".-"),
    }
    labels = []
    for name, points in curves.items():
        tokens, means = [p["tokens"] for p in points], [p["mean"] for p in points]
        low, high = np.array([p["ci95"] for p in points]).T
        tint, line = looks[name]
        ax.plot(tokens, means, line, color=tint, markersize=3)
        ax.fill_between(tokens, low, high, color=tint, alpha=0.12, linewidth=0)
        labels.append((name, tokens[len(tokens) // 2], means[len(tokens) // 2], tint))
    ax.set_xscale("log")
    style(ax, "forward tokens a target (log)\nAV: a token is paid twice, written and read", "centred fve_nrm", title)
    name_points(ax, labels)


@styled
def figure_5(everything: Sequence[RunResults]) -> Figure:
    """Score against forward tokens: the AV, its null, the tail reader and its guided search."""
    chosen = largest(everything)
    fig, axes = plt.subplots(1, len(chosen), figsize=(WIDTH, 3.6), layout="constrained", sharey=True, squeeze=False)
    for ax, results in zip(axes[0], chosen):
        column = results.column("centered_eval", "corrected")
        ax.axhline(column[rows.RETRIEVAL.cen], color="black", linewidth=0.8)
        ax.axhspan(*column["ci95"][rows.RETRIEVAL.cen], color="black", alpha=0.08, linewidth=0)
        ax.annotate(
            rows.RETRIEVAL.label,
            (0.02, column[rows.RETRIEVAL.cen]),
            (0, -3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            fontsize=SMALL,
            va="top",
        )
        draw_compute(ax, results.optional(tables.RESULTS)["compute"], colour(results.backbone), in_two_lines(results))
        ax.label_outer()
    return fig


@styled
def figure_6(everything: Sequence[RunResults]) -> Figure:
    """Greedy scores against the number of sequences used."""
    fig, axes = plt.subplots(1, len(everything), figsize=(WIDTH, 3.4), layout="constrained", sharey=True, squeeze=False)
    ends: list[dict[str, tuple[float, str]]] = []
    for ax, results in zip(axes[0], everything):
        scaling = results.optional(tables.ABLATION_RESULTS)["scaling"]
        ends.append({})
        for i, (who, line) in enumerate(SCALED_LINES.items()):
            y = np.array([p[who]["mean"] for p in scaling])
            error = np.abs(np.array([p[who]["ci95"] for p in scaling]).T - y)
            color = shade(colour(results.backbone), (0, -0.4, -0.7)[i])
            # A few percent apart, so that bars of one size do not cover each other.
            ax.errorbar([p["train_rows"] * 1.05**i for p in scaling], y, error, fmt=line, color=color, capsize=2)
            ends[-1][tables.SCALED[who].split(",")[0]] = (y[-1], color)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        style(ax, "sequences used (log₂)", "centred fve_nrm", in_two_lines(results))
        ax.label_outer()
    for ax, names in zip(axes[0], ends):
        name_ends(ax, ax.get_xlim()[1], names)
    return fig


COMPUTE = FigureSpec(
    "fig5_beyond",
    figure_5,
    "Score against forward tokens, held out. The tail reader writes without "
    "the language model and pays only to read its texts again; the AV pays for each token twice, to write it "
    "and to read it. The guided search spends what the AV's best of K does. The AV is the one of the run in "
    "the title. Bands are 95 % intervals over targets.",
)
GROWTH = FigureSpec(
    "fig6_reader_scaling",
    figure_6,
    "The tail reader's greedy score, the probe's and NN-retrieval's "
    "against the number of sequences that each may use, on the same held-out targets. Bars are 95 % intervals "
    "over targets; points of one size are drawn a little apart.",
)


def findings_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """Greedy text against the nearest stored text and against the AV's, largest run of each backbone. The verdicts of the
    table are one family."""
    shown = {r.label: r for r in largest(everything)}
    words = decide(
        {(row, label): claimed(tables.reader_column(r), row.cen, 0.0) for row in FOUND for label, r in shown.items()}
    )
    table = {}
    for label, results in shown.items():
        reader, av = tables.reader_column(results), results.column("centered_eval", "corrected")
        table[label] = {
            "tail reader, greedy": with_interval(reader, rows.GREEDY.cen),
            "the AV of that run, greedy": f"{with_interval(av, rows.GREEDY.cen)}, {tables.trained(results)}",
            "NN-retrieval": with_interval(reader, rows.RETRIEVAL.cen),
            "tail reader, greedy − NN-retrieval: above 0?": cell(reader, FOUND[0].cen, words[FOUND[0], label]),
            f"{FOUND[1].label}: above 0?": cell(reader, FOUND[1].cen, words[FOUND[1], label]),
        }
    found = pd.DataFrame(table)
    found.index.name = "held out, centred"
    return found


def trained_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The tail reader and the AV of the paper's size, best of as many texts as the same forward tokens buy, on the sources
    of the comparison."""
    table = {}
    for results in everything:
        record = results.optional(COMPARISON)
        ways = {row["method"]: row for row in record["rows"]}
        of = {
            "the paper's AV": ways["av"],
            "tail reader": ways["reader"],
            "tail reader, guided search": ways["guided"],
            "nearest stored text": ways["retrieved"],
        }
        shown = {
            name: with_interval(row, "best_cen") + (f", best of {row['k']}" if row["k"] > 1 else "")
            for name, row in of.items()
        }
        facts = {"the AV's training": tables.trained(results), "forward tokens": f"{record['forward_tokens']:,}"}
        table[results.label] = {**facts, **shown}
    found = pd.DataFrame(table)
    found.index.name = "fresh sources, centred, best text"
    return found


def _unless_of_the_readers_targets(results: RunResults, record: dict, added: str) -> str:
    """What a caption adds where the record was made from none of the targets that the reader was measured on: drawn on
    another machine, or again, they differ even for the same seed."""
    readers = results.optional(tables.RESULTS)["made_from"]["targets"]
    return "" if readers in record["made_from"].values() else added


def tables_of_run(results: RunResults) -> list[Table]:
    """The tail reader's tables for one run; those of the ablation and the seeds where they were run."""
    stem, of = results.stem, results.label
    older = (
        "; the reader's figures are of an older run's targets, the AV's of this run's: not to be compared row by row"
    )
    note = _unless_of_the_readers_targets(results, results.data["training"], older)
    made = [
        Table(
            f"{stem}-reader",
            f"The tail reader and the AV of the run ({tables.trained(results)}){note}",
            tables.reader_table(results),
            of=of,
        ),
        Table(f"{stem}-reader-scorecard", "Scorecard", tables.scorecard(results), of=of),
        Table(f"{stem}-shared", "What the texts share with their sources", tables.shared_table(results), of=of),
    ]
    others = " (other targets than in the tables above)"
    ablation, seeds = results.optional(tables.ABLATION_RESULTS), results.optional(tables.SEEDS_RESULTS)
    if ablation:
        apart = _unless_of_the_readers_targets(results, ablation, others)
        made += [
            Table(f"{stem}-reader-ablation", f"One change at a time{apart}", tables.ablation_table(ablation), of=of),
            Table(f"{stem}-reader-growth", f"With more sequences{apart}", tables.growth_table(ablation), of=of),
        ]
    if seeds:
        apart = _unless_of_the_readers_targets(results, seeds, others)
        caption = f"Repeated on targets drawn anew{apart}"
        made.append(Table(f"{stem}-reader-seeds", caption, tables.seeds_table(seeds), of=of))
    return made


def reader_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The page of the results below ``roots``; ``own`` (backbone, profile) is a run to show in any case."""
    everything = find_results(roots)
    shown = [r for r in without_variants(everything, own) if r.optional(tables.RESULTS)]
    findings = Table("reader-findings", "What was found", findings_table(shown))
    compared = [r for r in largest(without_variants(everything)) if r.optional(COMPARISON)]
    trained = Table(
        "reader-trained", "Against the AV of the paper's size, at equal forward tokens", trained_table(compared)
    )
    of_runs = {f"{r.label}: {r.title}": tables_of_run(r) for r in shown}
    grown = [r for r in shown if r.optional(tables.ABLATION_RESULTS)]
    drawn = {spec: found for spec, found in ((COMPUTE, shown), (GROWTH, grown)) if found}
    values = {
        "findings": findings,
        "trained": trained,
        "of_runs": of_runs,
        "weights": weights_note(shown),
        "provenance": provenance(everything, FILES),
    }
    made = [findings, trained, *(t for part in of_runs.values() for t in part)]
    return Page(PAGE, Path(__file__).with_name("page.md.j2"), made, drawn, values)
