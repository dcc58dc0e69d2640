"""``paper/depth.md``: scores against the extraction layer, from JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_utils.config import ROOT
from nla_utils.extensions.depth.tables import AV_CURVE, RESULTS, TEXT_CURVES, Columns, Depth, depth_table, depths
from nla_utils.paper.figures import NULL_GREY, colour, name_ends, style
from nla_utils.paper.pages import FigureSpec, Page, Table, provenance
from nla_utils.paper.results import COMMITTED, RunResults, find_results, weights_note
from nla_utils.scores import rows
from nla_utils.scores.rows import Row

PAGE = ROOT / "paper" / "depth.md"
# Room to the right of the last layer for the names of the curves.
ROOM = 1.5
READER_WIDTH = 2.5
# Of each curve of TEXT_CURVES, in its order.
LINES = ("--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-", "-")


def figure_7(everything: Sequence[RunResults]) -> Figure:
    """Against depth: centred scores, ‖μ‖, raw floor; one row for each backbone that was looked at by depth."""
    found = depths(everything)
    fig, axes = plt.subplots(len(found), 3, figsize=(15, 4.4 * len(found)), layout="constrained", squeeze=False)
    for panels, depth in zip(axes, found):
        shade, label = colour(depth.backbone), next(iter(depth.runs.values())).label
        _draw_scores(panels[0], depth, shade)
        style(panels[0], "layer", "centred fve_nrm", f"{label}: what text can reach")
        of_pool = {layer: columns("corrected", rows.CEILING_FILE) for layer, columns in depth.texts.items()}
        for ax, key, what in (
            (panels[1], "mu_norm", "‖μ‖, norm of the mean"), (panels[2], rows.FLOOR.raw, "raw score of unrelated pairs")
        ):  # fmt: skip
            ax.plot(list(of_pool), [c[key] for c in of_pool.values()], "o-", color=shade, markersize=4)
            style(ax, "layer", what)
        for ax in panels:
            ax.set_xticks([layer for layer in depth.texts if layer % 2])
    return fig


FIGURE = FigureSpec("fig7_depth", figure_7, "Against the extraction layer: what text can reach (lines), what the AV "
                    "reaches (points), ‖μ‖ and the raw floor. Bands and bars are 95 % intervals over targets.")  # fmt: skip


def _draw_scores(ax: Axes, depth: Depth, shade: str) -> None:
    """Draw curves and bands of text, named at their ends; points with intervals of the AV, named beside the last."""
    ends = {}
    for (label, protocol, row), line in zip(TEXT_CURVES, LINES):
        x, y, low, high = _series(depth.texts, protocol, row)
        color, width = NULL_GREY if row.control else shade, READER_WIDTH if protocol == "reader" else None
        ax.plot(x, y, linestyle=line, linewidth=width, color=color, label=label)
        ax.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        ends[label] = (y[-1], color)
    x, y, low, high = _series(depth.evaluated, "corrected", AV_CURVE)
    ax.errorbar(x, y, [y - low, high - y], fmt="o", color="black", markersize=4, label=AV_CURVE.label)
    ends[AV_CURVE.label] = (y[-1], "black")
    name_ends(ax, max(depth.texts), ends)
    ax.set_xlim(right=max(depth.texts) * ROOM)


def _series(by_layer: dict[int, Columns], protocol: str, row: Row) -> tuple[np.ndarray, ...]:
    """(layers, means, lower and upper ends of their intervals)."""
    columns = [of(protocol, row.file) for of in by_layer.values()]
    low, high = np.array([c["ci95"][row.cen] for c in columns]).T
    return np.array(list(by_layer)), np.array([c[row.cen] for c in columns]), low, high


def depth_page(roots: Iterable[Path] = (COMMITTED,)) -> Page:
    """The page of the results below ``roots``."""
    everything = find_results(roots)
    found = depths(everything)
    made = [Table(f"{d.title.replace(' · ', '-')}-depth", d.title, depth_table(d), of=d.label) for d in found]
    drawn = {FIGURE: everything} if found else {}
    values = {
        "tables": made, "weights": " ".join(weights_note(d.runs.values()) for d in found),
        "provenance": provenance(everything, (RESULTS,)),
    }  # fmt: skip
    return Page(PAGE, "depth.md.j2", made, drawn, values)
