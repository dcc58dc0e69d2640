"""What the notebooks show of a run's arrays: texts, bars, curves and histograms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Mapping, Optional, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nla_utils.metrics import fve, fve_matrix
from nla_utils.paper.draw import NULL_GREY, colour, same_limits, shade, style, styled
from nla_utils.paper.figures import k_curve_panel
from nla_utils.paper.tables import with_interval
from nla_utils.protocol import Protocol
from nla_utils.scores.column import Column
from nla_utils.scores.rows import SPEARMAN, Row

if TYPE_CHECKING:
    from nla_utils.lm.backbone import Backbone
    from nla_utils.stages.rollouts import Rollouts
    from nla_utils.stages.targets import Targets

WIDTH = 160


def _one_line(text: str) -> str:
    """The text on one line; of a long one the end, since v is taken at the last token."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else "…" + line[1 - WIDTH :]


def texts_table(backbone: Backbone, texts: Mapping[str, Sequence[int]]) -> str:
    """Token sequences as text by label, one line each, the end of a long one."""
    width = max(map(len, texts))
    return "\n".join(f"{label:<{width}}  {_one_line(backbone.decode_text(ids))}" for label, ids in texts.items())


def most(values: Sequence[float]) -> tuple[float, float]:
    """The range that an axis shows: the middle 99 % of the values, a tenth wider, so that no outlier stretches it."""
    low, high = np.nanpercentile(values, [0.5, 99.5])
    room = 0.1 * (high - low) or 0.5
    return low - room, high + room


@styled
def lengths_and_norms(targets: Targets, backbone: str) -> Figure:
    """Histograms of sequence length and of ‖v‖."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
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


@styled
def cosine_histograms(raw: np.ndarray, centred: np.ndarray, backbone: str) -> Figure:
    """Cosines of unrelated pairs: raw they crowd far from 0, centred they sit around 0."""
    fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
    bins = np.linspace(-1, 1, 81)
    ax.hist(raw, bins=bins, color=NULL_GREY, alpha=0.7, label="raw")
    ax.hist(centred, bins=bins, color=colour(backbone), alpha=0.7, label="centred")
    ax.legend()
    style(ax, "cosine of two unrelated targets", "pairs")
    return fig


@styled
def training_curves(training: dict, backbone: str) -> Figure:
    """Loss by step, raw and as the mean of the steps round each, and both validation criteria."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
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
    steps = [r["step"] for r in training["validation"]]
    criteria = (("fve_nrm", "raw, no BOS (kept by this)", "o-"), ("fve_nrm_cen", "centred, with BOS", "s--"))
    for key, label, line in criteria:
        right.plot(steps, [r[key] for r in training["validation"]], line, color=c, label=label)
    right.legend()
    style(right, "step", "validation fve_nrm, greedy")
    return fig


def training_facts(training: dict) -> pd.Series:
    """Loss at the beginning and the end, and what v saves in nats a token at the step that was kept; nothing of an AV
    that was not trained here."""
    if not training["loss"]:
        return pd.Series(dtype=float)
    first, _, last = np.array_split(training["loss"], 3)
    kept = next(r for r in training["validation"] if r["step"] == training["best_step"])
    saved = {f"nats saved, {v} v": kept[f"nats_{v}"] - kept["nats_own"] for v in ("other", "mean")}
    return pd.Series({"loss, first third": first.mean(), "loss, last third": last.mean(), **saved}).round(3)


def source_loss_curves(training: dict, backbone: str) -> Figure:
    """What v saves the AV in nats a token of the source's text, by training step: against another v, and against μ."""
    validation = training["validation"]
    nats = {name: np.array([r[f"nats_{name}"] for r in validation]) for name in ("own", "other", "mean")}
    return _saved([r["step"] for r in validation], nats, backbone, "o-", "step", "nats / token")


def source_loss_by_position(column: dict, backbone: str) -> Figure:
    """What v saves at each token of the source's text."""
    nats = {name: np.array(values, dtype=float) for name, values in column["nats_by_position"].items()}
    return _saved(range(1, len(nats["own"]) + 1), nats, backbone, "-", "token of the source", "nats")


