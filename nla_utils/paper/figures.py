"""The figures of the section and its appendix: intervals drawn, lines named at their ends."""

from __future__ import annotations

import textwrap
from typing import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_utils.config import N_PARAPHRASES
from nla_utils.paper.draw import (
    NULL_GREY,
    SMALL,
    WIDTH,
    colour,
    log2_k_axis,
    mark,
    name_ends,
    name_points,
    same_limits,
    style,
    styled,
)
from nla_utils.paper.published import BACKBONES, TITLES, ceiling, k_curve, published
from nla_utils.paper.results import RunResults, largest
from nla_utils.protocol import SLIPS, ablation_steps
from nla_utils.scores import rows

PUBLISHED_KS = (1, 2, 4, 8, 16, 32, 64)


def in_two_lines(results: RunResults) -> str:
    """What a figure calls the run, for a panel of half a page's width."""
    return f"{results.spec.shown}\n{results.size}"


def draw_curve(ax: Axes, column: dict, key: str, color: str, line: str = "o-", label: str = "", width: float = 1.5) -> None:
    """A K-curve of our results with its 95 % band."""
    ks = [int(k) for k in column[key]]
    # What is not known is null in JSON and a gap in the curve.
    low, high = np.array([column["ci95"][key][str(k)] for k in ks], dtype=float).T
    ax.plot(ks, np.array(list(column[key].values()), dtype=float), line, color=color, label=label, markersize=3, linewidth=width)
    ax.fill_between(ks, low, high, color=color, alpha=0.15, linewidth=0)


def draw_nulls(ax: Axes, column: dict) -> None:
    """Both nulls, which may coincide: a wide pale line, and dots that are seen on it."""
    draw_curve(ax, column, rows.CURVE_UNRELATED.cen, "#bbbbbb", "-", rows.CURVE_UNRELATED.title, 4)
    draw_curve(ax, column, rows.CURVE_OTHERS.cen, "black", ":", rows.CURVE_OTHERS.title)


def published_k_curves(ax: Axes) -> None:
    """What is published of best-of-K: curves, the headline evaluations at K = 64, ceilings and floors."""
    ends: dict[str, tuple[float, str]] = {}
    for name in (*BACKBONES, "gpt_oss_20b"):
        curve, color, title = k_curve(name), colour(name), TITLES[name]
        ax.plot(list(curve), list(curve.values()), "o-", color=color)
        if name not in BACKBONES:
            ends[title] = (curve[max(curve)], color)
            continue
        headline, (floor, top) = published(name)["centred_eval"], ceiling(name)
        ax.plot(headline["K"], headline["best_of_k"]["cen"], "D", color=color, markeredgecolor="black", markersize=6)
        of = f", M = {headline['M']}" if headline["M"] != published(name)["k_curve"]["M"] else ""
        ends[f"{title}, headline{of}"] = (headline["best_of_k"]["cen"], color)
        if max(curve) == headline["K"]:
            ends[f"{title}, {published(name)['k_curve']['checkpoint']} checkpoint"] = (curve[max(curve)], color)
        ax.axhline(top, color=color, linestyle="--", linewidth=0.8)
        ax.axhline(floor, color=color, linestyle=":", linewidth=0.8)
        ends[f"{title}, ceiling"] = (top, color)
    color = colour("gemma4_31b")
    for which, title, face in (("it", "gemma-4-31B-it", color), ("base", "gemma-4-31B, base", "white")):
        curve = {int(k): y for k, y in published("gemma4_31b")[which]["k_curve"]["cen"].items()}
        ax.plot(list(curve), list(curve.values()), "^", color=color, markerfacecolor=face, markersize=6)
        ends[f"{title} (K = {max(curve)})"] = (curve[max(curve)], color)
    log2_k_axis(ax, PUBLISHED_KS)
    ax.set_xlim(0.9, 75)
    style(ax, "K (rollouts to choose from, log₂)", "centred fve_nrm, best of K", "published")
    name_ends(ax, 75, ends)


