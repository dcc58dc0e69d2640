"""Figures for the paper and the notebooks: one colour per backbone, intervals drawn, direct labels."""

from __future__ import annotations

import textwrap
from typing import Sequence

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
    style(ax, "K (rollouts, log₂)", "centred fve_nrm, best of K", "published; dashed: ceiling, dotted: floor")


def k_curve_panel(ax: Axes, column: dict, scale: dict, color: str, title: str, of: str = "AV") -> None:
    """One K-curve with its nulls; floor and ceiling of the same protocol as horizontal lines."""
    draw_curve(ax, column, rows.CURVE.cen, color, f"{of}, best of K")
    draw_curve(ax, column, rows.CURVE_UNRELATED.cen, NULL_GREY, rows.CURVE_UNRELATED.title, "--")
    draw_curve(ax, column, rows.CURVE_OTHERS.cen, "black", rows.CURVE_OTHERS.title, ":")
    level(ax, scale[rows.PARAPHRASE.cen], color, rows.PARAPHRASE.title)
    level(ax, scale[rows.FLOOR.cen], color, rows.FLOOR.title, ":")
    log2_k_axis(ax, column["ks"])
    style(ax, "K (rollouts, log₂)", "centred fve_nrm", f"{title}, M = {column['n']}")
    ax.legend(frameon=False, fontsize=6.5, loc="upper left")
    bottom, top = ax.get_ylim()
    ax.set_ylim(bottom, top + 0.35 * (top - bottom))


def same_limits(axes: Sequence[Axes]) -> None:
    """Give panels that are compared one y range."""
    bottoms, tops = zip(*(ax.get_ylim() for ax in axes))
    for ax in axes:
        ax.set_ylim(min(bottoms), max(tops))


def figure_1(everything: Sequence[RunResults]) -> Figure:
    """K-curves with each backbone's floor and ceiling: published on top, each run below under both protocols."""
    n = len(everything)
    fig = plt.figure(figsize=(9, 3.6 * (n + 1)), layout="constrained")
    grid = fig.add_gridspec(n + 1, 2)
    published_k_curves(fig.add_subplot(grid[0, :]))
    for i, results in enumerate(everything, start=1):
        axes = [fig.add_subplot(grid[i, j]) for j in (0, 1)]
        for ax, protocol in zip(axes, ("paper", "corrected")):
            column, scale = results.column("rerank_eval", protocol), results.column("oracle_ceiling", protocol)
            k_curve_panel(ax, column, scale, colour(results.backbone), f"{results.title}: {protocol}")
        same_limits(axes)
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
        points.append((column["mu_norm"], floors, colour(results.backbone), results.backbone))
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
                    label=results.title)  # fmt: skip
    if ax.lines:
        ax.legend(frameon=False, fontsize=8, loc="lower right")
    ax.set_xticks(range(len(rows.LADDER)), [textwrap.fill(row.label, 14) for row in rows.LADDER], fontsize=8)
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
            ax.plot(values, y, "o-", color=colour(results.backbone), markersize=4, label=results.title)
            style(ax, "centred fve_nrm" if key[:3] != "rho" else "ρ_cen", "", title)
    axes[0].set_yticks(y, labels, fontsize=8)
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, ncols=4, loc="outside lower center")
    return fig
