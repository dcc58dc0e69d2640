"""The figures of the section and its appendix: intervals drawn, lines named at their ends."""

from __future__ import annotations

import textwrap
from itertools import zip_longest
from typing import TYPE_CHECKING, Mapping, Optional, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from nla_utils import rows
from nla_utils.config import N_PARAPHRASES
from nla_utils.metrics import fve, fve_matrix, limits_of_bits
from nla_utils.protocol import SLIPS, Protocol, ablation_steps
from nla_utils.report.results import (
    BACKBONES,
    FAMILIES,
    PROTOCOLS,
    SECTION_11,
    TITLES,
    RunResults,
    by_family,
    k_curve,
    largest,
    null_at,
    published,
    published_curves,
)
from nla_utils.report.tables import with_interval
from nla_utils.rows import Row
from nla_utils.scores import Column

if TYPE_CHECKING:
    from nla_utils.encoding import Texts
    from nla_utils.lm.backbone import Backbone
    from nla_utils.targets import Targets


# The width of a page's text, in inches. At half of it, a column of print, the smallest letters can still be read.
WIDTH = 6.4
SMALL = 8
# A decorator and a context: what is drawn in it looks the same on every machine.
styled = plt.style.context(
    [
        "default",
        {
            "font.size": 9,
            "axes.titlesize": 9,
            "xtick.labelsize": SMALL,
            "ytick.labelsize": SMALL,
            "legend.fontsize": SMALL,
            "legend.frameon": False,
            "lines.markersize": 4,
        },
    ]
)
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
SIDES = ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
AROUND = tuple((r * dx, r * dy) for r in (6, 12, 20) for dx, dy in SIDES)


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

    Called when the figure is laid out, by ``draw_without_rendering``: heights are compared on the page.
    """
    points = 72 / ax.figure.dpi
    heights = np.array([ax.transData.transform((x, y))[1] for y, _ in ends.values()]) * points
    for (label, (y, color)), old, new in zip(ends.items(), heights, apart(heights, 1.3 * SMALL)):
        ax.annotate(
            label,
            (x, y),
            (14, new - old),
            textcoords="offset points",
            fontsize=SMALL,
            va="center",
            color=ink(color),
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": color, "shrinkA": 0, "shrinkB": 3},
            annotation_clip=False,
        )


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
        note = ax.annotate(label, (x, y), AROUND[0], textcoords="offset points", fontsize=SMALL, color=ink(color))
        # Where nothing fits, the first place.
        for dx, dy in (*AROUND, AROUND[0]):
            sides = {"ha": ("center", "left", "right")[np.sign(dx)], "va": ("center", "bottom", "top")[np.sign(dy)]}
            note.set(position=(dx, dy), **sides)
            box = note.get_window_extent().padded(2)
            fits = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if fits and not box.count_contains(drawn) and not box.count_overlaps(taken):
                break
        taken.append(note.get_window_extent())


def _along(vertices: np.ndarray, step: float = 3.0) -> np.ndarray:
    """Points every ``step`` pixels along a line of vertices (n, 2)."""
    pieces = [np.linspace(a, b, max(2, int(np.hypot(*(b - a)) / step))) for a, b in zip(vertices[:-1], vertices[1:])]
    return np.concatenate([vertices, *pieces])


def measured(figures: Sequence[tuple[dict, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Values (n,) of ``(column, key)`` pairs, and the lengths (2, n) of their intervals' lower and upper parts."""
    y = np.array([column[key] for column, key in figures], dtype=float)
    return y, np.abs(np.array([column["ci95"][key] for column, key in figures], dtype=float).T - y)


# What notebooks show of one run

PLOT_WIDTH = 160


def texts_table(backbone: Backbone, texts: Mapping[str, Sequence[int]]) -> str:
    """Token sequences as text by label, one line each; of a long one the end, since v is taken at the last token."""
    width, shown = max(map(len, texts)), []
    for label, ids in texts.items():
        line = " ".join(backbone.decode_text(ids).split())
        if len(line) > PLOT_WIDTH:
            line = "…" + line[1 - PLOT_WIDTH :]
        shown.append(f"{label:<{width}}  {line}")
    return "\n".join(shown)