@styled
def figure_1(everything: Sequence[RunResults]) -> Figure:
    """K-curves in one look: published, then each backbone's largest run, corrected, with its nulls."""
    shown = largest(everything)
    pairs = [shown[i : i + 2] for i in range(0, len(shown), 2)]
    below = [[r.title for r in pair] + ["."] * (2 - len(pair)) for pair in pairs]
    fig = plt.figure(figsize=(WIDTH, 5.1 + 1.4 * len(pairs)), layout="constrained")
    axes = fig.subplot_mosaic([["published"] * 2, *below])
    ours = [axes[r.title] for r in shown]
    ends = [_corrected_panel(ax, results) for ax, results in zip(ours, shown)]
    # Last, since its labels are placed on the page as it is then laid out.
    published_k_curves(axes["published"])
    if ours:
        same_limits(ours)
    for ax in ours[1::2]:
        ax.set_ylabel("")
    for ax, names, results in zip(ours, ends, shown):
        name_ends(ax, results.column("rerank_eval", "corrected")["ks"][-1], names)
    return fig


def _corrected_panel(ax: Axes, results: RunResults) -> dict[str, tuple[float, str]]:
    """Draw the corrected K-curve of a run and its nulls; returns the labels of the lines' ends."""
    column, color = results.column("rerank_eval", "corrected"), colour(results.backbone)
    last = str(column["ks"][-1])
    draw_nulls(ax, column)
    draw_curve(ax, column, rows.CURVE.cen, color, f"{mark(results.backbone)}-")
    ends = {
        "AV": (column[rows.CURVE.cen][last], color),
        "unrelated texts": (column[rows.CURVE_UNRELATED.cen][last], NULL_GREY),
        "others' rollouts": (column[rows.CURVE_OTHERS.cen][last], "black"),
    }
    for row, label in ((rows.PARAPHRASE, f"{N_PARAPHRASES} paraphrases"), (rows.RETRIEVAL, "nearest stored")):
        of = results.column(row.file, "corrected")
        ax.hlines(of[row.cen], 1, column["ks"][-1], color="black", linewidth=0.7)
        ax.fill_between([1, column["ks"][-1]], *([end] * 2 for end in of["ci95"][row.cen]), color="black", alpha=0.08, linewidth=0)
        ends[label] = (of[row.cen], "black")
    log2_k_axis(ax, column["ks"])
    style(ax, "K (texts to choose from, log₂)", "centred fve_nrm", f"{in_two_lines(results)}, held out")
    return ends


def k_curve_panel(ax: Axes, column: dict, scale: dict, backbone: str, title: str, of: str = "AV") -> None:
    """One K-curve with its nulls; floor and ceiling of the same protocol as horizontal lines."""
    color = colour(backbone)
    draw_nulls(ax, column)
    draw_curve(ax, column, rows.CURVE.cen, color, f"{mark(backbone)}-", f"{of}, best of K")
    for row, line in ((rows.PARAPHRASE, "--"), (rows.FLOOR, "-.")):
        if scale[row.cen] is not None:
            ax.axhline(scale[row.cen], color="black", linestyle=line, linewidth=0.8, label=row.title)
    log2_k_axis(ax, column["ks"])
    style(ax, "K (rollouts, log₂)", "centred fve_nrm", title)


