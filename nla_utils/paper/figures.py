"""Figures for the paper and the notebooks: one colour per backbone, intervals drawn, direct labels."""

from __future__ import annotations

import textwrap
from typing import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_utils.paper.published import BACKBONES, TITLES, ceiling, k_curve, published
from nla_utils.paper.results import RunResults, largest
from nla_utils.scores import rows

# Okabe-Ito: told apart by colour-blind readers and in grey print.
COLOURS = {
    "qwen25_7b": "#0072B2",
    "llama32_3b": "#E69F00",
    "gemma2_2b": "#009E73",
    "gpt_oss_20b": "#999999",
    "gemma3-270m": "#D55E00",
    "smollm2-135m": "#CC79A7",
}
SPARE_COLOUR = "#56B4E9"
NULL_GREY = "#666666"


def colour(backbone: str) -> str:
    return COLOURS.get(backbone, SPARE_COLOUR)


def style(ax: Axes, x: str, y: str, title: str = "") -> None:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


def log2_k_axis(ax: Axes, ks: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ks), [str(k) for k in ks])
    ax.minorticks_off()


def draw_curve(ax: Axes, column: dict, key: str, color: str, label: str, line: str = "-") -> None:
    """A K-curve of our results with its 95 % band."""
    ks = [int(k) for k in column[key]]
    low, high = np.array([column["ci95"][key][str(k)] for k in ks]).T
    ax.plot(ks, list(column[key].values()), line, color=color, label=label, marker="o", markersize=3)
    ax.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)


def level(ax: Axes, y: float, color: str, label: str, line: str = "--") -> None:
    """A horizontal line that is labelled in the legend with its value."""
    ax.axhline(y, color=color, linestyle=line, linewidth=1, label=f"{label} ({y:.3f})")


def published_k_curves(ax: Axes) -> None:
    """Figure 1, left: the published K-curves, each with its own floor and ceiling."""
    for name in (*BACKBONES, "gpt_oss_20b"):
        curve = k_curve(name)
        ax.plot(list(curve), list(curve.values()), "o-", color=colour(name), markersize=3)
        end = max(curve)
        ax.annotate(TITLES[name], (end, curve[end]), textcoords="offset points", xytext=(6, -3), fontsize=8,
                    color=colour(name))  # fmt: skip
        if name in BACKBONES:
            floor, top = ceiling(name)
            ax.axhline(top, color=colour(name), linestyle="--", linewidth=0.8)
            ax.axhline(floor, color=colour(name), linestyle=":", linewidth=0.8)
    log2_k_axis(ax, [1, 2, 4, 8, 16, 32, 64])
    ax.set_xlim(right=110)
    style(ax, "K (rollouts, log₂)", "centred fve_nrm, best of K", "published\ndashed: ceilings, dotted: floors")


def k_curve_panel(ax: Axes, column: dict, scale: dict, color: str, title: str, of: str = "AV") -> None:
    """One K-curve with its nulls; floor and ceiling of the same protocol as horizontal lines."""
    draw_curve(ax, column, rows.CURVE.cen, color, f"{of}, best of K")
    draw_curve(ax, column, rows.CURVE_UNRELATED.cen, NULL_GREY, rows.CURVE_UNRELATED.title, "--")
    draw_curve(ax, column, rows.CURVE_OTHERS.cen, "black", rows.CURVE_OTHERS.title, ":")
    level(ax, scale[rows.PARAPHRASE.cen], color, rows.PARAPHRASE.title)
    level(ax, scale[rows.FLOOR.cen], color, rows.FLOOR.title, ":")
    log2_k_axis(ax, column["ks"])
    style(ax, "K (rollouts, log₂)", "centred fve_nrm", f"{title}, M = {column['n']}")
    ax.legend(framealpha=1, edgecolor="none", fontsize=6.5, loc="upper left")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.5 * (top - bottom))