def verbalizations(
    backbone: Backbone,
    targets: Targets,
    rollouts: Texts,
    protocol: Protocol,
    chosen: Optional[Sequence[int]] = None,
    best: int = 0,
    worst: int = 0,
) -> str:
    """Source, best rollout and greedy with their scores: of the ``chosen`` targets, or of the ``best`` and ``worst``
    by their best rollout."""
    score_MK = fve(rollouts.read_as(protocol), targets.v[rollouts.rows][:, None], targets.mu)
    order = np.argsort(-score_MK[:, 1:].max(axis=1))
    blocks = []
    for m in chosen if chosen is not None else [*order[:best], *order[len(order) - worst :]]:
        k = 1 + int(score_MK[m, 1:].argmax())
        shown = {
            "source": targets.sequence(rollouts.rows[m]),
            f"best of K {score_MK[m, k]:.3f}": rollouts.sequence(m, k),
            f"greedy    {score_MK[m, 0]:.3f}": rollouts.sequence(m, 0),
        }
        blocks.append(texts_table(backbone, shown))
    return "\n\n".join(blocks)


def table(rows: Sequence[Row], columns: Mapping[str, dict], kind: str = "cen") -> pd.DataFrame:
    """Rows of several columns, each value with its interval."""
    found = {name: {row.title: with_interval(c, row.at(kind)) for row in rows} for name, c in columns.items()}
    return pd.DataFrame(found)


def ablation_table(steps: dict, keys: Sequence[str]) -> pd.DataFrame:
    """Value of each quantity after each correction, ``in_order`` and ``alone``, and its change from the step
    before (in order) or from ``published`` (alone)."""
    found = {}
    for way, columns in steps.items():
        before = columns["published"]
        for slip, column in columns.items():
            found[way, slip] = {
                k: "–" if None in (column[k], before[k]) else f"{column[k]:.3f} ({column[k] - before[k]:+.3f})"
                for k in keys
            }
            before = column if way == "in_order" else before
    return pd.DataFrame(found).T


def training_facts(training: dict) -> pd.Series:
    """Loss at the beginning and the end, and what v saves in nats a token at the step that was kept; nothing of an AV
    that was not trained here."""
    if not training["loss"]:
        return pd.Series(dtype=float)
    first, _, last = np.array_split(training["loss"], 3)
    kept = next(r for r in training["validation"] if r["step"] == training["best_step"])
    saved = {f"nats saved, {v} v": kept[f"nats_{v}"] - kept["nats_own"] for v in ("other", "mean")}
    return pd.Series({"loss, first third": first.mean(), "loss, last third": last.mean(), **saved}).round(3)


def panels(n: int, width: float, height: float, **shared: bool) -> tuple[Figure, list[Axes]]:
    """A figure of ``n`` axes side by side, in inches."""
    fig, axes = plt.subplots(1, n, figsize=(width, height), layout="constrained", squeeze=False, **shared)
    return fig, list(axes[0])


def most(values: Sequence[float]) -> tuple[float, float]:
    """The range that an axis shows: the middle 99 % of the values, a tenth wider, so that no outlier stretches it."""
    low, high = np.nanpercentile(values, [0.5, 99.5])
    room = 0.1 * (high - low) or 0.5
    return low - room, high + room


@styled
def lengths_and_norms(targets: Targets, backbone: str) -> Figure:
    """Histograms of sequence length and of ‖v‖."""
    fig, (left, right) = panels(2, 8, 2.8)
    left.hist(targets.lengths, bins=np.arange(targets.ids.shape[1] + 2) - 0.5, color=colour(backbone), log=True)
    style(left, "sequence length (tokens)", "sequences (log)")
    norms, mu = np.linalg.norm(targets.v, axis=1), np.linalg.norm(targets.mu)
    low, high = most(norms)
    outside = int(((norms < low) | (norms > high)).sum())
    right.hist(norms, bins=np.linspace(low, high, 41), color=colour(backbone))
    right.axvline(mu, color="black", linestyle="--", label="‖μ‖")
    right.legend()
    style(right, "‖v‖", "targets", f"{outside} of {len(norms)} lie beyond the axis")
    return fig