@styled
def figure_by_run(everything: Sequence[RunResults]) -> Figure:
    """K-curves with floor and ceiling, each run under both protocols, on one page and one scale."""
    depth = -(-len(everything) // 2)
    fig = plt.figure(figsize=(WIDTH, min(9, 0.9 + 1.75 * depth)), layout="constrained")
    for cell, results in zip(fig.subfigures(depth, 2, squeeze=False).flat, everything):
        cell.suptitle(in_two_lines(results), x=0.02, ha="left", fontsize=9)
        for ax, protocol in zip(cell.subplots(1, 2, sharey=True), ("paper", "corrected")):
            column, scale = results.column("rerank_eval", protocol), results.column("oracle_ceiling", protocol)
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
    trained = (r for r in largest(everything) if r.data["training"]["validation"])
    shown = [r for r in trained if "nats_own" in r.data["training"]["validation"][0]]
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3), layout="constrained", sharey=True)
    for ax, row, name, label in zip(axes, rows.NATS_GAINED, ("other", "mean"), ("another target's v", "the mean μ")):
        for results in shown:
            color, shape = colour(results.backbone), mark(results.backbone)
            saved = {r["step"]: r[f"nats_{name}"] - r["nats_own"] for r in results.data["training"]["validation"]}
            ax.plot(list(saved), list(saved.values()), f"{shape}-", color=color, label=f"validation: {results.label}")
            if results.source_loss:
                value, (low, high) = results.source_loss[row.key], results.source_loss["ci95"][row.key]
                ax.errorbar(results.data["training"]["best_step"], value, [[value - low], [high - value]], fmt=shape, color=color,
                            markeredgecolor="black", markersize=6, capsize=3, label="the same, kept AV, held out")  # fmt: skip
        ax.axhline(0, color="black", linewidth=0.8)
        style(ax, "training step", "nats a token" if ax is axes[0] else "", f"saved by v instead of {label}")
    if shown:
        fig.legend(*axes[0].get_legend_handles_labels(), ncols=2, loc="outside lower center", columnspacing=1)
    return fig


