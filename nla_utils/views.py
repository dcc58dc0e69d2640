"""What the notebooks show: small tables of texts and plots of a run's arrays."""

from __future__ import annotations

from typing import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.evaluation import Column
from nla_utils.figures import NULL_GREY, colour, draw_compute, k_curve_panel, same_limits, style
from nla_utils.metrics import fve
from nla_utils.rollouts import RolloutSet
from nla_utils.targets import Targets, unrelated_cosines

WIDTH = 160


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"


def texts_table(backbone: Backbone, rows: Sequence[tuple[str, Sequence[int]]]) -> str:
    """Labelled token sequences as text, one line each."""
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {_one_line(backbone.decode_text(ids))}" for label, ids in rows)


def lengths_and_norms(targets: Targets, backbone: Backbone) -> Figure:
    """Histograms of sequence length and of ‖v‖."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    c = colour(backbone.name)
    left.hist(targets.lengths, bins=np.arange(targets.ids.shape[1] + 2) - 0.5, color=c)
    style(left, "sequence length (tokens)", "sequences")
    right.hist(np.linalg.norm(targets.v, axis=1), bins=40, color=c)
    right.axvline(np.linalg.norm(targets.mu), color="black", linestyle="--", label="‖μ‖")
    right.legend(frameon=False)
    style(right, "‖v‖", "targets")
    return fig


def cosine_histograms(targets: Targets, backbone: Backbone) -> Figure:
    """Cosines of unrelated pairs: raw they crowd far from 0, centred they sit around 0."""
    fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
    bins = np.linspace(-1, 1, 81)
    ax.hist(unrelated_cosines(targets, False), bins=bins, color=NULL_GREY, alpha=0.7, label="raw")
    ax.hist(unrelated_cosines(targets, True), bins=bins, color=colour(backbone.name), alpha=0.7, label="centred")
    ax.legend(frameon=False)
    style(ax, "cosine of two unrelated targets", "pairs")
    return fig


def training_curves(training: dict, backbone: Backbone) -> Figure:
    """Loss by step, and both validation criteria."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    c = colour(backbone.name)
    left.plot(range(1, len(training["loss"]) + 1), training["loss"], color=c, linewidth=1)
    style(left, "step", "cross-entropy (nats / token)")
    steps = [r["step"] for r in training["validation"]]
    criteria = (("fve_nrm", "raw, no BOS (kept by this)", "o-"), ("fve_nrm_cen", "centred, with BOS", "s--"))
    for key, label, line in criteria:
        right.plot(steps, [r[key] for r in training["validation"]], line, color=c, label=label)
    right.legend(frameon=False, fontsize=8)
    style(right, "step", "validation fve_nrm, greedy")
    return fig


def bars(rows: Sequence[tuple[str, dict, str]], backbone: Backbone, x: str) -> Figure:
    """Horizontal points with intervals: (label, column as JSON, key)."""
    fig, ax = plt.subplots(figsize=(7, 0.32 * len(rows) + 0.9), layout="constrained")
    for i, (label, column, key) in enumerate(reversed(rows)):
        low, high = column["ci95"][key]
        control = label.startswith("control")
        color = NULL_GREY if control else colour(backbone.name)
        ax.plot([low, high], [i, i], color=color, linewidth=2)
        ax.plot(column[key], i, "s" if control else "o", color=color)
        ax.annotate(f"{column[key]:.3f}", (high, i), textcoords="offset points", xytext=(5, -3), fontsize=8)
    ax.set_yticks(range(len(rows)), [label for label, _, _ in reversed(rows)], fontsize=8)
    ax.margins(x=0.12)
    style(ax, x, "")
    return fig


def ablation_table(steps: dict, keys: Sequence[str]) -> pd.DataFrame:
    """Value of each quantity after each correction, ``in_order`` and ``alone``, and its change from the step
    before (in order) or from ``paper`` (alone)."""
    rows = {}
    for way, columns in steps.items():
        before = start = columns["paper"]
        for slip, column in columns.items():
            reference = before if way == "in_order" else start
            rows[way, slip] = {k: f"{column[k]:.3f} ({column[k] - reference[k]:+.3f})" for k in keys}
            before = column
    return pd.DataFrame(rows).T


def compute_panel(curves: dict[str, list[dict]], backbone: str) -> Figure:
    """Centred score against forward tokens per target."""
    fig, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    draw_compute(ax, curves, colour(backbone), "held out, corrected")
    return fig


def k_curves(columns: dict[str, Column], scales: dict[str, dict], backbone: str, of: str = "AV") -> Figure:
    """Both protocols' K-curves with their nulls, floors and ceilings; ``of`` names whose texts they are."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for ax, (protocol, column) in zip(axes, columns.items()):
        k_curve_panel(ax, column.to_json(), scales[protocol], colour(backbone), protocol, of)
    same_limits(axes)
    return fig


def spearman_histogram(columns: dict[str, Column], backbone: str) -> Figure:
    """Distribution over targets of Spearman(mean log-probability, oracle score)."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained", sharey=True)
    for ax, (protocol, column) in zip(axes, columns.items()):
        values = column.per_target["spearman_logp_vs_oracle_cen_mean"]
        ax.hist(values[np.isfinite(values)], bins=np.linspace(-1, 1, 21), color=colour(backbone))
        ax.axvline(np.nanmean(values), color="black", linestyle="--", linewidth=1)
        style(ax, "Spearman per target", "targets", f"{protocol}: mean {np.nanmean(values):+.3f}")
    return fig


def verbalizations(
    backbone: Backbone, targets: Targets, rollouts: RolloutSet, protocol: str, n: int, worst: bool = False
) -> str:
    """The n best (or worst) targets by their best rollout: source, best rollout, greedy, with scores."""
    score_MK = fve(rollouts.h(protocol), targets.v[rollouts.rows][:, None], targets.mu)
    best_M = score_MK[:, 1:].max(axis=1)
    order = np.argsort(best_M if worst else -best_M)[:n]
    blocks = []
    for m in order:
        k = 1 + int(score_MK[m, 1:].argmax())
        rows = [
            ("source", targets.sequence(rollouts.rows[m])),
            (f"best of K {score_MK[m, k]:.3f}", rollouts.sequence(m, k)),
            (f"greedy    {score_MK[m, 0]:.3f}", rollouts.sequence(m, 0)),
        ]
        blocks.append(texts_table(backbone, rows))
    return "\n\n".join(blocks)


def score_histogram(targets: Targets, rollouts: RolloutSet, protocol: str, backbone: Backbone) -> Figure:
    """Centred scores of all rollouts against their own target and against the other targets."""
    v = targets.v[rollouts.rows]
    own = fve(rollouts.h(protocol), v[:, None], targets.mu)
    other = np.concatenate([
        metrics.fve_matrix(np.delete(v, m, axis=0), rollouts.h(protocol)[m], targets.mu).ravel() for m in range(len(v))
    ])
    fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
    bins = np.linspace(0, 1, 61)
    ax.hist(other, bins=bins, density=True, color=NULL_GREY, alpha=0.6, label="another target")
    ax.hist(own.ravel(), bins=bins, density=True, color=colour(backbone.name), alpha=0.6, label="its own target")
    ax.legend(frameon=False)
    style(ax, "centred fve_nrm of a rollout", "density", protocol)
    return fig