def cosine_histograms(raw: np.ndarray, centred: np.ndarray, backbone: str) -> Figure:
    """Cosines of unrelated pairs: raw they crowd far from 0, centred they sit around 0."""
    shown, alpha = {"raw": raw, "centred": centred}, 0.7
    return _two_histograms(shown, np.linspace(-1, 1, 81), backbone, ("cosine of two unrelated targets", "pairs"), alpha)


def score_histogram(targets: Targets, rollouts: Texts, protocol: Protocol, backbone: str) -> Figure:
    """Centred scores of all rollouts against their own target and against the other targets."""
    v, h = targets.v[rollouts.rows], rollouts.read_as(protocol)
    other = [fve_matrix(np.delete(v, m, axis=0), h[m], targets.mu).ravel() for m in range(len(v))]
    shown = {"another target": np.concatenate(other), "its own target": fve(h, v[:, None], targets.mu).ravel()}
    words = "centred fve_nrm of a rollout", "density", protocol.name
    return _two_histograms(shown, np.linspace(0, 1, 61), backbone, words, alpha=0.6, density=True)


@styled
def _two_histograms(
    shown: Mapping[str, np.ndarray], bins: np.ndarray, backbone: str, words: Sequence[str], alpha: float, density=False
) -> Figure:
    """The first one in grey."""
    fig, (ax,) = panels(1, 6, 2.8)
    for (label, values), color in zip(shown.items(), (NULL_GREY, colour(backbone))):
        ax.hist(values, bins=bins, density=density, color=color, alpha=alpha, label=label)
    ax.legend()
    style(ax, *words)
    return fig


@styled
def spearman_histogram(columns: Mapping[str, Column], backbone: str) -> Figure:
    """Distribution over targets of Spearman(mean log-probability, oracle score)."""
    fig, axes = panels(2, 8, 2.6, sharey=True)
    for ax, (protocol, column) in zip(axes, columns.items()):
        values = column.per_target[rows.SPEARMAN.cen]
        ax.hist(values[np.isfinite(values)], bins=np.linspace(-1, 1, 21), color=colour(backbone))
        ax.axvline(np.nanmean(values), color="black", linestyle="--", linewidth=1)
        style(ax, "Spearman per target", "targets", f"{protocol}: mean {np.nanmean(values):+.3f}")
    return fig