@styled
def figure_2(everything: Sequence[RunResults]) -> Figure:
    """Random floors, raw and centred, by the share of the mean square along μ (ours), and by ‖μ‖ (all)."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH, 3.4), layout="constrained", sharey=True)
    for results in everything:
        _draw_floors(left, results.data["targets"]["mean_square_share_along_mu"], results)
    left.plot([0, 1], [0.5, 1], color="black", linewidth=0.7)
    left.set_xlim(-0.03, 1.03)
    points = []
    for results in largest(everything):
        x = _draw_floors(right, results.column("oracle_ceiling", "paper")["mu_norm"], results)
        points.append((results.name, x, results.column("oracle_ceiling", "paper")[rows.FLOOR.raw], colour(results.backbone)))
    stated = {TITLES[b]: (b, published(b)["ceilings"]) for b in (*BACKBONES, "gpt_oss_20b")}
    stated["gemma-4-31B-it"] = ("gemma4_31b", published("gemma4_31b")["it"]["ceilings"])
    for title, (name, record) in stated.items():
        x, floors = record["mu_norm"], record["random_floor"]
        right.plot(x, floors["raw"], "D", color=colour(name))
        right.plot(x, floors["cen"], "D", color=colour(name), markerfacecolor="white")
        points.append((title, x, floors["raw"], colour(name)))
    right.set_xscale("log")
    right.margins(x=0.25)
    for ax in (left, right):
        ax.axhline(0.5, color=NULL_GREY, linewidth=0.8, linestyle=":")
    style(left, "share of the mean square along μ", "random floor, fve_nrm", "ours, by run and layer")
    style(right, "‖μ‖ (log)", "", "published (diamonds) and ours")
    left.set_ylim(0.46, 1.02)
    ours = {r.name: (r.name, s := r.data["targets"]["mean_square_share_along_mu"], (1 + s) / 2, colour(r.backbone))
            for r in largest(everything)}  # fmt: skip
    name_points(left, [*ours.values(), ("½ (1 + share)", 0.25, 0.625, "black")])
    name_points(right, points)
    return fig


def _draw_floors(ax: Axes, x: float, results: RunResults) -> float:
    """Draw a run's floors under the paper's protocol at ``x``, raw filled and centred open, with intervals; returns x."""
    column = results.column("oracle_ceiling", "paper")
    for kind, face in (("raw", colour(results.backbone)), ("cen", "white")):
        y, (low, high) = column[rows.FLOOR.at(kind)], column["ci95"][rows.FLOOR.at(kind)]
        ax.errorbar(x, y, [[y - low], [high - y]], fmt=mark(results.backbone), color=colour(results.backbone),
                    markerfacecolor=face, capsize=2)  # fmt: skip
    return x


@styled
def figure_3(everything: Sequence[RunResults]) -> Figure:
    """Replay of the same targets, re-encoded with and without each slip: dots, for the ways are not steps of one path."""
    shown, y = largest(everything), np.arange(len(rows.LADDER))
    fig, ax = plt.subplots(figsize=(WIDTH, 2.8), layout="constrained")
    for i, results in enumerate(shown):
        ladder = results.column("oracle_ceiling", "ladder")
        x = np.array([ladder[row.key] for row in rows.LADDER], dtype=float)
        error = np.abs(np.array([ladder["ci95"][row.key] for row in rows.LADDER], dtype=float).T - x)
        ax.errorbar(x, y + 0.2 * (i - (len(shown) - 1) / 2), xerr=error, fmt=mark(results.backbone), capsize=3,
                    color=colour(results.backbone), label=results.label)  # fmt: skip
    ax.set_yticks(y, [row.label for row in rows.LADDER])
    ax.set_ylim(len(y) - 0.5, -0.5)
    ax.grid(axis="y", linewidth=0.4)
    style(ax, "replay, centred fve_nrm", "", "the same targets, re-encoded five ways")
    if shown:
        fig.legend(*ax.get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return fig


ABLATION_PANELS = (
    ("replay", "replay"), ("paraphrase_bestof8", "paraphrase, best of 8"), ("greedy", "greedy"),
    ("bestofK", "best of K"), ("rho_bestofK", "ρ"),
)  # fmt: skip


@styled
def figure_4(everything: Sequence[RunResults]) -> Figure:
    """Slip by slip: each quantity as the paper's slips are corrected one after the other."""
    fig, axes = plt.subplots(5, 1, figsize=(WIDTH, 7.8), layout="constrained", sharex=True)
    steps = ablation_steps()["in_order"]
    equal = np.array([protocol.equal_k for protocol in steps.values()])
    for i, results in enumerate(largest(everything)):
        found = results.data["centered_eval"]["ablation"]["in_order"]
        x = np.arange(len(steps)) + 0.08 * i
        for ax, (key, title) in zip(axes, ABLATION_PANELS):
            y = np.array([found[s][key] for s in steps], dtype=float)
            error = np.abs(np.array([found[s]["ci95"][key] for s in steps], dtype=float).T - y)
            # ρ is another ratio once its numerator is drawn as often as its denominator: no line joins the two.
            for part in (~equal, equal) if key.startswith("rho") else (equal | True,):
                ax.errorbar(x[part], y[part], error[:, part], fmt=f"{mark(results.backbone)}-", linewidth=1, capsize=2,
                            color=colour(results.backbone), label=results.label if part[0] else "")  # fmt: skip
            style(ax, "", "ρ_cen" if key.startswith("rho") else "centred\nfve_nrm", title)
    drawn = "/".join(str(k) for k in sorted({r.data["targets"]["sizes"]["K"] for r in largest(everything)}))
    border = len(steps) - equal.sum() - 0.5
    axes[-1].axvline(border, color="black", linewidth=0.8, linestyle=":")
    for over, side, align in ((drawn, -4, "right"), (N_PARAPHRASES, 4, "left")):
        axes[-1].annotate(f"best of {over} over {N_PARAPHRASES}", (border, 1), (side, 2), xycoords=("data", "axes fraction"),
                          textcoords="offset points", fontsize=SMALL, ha=align, va="bottom")  # fmt: skip
    words = ["as published"] + [f"+ {SLIPS[s].what}" for s in steps if s != "paper"]
    axes[-1].set_xticks(range(len(steps)), [textwrap.fill(w, 12, break_on_hyphens=False) for w in words], fontsize=7)
    axes[-1].set_xlabel("slips corrected, one more at each step (named by what was wrong)")
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=2, loc="outside lower center")
    return fig
