"""How figures look: one style whatever a machine's matplotlibrc says, one colour per backbone, labels that do not touch."""

from __future__ import annotations

from typing import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation
from scipy.optimize import isotonic_regression

# The width of a page's text, in inches. At half of it, a column of print, the smallest letters can still be read.
WIDTH = 6.4
SMALL = 8
# A decorator and a context: what is drawn in it looks the same on every machine.
styled = plt.style.context([
    "default",
    {"font.size": 9, "axes.titlesize": 9, "xtick.labelsize": SMALL, "ytick.labelsize": SMALL, "legend.fontsize": SMALL,
     "legend.frameon": False, "lines.markersize": 4},
])  # fmt: skip
# Okabe-Ito, and two of Tol's palette: told apart by colour-blind readers.
COLOURS = {
    "qwen25_7b": "#0072B2",
    "llama32_3b": "#E69F00",
    "gemma2_2b": "#009E73",
    "gpt_oss_20b": "#56B4E9",
    "gemma4_31b": "#882255",
    "gemma3-270m": "#D55E00",
    "smollm2-135m": "#CC79A7",
    "qwen25-coder-0.5b": "#332288",
}
SPARE_COLOUR = "#999933"
# In grey print two backbones of one panel are told apart by their marks.
MARKS = {"smollm2-135m": "s", "qwen25-coder-0.5b": "^"}
NULL_GREY = "#666666"
# Where a label may be, in points from its mark: the first that touches nothing is taken.
AROUND = tuple(
    (r * dx, r * dy) for r in (6, 12, 20) for dx, dy in ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
)


def colour(backbone: str) -> str:
    return COLOURS.get(backbone, SPARE_COLOUR)


def mark(backbone: str) -> str:
    return MARKS.get(backbone, "o")


def ink(color: str) -> tuple[float, ...]:
    """The colour, dark enough for letters."""
    return shade(color, -0.28)


def shade(color: str, light: float) -> tuple[float, ...]:
    """The colour mixed with white, or with black for a negative ``light``, in [-1, 1]."""
    return tuple((1 - abs(light)) * c + max(light, 0) for c in to_rgb(color))


def style(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc="left")
    ax.spines[["top", "right"]].set_visible(False)


def log2_k_axis(ax: Axes, ks: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ks), [str(k) for k in ks])
    ax.minorticks_off()


def same_limits(axes: Sequence[Axes]) -> None:
    """Give panels that are compared one y range."""
    bottoms, tops = zip(*(ax.get_ylim() for ax in axes))
    for ax in axes:
        ax.set_ylim(min(bottoms), max(tops))


def apart(heights: Sequence[float], gap: float) -> np.ndarray:
    """The heights, moved as little as possible (least squares) so that no two are closer than ``gap``."""
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(order))
    placed = np.empty(len(order))
    placed[order] = isotonic_regression(np.asarray(heights, dtype=float)[order] - steps).x + steps
    return placed


def name_ends(ax: Axes, x: float, ends: Mapping[str, tuple[float, str]]) -> None:
    """Labels to the right of ``x``, ``{label: (height, colour)}``, moved apart where they would touch.

    Called when the axes have their limits: heights are compared on the page.
    """
    ax.figure.draw_without_rendering()
    points = 72 / ax.figure.dpi
    heights = np.array([ax.transData.transform((x, y))[1] for y, _ in ends.values()]) * points
    for (label, (y, color)), old, new in zip(ends.items(), heights, apart(heights, 1.3 * SMALL)):
        ax.annotate(
            label, (x, y), (14, new - old), textcoords="offset points", fontsize=SMALL, va="center", color=ink(color),
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": color, "shrinkA": 0, "shrinkB": 3}, annotation_clip=False,
        )  # fmt: skip


def name_points(ax: Axes, labels: Sequence[tuple[str, float, float, str]]) -> None:
    """Labels next to points, ``(label, x, y, colour)``, each where it touches neither a line, a mark nor another label.

    Called when the axes have their limits and all else is drawn.
    """
    ax.figure.draw_without_rendering()
    bars = [path.vertices for c in ax.collections if isinstance(c, LineCollection) for path in c.get_paths()]
    lines = [line.get_transform().transform(line.get_xydata()) for line in ax.lines]
    drawn = np.concatenate([_along(line) for line in [*lines, *map(ax.transData.transform, bars)]])
    inside, taken = ax.get_window_extent(), [t.get_window_extent() for t in ax.texts]
    for label, x, y, color in labels:
        for offset in AROUND:
            note = _note(ax, label, (x, y), offset, color)
            box = note.get_window_extent().padded(2)
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not box.count_contains(drawn) and not box.count_overlaps(taken):
                break
            note.remove()
        else:
            note = _note(ax, label, (x, y), AROUND[0], color)
        taken.append(note.get_window_extent())


def _note(ax: Axes, label: str, point: tuple[float, float], offset: tuple[float, float], color: str) -> Annotation:
    sides = {1: ("left", "bottom"), 0: ("center", "center"), -1: ("right", "top")}
    return ax.annotate(
        label, point, offset, textcoords="offset points", fontsize=SMALL, color=ink(color),
        ha=sides[np.sign(offset[0])][0], va=sides[np.sign(offset[1])][1],
    )  # fmt: skip


def _along(vertices: np.ndarray, step: float = 3.0) -> np.ndarray:
    """Points every ``step`` pixels along a line of vertices (n, 2)."""
    pieces = [
        np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / step))) for a, b in zip(vertices[:-1], vertices[1:])
    ]
    return np.concatenate([vertices, *pieces])
