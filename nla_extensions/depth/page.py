"""``paper/depth.md``: scores against the extraction layer, from JSON alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_extensions.depth.tables import AV_CURVE, RESULTS, TEXT_CURVES, Columns, Depth, depth_table, depths
from nla_utils import rows
from nla_utils.config import ROOT
from nla_utils.report.figures import NULL_GREY, WIDTH, colour, name_ends, shade, style, styled
from nla_utils.report.pages import FigureSpec, Page, Table, provenance
from nla_utils.report.results import COMMITTED, RunResults, find_results, weights_note
from nla_utils.rows import Row

PAGE = ROOT / "paper" / "depth.md"
# Of each curve of TEXT_CURVES, in its order: line, and how much lighter (or darker) than the backbone's colour it is.
LOOKS = (("v--", -0.6), ("s-.", -0.3), ("^:", 0.25), ("D-.", 0.5), ("o-", 0), ("-", 0))


@styled
def figure_7(everything: Sequence[RunResults]) -> Figure:
    """Against depth: centred scores, ‖μ‖, raw floor; two rows for each backbone that was looked at by depth."""
    found = depths(everything)
    fig = plt.figure(figsize=(WIDTH, 6.4 * len(found)), layout="constrained")
    names = [f"{part} {i}" for i in range(len(found)) for part in ("scores", "norm", "floor")]
    grid = [row for i in range(0, len(names), 3) for row in ([names[i]] * 2, names[i + 1 : i + 3])]
    axes = fig.subplot_mosaic(grid, height_ratios=[5, 3] * len(found))
    for i, depth in enumerate(found):
        color, label = colour(depth.backbone), next(iter(depth.runs.values())).label
        scores, norm, floor = (axes[f"{part} {i}"] for part in ("scores", "norm", "floor"))
        of_pool = {layer: columns("corrected", rows.CEILING_FILE) for layer, columns in depth.texts.items()}
        norm.plot(list(of_pool), [c["mu_norm"] for c in of_pool.values()], "o-", color=color)
        x, y, low, high = _series(depth.texts, "corrected", replace(rows.FLOOR, key=rows.FLOOR.raw))
        floor.errorbar(x, y, [y - low, high - y], fmt="o-", color=color, capsize=2)
        style(norm, "layer", "‖μ‖", "norm of the mean")
        style(floor, "layer", "raw fve_nrm", "unrelated pairs")
        style(scores, "layer", "centred fve_nrm", label)
        for ax in (scores, norm, floor):
            ax.set_xticks([layer for layer in depth.texts if layer % 2])
        _draw_scores(scores, depth, color)
    return fig


FIGURE = FigureSpec(
    "fig7_depth",
    figure_7,
    "Against the extraction layer: what text can reach (lines), what the AV "
    "reaches (black points), ‖μ‖ and the raw floor. Bands and bars are 95 % intervals over targets; ‖μ‖ has "
    "none.",
)


def _draw_scores(ax: Axes, depth: Depth, shade_of: str) -> None:
    """Draw curves and bands of text, named at their ends; points with intervals of the AV, named with the last."""
    ends = {}
    for (label, protocol, row), (line, light) in zip(TEXT_CURVES, LOOKS):
        x, y, low, high = _series(depth.texts, protocol, row)
        color = NULL_GREY if row.control else shade(shade_of, light)
        ax.plot(x, y, line, linewidth=2.5 if protocol == "reader" else 1.2, color=color, markersize=3)
        ax.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        ends[label] = (y[-1], color)
    x, y, low, high = _series(depth.evaluated, "corrected", AV_CURVE)
    ax.errorbar(x, y, [y - low, high - y], fmt="o", color="black")
    ends[AV_CURVE.label] = (y[-1], "black")
    name_ends(ax, max(depth.texts), ends)


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
        "tables": made,
        "weights": " ".join(weights_note(d.runs.values()) for d in found),
        "provenance": provenance(everything, (RESULTS,)),
    }
    return Page(PAGE, Path(__file__).with_name("page.md.j2"), made, drawn, values)
