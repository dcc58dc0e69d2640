"""Runs that differ in layer or in seed alone: what depth does, and how far seeds spread."""

from __future__ import annotations

from typing import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_utils.figures import NULL_GREY, colour, style
from nla_utils.results import RunResults
from nla_utils.tables import number, over_seeds, with_interval

GAP = "adapter_cen_bestofK_mean_minus_unrelated_text_cen_bestofK_mean"
RETRIEVAL = "adapter_cen_greedy_mean_minus_nn_retrieval_cen_mean"
# (label, results file, key), all under ``corrected``.
SEED_ROWS = (
    ("paraphrase best-of-8", "oracle_ceiling", "paraphrase_bestof8_cen_fve_mean"),
    ("greedy", "centered_eval", "adapter_cen_greedy_mean"),
    ("greedy − greedy of other targets", "centered_eval", "adapter_cen_greedy_mean_minus_shuffled_v_cen_greedy_mean"),
    ("best-of-K", "centered_eval", "adapter_cen_bestofK_mean"),
    ("best-of-K − unrelated best-of-K", "centered_eval", GAP),
    ("slope per doubling", "rerank_eval", "slope_per_doubling_cen"),
    ("NN-retrieval", "centered_eval", "nn_retrieval_cen_mean"),
)  # fmt: skip
READER_ROWS = (
    ("tail reader, greedy", "adapter_cen_greedy_mean"),
    ("tail reader, greedy − NN-retrieval", RETRIEVAL),
)
LEAST_LAYERS = 2
# (label, protocol, results file, key, line)
DEPTH_CURVES = (
    ("replay, as published", "paper", "oracle_ceiling", "replay_cen_fve_mean", ":"),
    ("tail oracle, last 8", "corrected", "oracle_ceiling", "tail_oracle_8_cen_fve_mean", "--"),
    ("tail reader, greedy", "reader", "centered_eval", "adapter_cen_greedy_mean", "-."),
    ("AV, best-of-K", "corrected", "centered_eval", "adapter_cen_bestofK_mean", "-"),
    ("unrelated texts, best-of-K", "corrected", "centered_eval", "unrelated_text_cen_bestofK_mean", "-"),
)


def seed_groups(runs: Sequence[RunResults]) -> list[dict[int, RunResults]]:
    """Runs of at least two seeds that are otherwise alike, by seed."""
    return _groups(runs, lambda r: (r.backbone, r.family, r.layer), lambda r: r.seed, 2)


def layer_groups(runs: Sequence[RunResults]) -> list[dict[int, RunResults]]:
    """Runs of several layers that are otherwise alike, by layer."""
    return _groups(runs, lambda r: (r.backbone, r.family, r.seed), lambda r: r.layer, LEAST_LAYERS)


def _groups(runs: Sequence[RunResults], alike, varied, least: int) -> list[dict[int, RunResults]]:
    groups: dict[tuple, dict[int, RunResults]] = {}
    for run in runs:
        groups.setdefault(alike(run), {})[varied(run)] = run
    return [dict(sorted(group.items())) for _, group in sorted(groups.items()) if len(group) >= least]


def title(group: dict[int, RunResults]) -> str:
    """The backbone, and what the names of the group's runs have in common."""
    first, *others = group.values()
    shared = [p for p in first.profile.split("-") if all(p in run.profile.split("-") for run in others)]
    return f"{first.backbone} · {'-'.join(shared)}"


def seeds_table(group: dict[int, RunResults]) -> pd.DataFrame:
    """Each seed with its interval over targets, and the spread over seeds; held out, ``corrected``, centred."""
    rows = {
        label: {seed: (run.column(name, "corrected"), key) for seed, run in group.items()}
        for label, name, key in SEED_ROWS
    }
    rows |= {label: {seed: (reader_column(run), key) for seed, run in group.items()} for label, key in READER_ROWS}
    return over_seeds(rows)


def reader_column(run: RunResults) -> dict:
    return run.data["centered_eval"]["reader"]["corrected"]


def _column(run: RunResults, protocol: str, name: str) -> dict:
    return reader_column(run) if protocol == "reader" else run.column(name, protocol)


def depth_table(group: dict[int, RunResults]) -> pd.DataFrame:
    """One row a layer: what text can reach there, what the verbalizers reach, ‖μ‖ and the raw floor."""
    rows = []
    for layer, run in group.items():
        ceilings = run.column("oracle_ceiling", "corrected")
        row = {"layer": layer, "‖μ‖": number(ceilings["mu_norm"], 1)}
        row["raw floor"] = number(ceilings["random_floor_raw_fve_mean"])
        row |= {label: with_interval(_column(run, p, name), key) for label, p, name, key, _ in DEPTH_CURVES}
        evaluation = run.column("centered_eval", "corrected")
        row["AV − unrelated, best-of-K"] = with_interval(evaluation, GAP)
        row["reader − NN-retrieval"] = with_interval(reader_column(run), RETRIEVAL)
        rows.append(row)
    return pd.DataFrame(rows).set_index("layer")


def figure_7(runs: Sequence[RunResults]) -> Figure:
    """Against depth: centred scores, ‖μ‖, raw floor; one row for each backbone that was swept."""
    groups = layer_groups(runs)
    fig, axes = plt.subplots(len(groups), 3, figsize=(12, 3.8 * len(groups)), layout="constrained", squeeze=False,
                             width_ratios=(2, 1, 1))  # fmt: skip
    for row, group in zip(axes, groups):
        shade = colour(next(iter(group.values())).backbone)
        _draw_scores(row[0], group, shade)
        style(row[0], "layer", "centred fve_nrm", title(group))
        columns = [run.column("oracle_ceiling", "corrected") for run in group.values()]
        for ax, key, label in ((row[1], "mu_norm", "‖μ‖"), (row[2], "random_floor_raw_fve_mean", "raw floor")):
            ax.plot(list(group), [c[key] for c in columns], "o-", color=shade)
            style(ax, "layer", label)
    return fig


def _draw_scores(ax: Axes, group: dict[int, RunResults], shade: str) -> None:
    for label, protocol, name, key, line in DEPTH_CURVES:
        columns = [_column(run, protocol, name) for run in group.values()]
        low, high = np.array([c["ci95"][key] for c in columns]).T
        color = NULL_GREY if label.startswith("unrelated") else shade
        ax.plot(list(group), [c[key] for c in columns], line, marker="o", markersize=3, color=color, label=label)
        ax.fill_between(list(group), low, high, color=color, alpha=0.12, linewidth=0)
    ax.legend(frameon=False, fontsize=7)