@styled
def _saved(
    x: Sequence[int], nats: Mapping[str, np.ndarray], backbone: str, line: str, x_label: str, unit: str
) -> Figure:
    fig, ax = plt.subplots(figsize=(7, 2.8), layout="constrained")
    for name, label, color in (("other", "another target's v", colour(backbone)), ("mean", "μ", NULL_GREY)):
        ax.plot(x, nats[name] - nats["own"], line, color=color, label=f"instead of {label}")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.legend(framealpha=1, edgecolor="none", fontsize=8)
    style(ax, x_label, f"saved by its own v\n({unit})")
    return fig


@styled
def bars(rows: Sequence[Row], column: dict, backbone: str, x: str, kind: str = "cen") -> Figure:
    """Rows of a column as points with intervals; controls are grey squares."""
    fig, ax = plt.subplots(figsize=(7, 0.32 * len(rows) + 0.9), layout="constrained")
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


def table(rows: Sequence[Row], columns: Mapping[str, dict], kind: str = "cen") -> pd.DataFrame:
    """Rows of several columns, each value with its interval."""
    found = {name: {row.title: with_interval(c, row.at(kind)) for row in rows} for name, c in columns.items()}
    return pd.DataFrame(found)


def ablation_table(steps: dict, keys: Sequence[str]) -> pd.DataFrame:
    """Value of each quantity after each correction, ``in_order`` and ``alone``, and its change from the step
    before (in order) or from ``paper`` (alone)."""
    found = {}
    for way, columns in steps.items():
        before = start = columns["paper"]
        for slip, column in columns.items():
            reference = before if way == "in_order" else start
            found[way, slip] = {
                k: "–" if None in (column[k], reference[k]) else f"{column[k]:.3f} ({column[k] - reference[k]:+.3f})"
                for k in keys
            }
            before = column
    return pd.DataFrame(found).T


@styled
def k_curves(columns: Mapping[str, Column], scales: Mapping[str, dict], backbone: str, of: str = "AV") -> Figure:
    """Both protocols' K-curves with their nulls, floors and ceilings; ``of`` names whose texts they are."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for ax, (protocol, column) in zip(axes, columns.items()):
        k_curve_panel(ax, column.to_json(), scales[protocol], backbone, f"{protocol}, M = {column.n}", of)
    same_limits(axes)
    fig.legend(*axes[0].get_legend_handles_labels(), ncols=3, loc="outside lower center")
    return fig


@styled
def spearman_histogram(columns: Mapping[str, Column], backbone: str) -> Figure:
    """Distribution over targets of Spearman(mean log-probability, oracle score)."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained", sharey=True)
    for ax, (protocol, column) in zip(axes, columns.items()):
        values = column.per_target[SPEARMAN.key]
        ax.hist(values[np.isfinite(values)], bins=np.linspace(-1, 1, 21), color=colour(backbone))
        ax.axvline(np.nanmean(values), color="black", linestyle="--", linewidth=1)
        style(ax, "Spearman per target", "targets", f"{protocol}: mean {np.nanmean(values):+.3f}")
    return fig


def verbalizations(
    backbone: Backbone, targets: Targets, rollouts: Rollouts, protocol: Protocol, chosen: Optional[Sequence[int]] = None,
    best: int = 0, worst: int = 0,
) -> str:  # fmt: skip
    """Source, best rollout and greedy with their scores: of the ``chosen`` targets, or of the ``best`` and ``worst``
    by their best rollout."""
    score_MK = fve(rollouts.h(protocol), targets.v[rollouts.rows][:, None], targets.mu)
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


@styled
def score_histogram(targets: Targets, rollouts: Rollouts, protocol: Protocol, backbone: str) -> Figure:
    """Centred scores of all rollouts against their own target and against the other targets."""
    v, h = targets.v[rollouts.rows], rollouts.h(protocol)
    own = fve(h, v[:, None], targets.mu)
    other = [fve_matrix(np.delete(v, m, axis=0), h[m], targets.mu).ravel() for m in range(len(v))]
    fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
    bins = np.linspace(0, 1, 61)
    ax.hist(np.concatenate(other), bins=bins, density=True, color=NULL_GREY, alpha=0.6, label="another target")
    ax.hist(own.ravel(), bins=bins, density=True, color=colour(backbone), alpha=0.6, label="its own target")
    ax.legend()
    style(ax, "centred fve_nrm of a rollout", "density", protocol.name)
    return fig