@styled
def training_curves(training: dict, backbone: str) -> Figure:
    """Loss by step, raw and as the mean of the steps round each, and both validation criteria."""
    fig, (left, right) = panels(2, 8, 2.8)
    c = colour(backbone)
    loss, steps = np.array(training["loss"]), np.arange(1, len(training["loss"]) + 1)
    # A released AV was not trained here.
    if len(loss):
        window = min(len(loss), max(5, len(loss) // 40))
        smooth = np.convolve(loss, np.ones(window), "same") / np.convolve(np.ones(len(loss)), np.ones(window), "same")
        left.plot(steps, loss, color=shade(c, 0.6), linewidth=0.5, label="each step")
        left.plot(steps, smooth, color=shade(c, -0.3), label=f"mean of {window} steps")
        left.set_ylim(*most(loss))
        left.legend()
    style(left, "step", "cross-entropy (nats / token)")
    criteria = (("fve_nrm", "raw, no BOS (kept by this)", "o-"), ("fve_nrm_cen", "centred, with BOS", "s--"))
    for key, label, line in criteria:
        points = {r["step"]: r[key] for r in training["validation"]}
        right.plot(list(points), list(points.values()), line, color=c, label=label)
    right.legend()
    style(right, "step", "validation fve_nrm, greedy")
    return fig


def source_loss_curves(training: dict, backbone: str) -> Figure:
    """What v saves the AV in nats a token of the source's text, by training step: against another v, and against μ."""
    validation = training["validation"]
    nats = {name: [r[f"nats_{name}"] for r in validation] for name in ("own", "other", "mean")}
    return _saved([r["step"] for r in validation], nats, backbone, "o-", "step", "nats / token")


def source_loss_by_position(column: dict, backbone: str) -> Figure:
    """What v saves at each token of the source's text."""
    nats = column["nats_by_position"]
    return _saved(range(1, len(nats["own"]) + 1), nats, backbone, "-", "token of the source", "nats")


@styled
def _saved(x: Sequence[int], nats: Mapping[str, Sequence[float]], backbone: str, line: str, x_label: str, unit: str):
    fig, (ax,) = panels(1, 7, 2.8)
    nats = {name: np.array(values, dtype=float) for name, values in nats.items()}
    for name, label, color in (("other", "another target's v", colour(backbone)), ("mean", "μ", NULL_GREY)):
        ax.plot(x, nats[name] - nats["own"], line, color=color, label=f"instead of {label}")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.legend(framealpha=1, edgecolor="none", fontsize=8)
    style(ax, x_label, f"saved by its own v\n({unit})")
    return fig


@styled
def bars(rows: Sequence[Row], column: dict, backbone: str, x: str, kind: str = "cen") -> Figure:
    """Rows of a column as points with intervals; controls are grey squares."""
    fig, (ax,) = panels(1, 7, 0.32 * len(rows) + 0.9)
    for i, row in enumerate(reversed(rows)):
        value, (low, high) = column[row.at(kind)], column["ci95"][row.at(kind)]
        if value is None:
            continue  # released vectors without texts have no replay and no paraphrase
        color = NULL_GREY if row.control else colour(backbone)
        ax.plot([low, high], [i, i], color=color, linewidth=2)
        ax.plot(value, i, "s" if row.control else "o", color=color)
        ax.annotate(f"{value:.3f}", (high, i), textcoords="offset points", xytext=(5, -3), fontsize=8)
    ax.set_yticks(range(len(rows)), [row.title for row in reversed(rows)], fontsize=8)
    ax.margins(x=0.12)
    style(ax, x, "")
    return fig


@styled
def k_curves(columns: Mapping[str, Column], scales: Mapping[str, dict], backbone: str, of: str = "AV") -> Figure:
    """Both protocols' K-curves with their nulls, floors and ceilings; ``of`` names whose texts they are."""
    fig, axes = panels(2, 9, 3.8)
    for ax, (protocol, column) in zip(axes, columns.items()):
        k_curve_panel(ax, column.to_json(), scales[protocol], backbone, f"{protocol}, M = {column.n}", of)
    same_limits(axes)
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return fig


# The figures of pages

PUBLISHED_KS = (1, 2, 4, 8, 16, 32, 64)


def in_two_lines(results: RunResults) -> str:
    """What a figure calls the run, for a panel of half a page's width."""
    return f"{results.spec.shown}\n{results.size}"


def draw_curve(
    ax: Axes, column: dict, row: Row, color: str, line: str = "o-", label: str = "", width: float = 1.5
) -> None:
    """A K-curve of our results with its 95 % band."""
    curve, ends = column[row.cen], column["ci95"][row.cen]
    ks = [int(k) for k in curve]
    # What is not known is null in JSON and a gap in the curve.
    low, high = np.array([ends[k] for k in curve], dtype=float).T
    means = np.array(list(curve.values()), dtype=float)
    ax.plot(ks, means, line, color=color, label=label, markersize=3, linewidth=width)
    ax.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)


def draw_curve_and_nulls(ax: Axes, column: dict, backbone: str, label: str = "") -> None:
    """The AV's curve over both nulls, which may coincide: a wide pale line, and dots that are seen on it."""
    draw_curve(ax, column, rows.CURVE_UNRELATED, "#bbbbbb", "-", rows.CURVE_UNRELATED.title, 4)
    draw_curve(ax, column, rows.CURVE_OTHERS, "black", ":", rows.CURVE_OTHERS.title)
    draw_curve(ax, column, rows.CURVE, colour(backbone), f"{mark(backbone)}-", label)
    log2_k_axis(ax, column["ks"])


def published_k_curves(ax: Axes, name: str) -> dict[str, tuple[float, str]]:
    """Draw what is published of best-of-K on a backbone, with the null that its own rows give and later ports of its
    family; one of no family is with §11's. Returns the labels of the lines' ends."""
    (own, *ports) = (c for c in published_curves() if FAMILIES.get(c.family, SECTION_11) == name)
    curve, color, record = k_curve(name), colour(name), published(name)
    headline, drawn = record["centred_eval"], record["k_curve"]
    null = [null_at(own.null, k) for k in PUBLISHED_KS]
    ax.plot(PUBLISHED_KS, null, "--", color="#bbbbbb", linewidth=3)
    ax.plot(list(curve), list(curve.values()), "o-", color=color)
    ax.plot(own.k, own.best[own.k], "D", color=color, markeredgecolor="black", markersize=6)
    of = f", M = {headline['M']}" if headline["M"] != drawn["M"] else ""
    ends = {f"AV, headline{of}": (own.best[own.k], color), "unrelated texts": (null[-1], NULL_GREY)}
    if max(curve) == own.k:
        ends[f"AV, {drawn['checkpoint']} checkpoint"] = (curve[own.k], color)
    for port in ports:
        shade_of = colour("gemma4_31b" if port.family == "Gemma" else "gpt_oss_20b")
        look = {"color": shade_of, "markerfacecolor": shade_of if len(port.best) > 1 else "white"}
        ax.plot(list(port.best), list(port.best.values()), "^-" if len(port.best) > 2 else "^", **look)
        ends[port.title] = (port.best[port.k], shade_of)
    levels = {f"{N_PARAPHRASES} paraphrases": record["ceilings"]["paraphrase_best_of_8"]}
    for label, level in (levels | {"nearest stored": headline["nn_retrieval"]}).items():
        ax.hlines(level["cen"], 1, PUBLISHED_KS[-1], color="black", linewidth=0.7)
        ends[label] = (level["cen"], "black")
    style(ax, "", "centred fve_nrm", f"{TITLES[name]}\npublished")
    return ends


@styled
def figure_1(everything: Sequence[RunResults]) -> Figure:
    """K-curves in one look, family by family: published on the left, on the right each backbone's largest run,
    corrected, with its nulls."""
    pairs = [pair for name, runs in by_family(largest(everything)).items() for pair in zip_longest([name], runs)]
    fig = plt.figure(figsize=(WIDTH, 0.4 + 2.45 * len(pairs)), layout="constrained")
    drawn = {}
    for (left, right), (name, results) in zip(fig.subplots(len(pairs), 2, squeeze=False), pairs):
        for ax, what, draw in ((left, name, published_k_curves), (right, results, _corrected_panel)):
            ax.set_axis_off() if what is None else drawn.update({ax: draw(ax, what)})
    same_limits(list(drawn))
    for ax in drawn:
        log2_k_axis(ax, PUBLISHED_KS)
        ax.set_xlim(0.9, 75)
    fig.supxlabel("K (texts to choose from, log₂)", fontsize=9)
    # Last, since labels are placed on the page as it is then laid out.
    fig.draw_without_rendering()
    for ax, ends in drawn.items():
        name_ends(ax, 1.17 * max(max(line.get_xdata()) for line in ax.lines), ends)
    return fig


@styled
def figure_bits(everything: Sequence[RunResults]) -> Figure:
    """Bits against K, published and ours, family by family: of each backbone the largest run, and those that have
    intervals. A port of no family is with §11's."""
    shown = largest(everything)
    shown += [r for r in everything if r not in shown and r.bits_curve[1] and not r.corpus]
    families = by_family(shown)
    fig, axes = plt.subplots(len(families), 1, figsize=(WIDTH, 0.4 + 2.3 * len(families)), layout="constrained")
    ends: dict[Axes, dict[str, tuple[float, str]]] = {ax: {} for ax in axes}
    pools = {ax: {r.bits_curve[2] for r in runs} for ax, runs in zip(axes, families.values())}
    for ax, (name, runs) in zip(axes, families.items()):
        for c in (c for c in published_curves() if FAMILIES.get(c.family, SECTION_11) == name):
            color, pool = colour(FAMILIES.get(c.family, "gpt_oss_20b")), max(c.null)
            pools[ax].add(pool)
            above = {k: b for k, b in c.bits.items() if b >= limits_of_bits(k, pool)[1] - 1e-9}
            if c.at_least:
                ax.plot(c.k, c.bits[c.k], "v", color=color, markerfacecolor="white")
            else:
                ax.plot(list(c.bits), list(c.bits.values()), "D--", color=color, linewidth=1)
                ax.plot(list(above), [b + 0.25 for b in above.values()], "^", color=color, markersize=6)
            ends[ax][f"{c.title}{' (at most)' if c.at_least else ''}"] = (c.bits[c.k], color)
        for r in runs:
            (found, intervals, _), color = r.bits_curve, colour(FAMILIES.get(r.spec.family, ""))
            ax.plot(list(found), list(found.values()), f"{mark(r.backbone)}{'-' if intervals else ':'}", color=color)
            if intervals:
                band = np.array(list(intervals.values())).T
                ax.fill_between(list(intervals), *band, color=color, alpha=0.12, linewidth=0)
            ends[ax][f"{r.name}, {r.size}"] = (found[max(found)], color)
        ax.axhline(0, color="black", linewidth=0.8)
        style(ax, "", "bits at K", str(next((f for f, of in FAMILIES.items() if of == name), "other families")))
        log2_k_axis(ax, PUBLISHED_KS)
        ax.set_xlim(0.9, 75)
    same_limits(axes)
    axes[-1].set_xlabel("K (texts to choose from, log₂)")
    for ax in axes:
        limits = ax.get_ylim()
        for p in pools[ax]:
            ax.plot(PUBLISHED_KS, np.log2(p / np.array(PUBLISHED_KS)), color=NULL_GREY, linewidth=0.7)
        ax.set_ylim(limits)
    fig.draw_without_rendering()
    for ax in axes:
        name_ends(ax, 75, ends[ax])
        for p in pools[ax]:
            (x, ha), (y, va) = ((4, "left"), (1, "bottom")) if p == max(pools[ax]) else ((-4, "right"), (-1, "top"))
            at = {"textcoords": "offset points", "fontsize": 7, "color": NULL_GREY, "ha": ha, "va": va}
            ax.annotate(f"pool of {p:,}", (32, np.log2(p / 32)), (x, y), **at)
    return fig


def _corrected_panel(ax: Axes, results: RunResults) -> dict[str, tuple[float, str]]:
    """Draw the corrected K-curve of a run and its nulls; returns the labels of the lines' ends."""
    column = results.of(rows.CURVE)
    last = column["ks"][-1]
    draw_curve_and_nulls(ax, column, results.backbone)
    curves = {
        "AV": (rows.CURVE, colour(results.backbone)),
        "unrelated texts": (rows.CURVE_UNRELATED, NULL_GREY),
        "others' rollouts": (rows.CURVE_OTHERS, "black"),
    }
    ends = {label: (column[row.cen][str(last)], color) for label, (row, color) in curves.items()}
    for row, label in ((rows.PARAPHRASE, f"{N_PARAPHRASES} paraphrases"), (rows.RETRIEVAL, "nearest stored")):
        value, (low, high) = results.of(row)[row.cen], results.of(row)["ci95"][row.cen]
        ax.hlines(value, 1, last, color="black", linewidth=0.7)
        ax.fill_between([1, last], [low] * 2, [high] * 2, color="black", alpha=0.08, linewidth=0)
        ends[label] = (value, "black")
    style(ax, "", "", f"{in_two_lines(results)}, held out")
    return ends


def k_curve_panel(ax: Axes, column: dict, scale: dict, backbone: str, title: str, of: str = "AV") -> None:
    """One K-curve with its nulls; floor and ceiling of the same protocol as horizontal lines."""
    draw_curve_and_nulls(ax, column, backbone, f"{of}, best of K")
    for row, line in ((rows.PARAPHRASE, "--"), (rows.FLOOR, "-.")):
        if scale[row.cen] is not None:
            ax.axhline(scale[row.cen], color="black", linestyle=line, linewidth=0.8, label=row.title)
    style(ax, "K (rollouts, log₂)", "centred fve_nrm", title)


@styled
def figure_by_run(everything: Sequence[RunResults]) -> Figure:
    """K-curves with floor and ceiling, each run under both protocols, on one page and one scale."""
    depth = -(-len(everything) // 2)
    fig = plt.figure(figsize=(WIDTH, min(9, 0.9 + 1.75 * depth)), layout="constrained")
    for cell, results in zip(fig.subfigures(depth, 2, squeeze=False).flat, everything):
        cell.suptitle(in_two_lines(results), x=0.02, ha="left", fontsize=9)
        for ax, protocol in zip(cell.subplots(1, 2, sharey=True), PROTOCOLS):
            column, scale = (results.column(name, protocol) for name in (rows.RERANK_FILE, rows.CEILING_FILE))
            k_curve_panel(ax, column, scale, results.backbone, protocol)
            log2_k_axis(ax, PUBLISHED_KS[::2])
            ax.set_xlim(0.9, 75)
            ax.set(xlabel="", ylabel="")
    if fig.axes:
        same_limits(fig.axes)
        fig.legend(*fig.axes[0].get_legend_handles_labels(), ncols=2, loc="outside upper center")
    fig.supxlabel("K (rollouts to choose from, log₂)", fontsize=9)
    fig.supylabel("centred fve_nrm", fontsize=9)
    return fig


@styled
def figure_reading(everything: Sequence[RunResults]) -> Figure:
    """What its own v saves the AV on the sources' texts, by training step, against another target's v and against μ."""
    # A released AV was not trained here.
    trained = (r for r in largest(everything) if r.training["validation"])
    shown = [r for r in trained if "nats_own" in r.training["validation"][0]]
    fig, axes = panels(2, WIDTH, 3, sharey=True)
    for ax, row, name, label in zip(axes, rows.NATS_GAINED, ("other", "mean"), ("another target's v", "the mean μ")):
        for results in shown:
            color, shape = colour(results.backbone), mark(results.backbone)
            saved = {r["step"]: r[f"nats_{name}"] - r["nats_own"] for r in results.training["validation"]}
            ax.plot(list(saved), list(saved.values()), f"{shape}-", color=color, label=f"validation: {results.label}")
            if results.source_loss:
                value, error = measured([(results.source_loss, row.key)])
                kept = {"markeredgecolor": "black", "markersize": 6, "label": "the same, kept AV, held out"}
                ax.errorbar(results.training["best_step"], value, error, fmt=shape, color=color, capsize=3, **kept)
        ax.axhline(0, color="black", linewidth=0.8)
        style(ax, "training step", "nats a token" if ax is axes[0] else "", f"saved by v instead of {label}")
    if shown:
        fig.legend(*axes[0].get_legend_handles_labels(), ncols=2, loc="outside lower center", columnspacing=1)
    return fig


@styled
def figure_2(everything: Sequence[RunResults]) -> Figure:
    """Random floors, raw and centred, by the share of the mean square along μ (ours), and by ‖μ‖ (all)."""
    fig, (left, right) = panels(2, WIDTH, 3.4, sharey=True)
    on_left, on_right = [], []
    for results in everything:
        _draw_floors(left, results.targets["mean_square_share_along_mu"], results)
    left.plot([0, 1], [0.5, 1], color="black", linewidth=0.7)
    left.set_xlim(-0.03, 1.03)
    for results in largest(everything):
        column, color = results.of(rows.FLOOR, "published"), colour(results.backbone)
        share = results.targets["mean_square_share_along_mu"]
        _draw_floors(right, column["mu_norm"], results)
        on_left.append((results.name, share, (1 + share) / 2, color))
        on_right.append((results.name, column["mu_norm"], column[rows.FLOOR.raw], color))
    stated = {TITLES[b]: (b, published(b)["ceilings"]) for b in (*BACKBONES, "gpt_oss_20b")}
    stated["gemma-4-31B-it"] = ("gemma4_31b", published("gemma4_31b")["it"]["ceilings"])
    for title, (name, record) in stated.items():
        x, floors = record["mu_norm"], record["random_floor"]
        right.plot(x, floors["raw"], "D", color=colour(name))
        right.plot(x, floors["cen"], "D", color=colour(name), markerfacecolor="white")
        on_right.append((title, x, floors["raw"], colour(name)))
    right.set_xscale("log")
    right.margins(x=0.25)
    for ax in (left, right):
        ax.axhline(0.5, color=NULL_GREY, linewidth=0.8, linestyle=":")
    style(left, "share of the mean square along μ", "random floor, fve_nrm", "ours, by run and layer")
    style(right, "‖μ‖ (log)", "", "published (diamonds) and ours")
    left.set_ylim(0.46, 1.02)
    name_points(left, [*on_left, ("½ (1 + share)", 0.25, 0.625, "black")])
    name_points(right, on_right)
    return fig


def _draw_floors(ax: Axes, x: float, results: RunResults) -> None:
    """A run's floors under the paper's protocol at ``x``, raw filled and centred open, with intervals."""
    column, color = results.of(rows.FLOOR, "published"), colour(results.backbone)
    for key, face in ((rows.FLOOR.raw, color), (rows.FLOOR.cen, "white")):
        y, error = measured([(column, key)])
        ax.errorbar(x, y, error, fmt=mark(results.backbone), color=color, markerfacecolor=face, capsize=2)


@styled
def figure_3(everything: Sequence[RunResults]) -> Figure:
    """Replay of the same targets, re-encoded with and without each slip: dots, as these are not steps of one path."""
    shown, y = largest(everything), np.arange(len(rows.LADDER))
    fig, (ax,) = panels(1, WIDTH, 2.8)
    for i, results in enumerate(shown):
        ladder = results.column(rows.CEILING_FILE, "ladder")
        x, error = measured([(ladder, row.key) for row in rows.LADDER])
        beside = y + 0.2 * (i - (len(shown) - 1) / 2)
        look = {"fmt": mark(results.backbone), "color": colour(results.backbone), "label": results.label}
        ax.errorbar(x, beside, xerr=error, capsize=3, **look)
    ax.set_yticks(y, [row.label for row in rows.LADDER])
    ax.set_ylim(len(y) - 0.5, -0.5)
    ax.grid(axis="y", linewidth=0.4)
    style(ax, "replay, centred fve_nrm", "", "the same targets, re-encoded five ways")
    if shown:
        fig.legend(*ax.get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return fig


ABLATION_PANELS = {
    "replay": "replay",
    "paraphrase_bestof8": "paraphrase, best of 8",
    "greedy": "greedy",
    "bestofK": "best of K",
    "rho_bestofK": "ρ",
}


@styled
def figure_4(everything: Sequence[RunResults]) -> Figure:
    """Slip by slip: each quantity as the paper's slips are corrected one after the other."""
    shown, steps = largest(everything), ablation_steps()["in_order"]
    fig, axes = plt.subplots(5, 1, figsize=(WIDTH, 7.8), layout="constrained", sharex=True)
    equal = np.array(["k_mismatch" not in protocol.slips for protocol in steps.values()])
    for i, results in enumerate(shown):
        found = results.data[rows.EVALUATION_FILE]["ablation"]["in_order"]
        x, color = np.arange(len(steps)) + 0.08 * i, colour(results.backbone)
        for ax, (key, title) in zip(axes, ABLATION_PANELS.items()):
            y, error = measured([(found[step], key) for step in steps])
            is_rho = key.startswith("rho")
            # ρ is another ratio once its numerator is drawn as often as its denominator: no line joins the two.
            for part in (~equal, equal) if is_rho else (equal | True,):
                label, line = results.label if part[0] else "", {"fmt": f"{mark(results.backbone)}-", "linewidth": 1}
                ax.errorbar(x[part], y[part], error[:, part], capsize=2, color=color, label=label, **line)
            style(ax, "", "ρ_cen" if is_rho else "centred\nfve_nrm", title)
    drawn = "/".join(str(k) for k in sorted({r.sizes["K"] for r in shown}))
    border = len(steps) - equal.sum() - 0.5
    axes[-1].axvline(border, color="black", linewidth=0.8, linestyle=":")
    for over, side, align in ((drawn, -4, "right"), (N_PARAPHRASES, 4, "left")):
        where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": align, "va": "bottom"}
        axes[-1].annotate(f"best of {over} over {N_PARAPHRASES}", (border, 1), (side, 2), fontsize=SMALL, **where)
    words = ["as published"] + [f"+ {SLIPS[s].what}" for s in steps if s != "published"]
    axes[-1].set_xticks(range(len(steps)), [textwrap.fill(w, 12, break_on_hyphens=False) for w in words], fontsize=7)
    axes[-1].set_xlabel("slips corrected, one more at each step (named by what was wrong)")
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return fig