def same_limits(axes: Sequence[Axes]) -> None:
    """Give panels that are compared one y range."""
    bottoms, tops = zip(*(ax.get_ylim() for ax in axes))
    for ax in axes:
        ax.set_ylim(min(bottoms), max(tops))


def figure_1(everything: Sequence[RunResults]) -> Figure:
    """K-curves in one look: published, then each backbone's largest run, corrected, with its nulls as strong as the AV."""
    shown = largest(everything)
    fig, axes = plt.subplots(1, 1 + len(shown), figsize=(4.2 + 4.2 * len(shown), 3.9), layout="constrained", squeeze=False)
    published_k_curves(axes[0, 0])
    for ax, results in zip(axes[0, 1:], shown):
        _corrected_panel(ax, results)
    same_limits(axes[0])
    return fig


def _corrected_panel(ax: Axes, results: RunResults) -> None:
    """The corrected K-curve of a run and its nulls, named at their ends."""
    column = results.column("rerank_eval", "corrected")
    curves = (
        (rows.CURVE.cen, colour(results.backbone), "AV", "-"), (rows.CURVE_UNRELATED.cen, "black", "unrelated texts", "--"),
        (rows.CURVE_OTHERS.cen, NULL_GREY, "AV of other targets", ":"),
    )  # fmt: skip
    ends = {}
    for key, color, label, line in curves:
        draw_curve(ax, column, key, color, label, line)
        ends[label] = (list(column[key].values())[-1], color)
    for row, label in ((rows.PARAPHRASE, "paraphrase, best of 8"), (rows.RETRIEVAL, "nearest stored text")):
        y = results.column(row.file, "corrected")[row.cen]
        ax.hlines(y, 1, column["ks"][-1], color="black", linewidth=0.7)
        ends[label] = (y, "black")
    name_ends(ax, column["ks"][-1], ends)
    log2_k_axis(ax, column["ks"])
    ax.set_xlim(right=column["ks"][-1] * 5)
    style(ax, "K (texts to choose from, log₂)", "", f"{results.label}\ncorrected, held out")


def name_ends(ax: Axes, x: float, ends: Mapping[str, tuple[float, object]], least_gap: float = 0.04) -> None:
    """Labels at the ends of lines, ``{label: (height, colour)}``, those that would touch pushed apart."""
    heights = apart({label: y for label, (y, _) in ends.items()}, least_gap * np.ptp(ax.get_ylim()))
    for label, y in heights.items():
        ax.annotate(label, (x, y), (8, 0), textcoords="offset points", fontsize=7, va="center", color=ends[label][1])


def apart(heights: Mapping[str, float], gap: float) -> dict[str, float]:
    """The heights, those that are closer than ``gap`` pushed upwards."""
    placed: dict[str, float] = {}
    for label, y in sorted(heights.items(), key=lambda item: item[1]):
        placed[label] = max(y, max(placed.values(), default=-np.inf) + gap)
    return placed


def figure_by_run(everything: Sequence[RunResults]) -> Figure:
    """K-curves with floor and ceiling, each run under both protocols."""
    fig, axes = plt.subplots(len(everything), 2, figsize=(9, 3.6 * len(everything)), layout="constrained", squeeze=False)
    for pair, results in zip(axes, everything):
        for ax, protocol in zip(pair, ("paper", "corrected")):
            column, scale = results.column("rerank_eval", protocol), results.column("oracle_ceiling", protocol)
            k_curve_panel(ax, column, scale, colour(results.backbone), f"{results.label}: {protocol}")
        same_limits(pair)
    return fig


