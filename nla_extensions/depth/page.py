"""``paper/depth.md``: runs that differ in their layer, and what text can reach at every layer, from JSON alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Optional, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_extensions.pages import page
from nla_extensions.tail_reader.page import RESULTS as READER
from nla_extensions.tail_reader.page import reader_column
from nla_utils import rows
from nla_utils.report.figures import NULL_GREY, WIDTH, colour, measured, name_ends, shade, style, styled
from nla_utils.report.pages import FigureSpec, Page, Table
from nla_utils.report.results import COMMITTED, RunResults, find_results, group
from nla_utils.report.tables import number, with_interval
from nla_utils.rows import Row

# The results file of `nla depth` and notebook 08.
RESULTS = "depth"
# What text can reach needs no AV, nor does the reader need training: label, protocol, row, and how it is drawn: its
# line, and how much lighter (or darker) than the backbone's colour it is.
TEXT_CURVES = (
    (rows.TAILS[8].label, "corrected", rows.TAILS[8], "v--", -0.6),
    (rows.RETRIEVAL.label, "corrected", rows.RETRIEVAL, "s-.", -0.3),
    ("replay, as published", "published", rows.REPLAY, "^:", 0.25),
    (rows.PARAPHRASE.label, "corrected", rows.PARAPHRASE, "D-.", 0.5),
    ("tail reader, greedy", "reader", rows.GREEDY, "o-", 0),
    (rows.UNRELATED.label, "corrected", rows.UNRELATED, "-", 0),
)
AV_CURVE = Row("AV, best-of-K", rows.BEST.key)
# What of the AV's score is owed to v.
AV_DIFFERENCES = (
    Row("AV − unrelated texts, best-of-K", rows.BEST_MINUS_UNRELATED.key),
    Row("AV − AV of other targets, best-of-K", rows.BEST_MINUS_OTHERS.key),
    Row("AV − AV of other targets, greedy", rows.GREEDY_MINUS_OTHERS.key),
)
# Columns of numbers by protocol, ``reader`` for the tail reader's.
Columns = dict[str, dict]


@dataclass(frozen=True)
class Depth:
    """Results of several layers that are otherwise alike, and columns of what text can reach, by layer: those of the
    runs, or, if text alone was measured, of more layers, from sequences of its own ``seed``."""

    runs: dict[int, RunResults]
    texts: dict[int, Columns]
    seed: Optional[int] = None

    @property
    def first(self) -> RunResults:
        return next(iter(self.runs.values()))

    @property
    def title(self) -> str:
        """The backbone, and what the names of the runs have in common."""
        parts = [set(r.profile.split("-")) for r in self.runs.values()]
        shared = [p for p in self.first.profile.split("-") if all(p in own for own in parts)]
        return f"{self.first.backbone} · {'-'.join(shared)}"

    @property
    def sequences(self) -> dict[int, str]:
        """By layer where an AV was trained: whether from the sequences that text alone was measured on."""
        return {layer: "the same" if r.seed == self.seed else f"seed {r.seed}" for layer, r in self.runs.items()}


def _columns(results: RunResults) -> Columns:
    found = {}
    for protocol in ("published", "corrected"):
        ceilings, column = (results.column(file, protocol) for file in (rows.CEILING_FILE, rows.EVALUATION_FILE))
        found[protocol] = {**ceilings, **column, "ci95": ceilings["ci95"] | column["ci95"]}
    return found | ({"reader": reader_column(results)} if results.optional(READER) else {})


def depths(everything: Sequence[RunResults]) -> list[Depth]:
    """Every set of results that says something about depth: of several layers, or with a record of text alone.

    Beside a record are runs of any seed, of each layer the one that shares the record's where there is one.
    """
    recorded = {(r.backbone, r.family): record for r in everything if (record := r.optional(RESULTS))}
    found = []
    for family, record in sorted(recorded.items(), key=lambda item: item[0]):
        seed, alike = record["identity"]["seed"], [r for r in everything if (r.backbone, r.family) == family]
        # Of each layer the last one counts.
        alike.sort(key=lambda r: (r.layer, r.seed == seed, -r.seed))
        texts = dict(sorted((int(layer), columns) for layer, columns in record["layers"].items()))
        found.append(Depth({r.layer: r for r in alike}, texts, seed))
    others = [r for r in everything if (r.backbone, r.family) not in recorded]
    swept = group(others, lambda r: (r.backbone, r.family, r.seed), lambda r: r.layer, 2)
    return found + [Depth(runs, {layer: _columns(r) for layer, r in runs.items()}) for runs in swept]


def depth_table(depth: Depth) -> pd.DataFrame:
    """One row a layer: ‖μ‖, the raw floor, what text can reach there, and what an AV reaches where one was trained."""
    table = []
    for layer, columns in depth.texts.items():
        of_pool = columns["corrected"]
        row = {"layer": layer, "‖μ‖": number(of_pool["mu_norm"], 1), "raw floor": number(of_pool[rows.FLOOR.raw])}
        row |= {label: with_interval(columns[p], r.cen) for label, p, r, *_ in TEXT_CURVES}
        row[rows.PARAPHRASE_MINUS_UNRELATED.label] = with_interval(of_pool, rows.PARAPHRASE_MINUS_UNRELATED.cen)
        row["reader − NN-retrieval"] = with_interval(columns["reader"], rows.GREEDY_MINUS_RETRIEVAL.cen)
        if layer in depth.runs:
            of_av = depth.runs[layer].column(rows.EVALUATION_FILE, "corrected")
            row |= {r.label: with_interval(of_av, r.cen) for r in (AV_CURVE, *AV_DIFFERENCES)}
            row["AV's sequences"] = depth.sequences[layer]
        table.append(row)
    return pd.DataFrame(table).set_index("layer").fillna("–")


@styled
def figure_7(everything: Sequence[RunResults]) -> Figure:
    """Against depth: centred scores, ‖μ‖, raw floor; two rows for each backbone that was looked at by depth."""
    found = depths(everything)
    fig = plt.figure(figsize=(WIDTH, 6.4 * len(found)), layout="constrained")
    grid = [row for i in range(len(found)) for row in ([f"scores {i}"] * 2, [f"norm {i}", f"floor {i}"])]
    axes = fig.subplot_mosaic(grid, height_ratios=[5, 3] * len(found))
    for i, depth in enumerate(found):
        color = colour(depth.first.backbone)
        scores, norm, floor = (axes[f"{part} {i}"] for part in ("scores", "norm", "floor"))
        mu = {layer: columns["corrected"]["mu_norm"] for layer, columns in depth.texts.items()}
        norm.plot(list(mu), list(mu.values()), "o-", color=color)
        layers, y, error = _series(depth.texts, "corrected", rows.FLOOR.raw)
        floor.errorbar(layers, y, error, fmt="o-", color=color, capsize=2)
        style(norm, "layer", "‖μ‖", "norm of the mean")
        style(floor, "layer", "raw fve_nrm", "unrelated pairs")
        style(scores, "layer", "centred fve_nrm", depth.first.label)
        for ax in (scores, norm, floor):
            ax.set_xticks([layer for layer in depth.texts if layer % 2])
        _draw_scores(scores, depth, color)
    return fig


def _draw_scores(ax: Axes, depth: Depth, shade_of: str) -> None:
    """Draw curves and bands of text, named at their ends; points with intervals of the AV, named with the last."""
    ends = {}
    for label, protocol, row, line, light in TEXT_CURVES:
        layers, y, error = _series(depth.texts, protocol, row.cen)
        color = NULL_GREY if row.control else shade(shade_of, light)
        ax.plot(layers, y, line, linewidth=2.5 if protocol == "reader" else 1.2, color=color, markersize=3)
        ax.fill_between(layers, y - error[0], y + error[1], color=color, alpha=0.12, linewidth=0)
        ends[label] = (y[-1], color)
    trained = {layer: {"corrected": r.column(AV_CURVE.file, "corrected")} for layer, r in depth.runs.items()}
    layers, y, error = _series(trained, "corrected", AV_CURVE.cen)
    ax.errorbar(layers, y, error, fmt="o", color="black")
    ends[AV_CURVE.label] = (y[-1], "black")
    ax.figure.draw_without_rendering()
    name_ends(ax, max(depth.texts), ends)


def _series(by_layer: dict[int, Columns], protocol: str, key: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """(layers, means, lengths of their intervals' lower and upper parts)."""
    return list(by_layer), *measured([(columns[protocol], key) for columns in by_layer.values()])


FIGURE = FigureSpec(
    "fig7_depth",
    figure_7,
    "Against the extraction layer: what text can reach (lines), what the AV reaches (black points), ‖μ‖ and the raw "
    "floor. Bands and bars are 95 % intervals over targets; ‖μ‖ has none.",
)


def depth_page(roots: Iterable[Path] = (COMMITTED,)) -> Page:
    """The page of the results below ``roots``."""
    everything = find_results(roots)
    found = depths(everything)
    made = [Table(f"{d.title.replace(' · ', '-')}-depth", d.title, depth_table(d), of=d.first.label) for d in found]
    shown = [r for d in found for r in d.runs.values()]
    return page("depth", everything, (RESULTS,), shown, {FIGURE: everything if found else []}, {}, {"": made})