def figure_reading(everything: Sequence[RunResults]) -> Figure:
    """What its own v saves the AV on the sources' texts, by training step, against another target's v and against μ."""
    shown = [r for r in largest(everything) if "nats_own" in r.data["training"]["validation"][0]]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for ax, name, label in zip(axes, ("other", "mean"), ("another target's v", "the mean μ")):
        for results in shown:
            validation = results.data["training"]["validation"]
            saved = [r[f"nats_{name}"] - r["nats_own"] for r in validation]
            ax.plot([r["step"] for r in validation], saved, "o-", markersize=3, color=colour(results.backbone),
                    label=results.label)  # fmt: skip
        ax.axhline(0, color="black", linewidth=0.8)
        style(ax, "training step", "nats a token" if name == "other" else "", f"saved by v instead of {label}")
    if shown:
        axes[0].legend(frameon=False, fontsize=8)
    return fig


def figure_2(everything: Sequence[RunResults]) -> Figure:
    """‖μ‖ against the raw and the centred random floor, published and ours."""
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    points = [
        (published(b)["centred_eval"]["mu_norm"], published(b)["ceilings"]["random_floor"], colour(b), TITLES[b])
        for b in BACKBONES
    ]
    for results in largest(everything):
        column = results.column("oracle_ceiling", "paper")
        floors = {k: column[rows.FLOOR.at(k)] for k in ("raw", "cen")}
        points.append((column["mu_norm"], floors, colour(results.backbone), results.name))
    for x, floors, c, label in points:
        ax.plot(x, floors["raw"], "o", color=c)
        ax.plot(x, floors["cen"], "s", color=c, markerfacecolor="white")
        ax.annotate(label, (x, floors["raw"]), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=7)
    ax.axhline(0.5, color=NULL_GREY, linewidth=0.8, linestyle=":")
    ax.set_xscale("log")
    ax.margins(x=0.15, y=0.12)
    style(ax, "‖μ‖ (log scale)", "random floor, fve_nrm", "filled: raw, open: centred; paper protocol")
    return fig


def figure_3(everything: Sequence[RunResults]) -> Figure:
    """Replay of the same targets, re-encoded with and without each slip."""
    fig, ax = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for results in largest(everything):
        ladder = results.column("oracle_ceiling", "ladder")
        y = np.array([ladder[row.key] for row in rows.LADDER])
        error = np.abs(np.array([ladder["ci95"][row.key] for row in rows.LADDER]).T - y)
        ax.errorbar(range(len(y)), y, yerr=error, fmt="o-", color=colour(results.backbone), capsize=3,
                    label=results.label)  # fmt: skip
    if ax.lines:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.set_xticks(range(len(rows.LADDER)), [textwrap.fill(row.label, 14) for row in rows.LADDER], fontsize=8)
    ax.margins(x=0.1)
    style(ax, "", "replay, centred fve_nrm", "the same targets, re-encoded five ways")
    return fig


ABLATION_PANELS = (
    ("replay", "replay"), ("paraphrase_bestof8", "paraphrase best-of-8"), ("greedy", "greedy"),
    ("bestofK", "best-of-K"), ("rho_bestofK", "ρ, best-of-K"),
)  # fmt: skip


def figure_4(everything: Sequence[RunResults]) -> Figure:
    """Slip by slip: each quantity as the paper's slips are corrected one after the other."""
    fig, axes = plt.subplots(1, len(ABLATION_PANELS), figsize=(13, 3.6), layout="constrained", sharey=True)
    for results in largest(everything):
        steps = results.data["centered_eval"]["ablation"]["in_order"]
        labels = ["as published"] + [f"+ {s}" for s in steps if s != "paper"]
        y = np.arange(len(steps))
        for ax, (key, title) in zip(axes, ABLATION_PANELS):
            values = np.array([c[key] for c in steps.values()])
            low, high = np.array([c["ci95"][key] for c in steps.values()]).T
            ax.fill_betweenx(y, low, high, color=colour(results.backbone), alpha=0.15, linewidth=0)
            ax.plot(values, y, "o-", color=colour(results.backbone), markersize=4, label=results.label)
            style(ax, "centred fve_nrm" if key[:3] != "rho" else "ρ_cen", "", title)
    axes[0].set_yticks(y, labels, fontsize=8)
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return fig
