"""Runs that differ in layer or in seed alone: what depth does, and how far seeds spread."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nla_utils.figures import NULL_GREY, colour, style
from nla_utils.results import (
    BEST_MINUS_OTHERS,
    BEST_MINUS_UNRELATED,
    DEPTH,
    GREEDY_MINUS_OTHERS,
    GREEDY_MINUS_RETRIEVAL,
    RunResults,
    optional_results,
)
from nla_utils.tables import number, over_seeds, with_interval

MEANING = "paraphrase_bestof8_cen_fve_mean_minus_unrelated_text_bestof8_cen_fve_mean"
# (label, results file, key), all under ``corrected``.
SEED_ROWS = (
    ("paraphrase best-of-8", "oracle_ceiling", "paraphrase_bestof8_cen_fve_mean"),
    ("greedy", "centered_eval", "adapter_cen_greedy_mean"),
    ("greedy − greedy of other targets", "centered_eval", GREEDY_MINUS_OTHERS),
    ("best-of-K", "centered_eval", "adapter_cen_bestofK_mean"),
    ("best-of-K − unrelated best-of-K", "centered_eval", BEST_MINUS_UNRELATED),
    ("slope per doubling", "rerank_eval", "slope_per_doubling_cen"),
    ("NN-retrieval", "centered_eval", "nn_retrieval_cen_mean"),
)  # fmt: skip
READER_ROWS = (
    ("tail reader, greedy", "adapter_cen_greedy_mean"),
    ("tail reader, greedy − NN-retrieval", GREEDY_MINUS_RETRIEVAL),
)
LEAST_LAYERS = 2
# Between two names at the ends of curves, as a share of the axis.
LEAST_GAP = 0.04
READER_WIDTH = 2.5
DOTTED_TWICE = (0, (5, 1, 1, 1, 1, 1))
# (label, protocol, results file, key, line). What text can reach needs no AV, nor does the reader need training.
TEXT_CURVES = (
    ("tail oracle, last 8", "corrected", "oracle_ceiling", "tail_oracle_8_cen_fve_mean", "--"),
    ("NN-retrieval", "corrected", "centered_eval", "nn_retrieval_cen_mean", "-."),
    ("replay, as published", "paper", "oracle_ceiling", "replay_cen_fve_mean", ":"),
    ("paraphrase, best of 8", "corrected", "oracle_ceiling", "paraphrase_bestof8_cen_fve_mean", DOTTED_TWICE),
    ("tail reader, greedy", "reader", "centered_eval", "adapter_cen_greedy_mean", "-"),
    ("unrelated texts, best-of-K", "corrected", "centered_eval", "unrelated_text_cen_bestofK_mean", "-"),
)  # fmt: skip
AV_CURVE = ("AV, best-of-K", "corrected", "centered_eval", "adapter_cen_bestofK_mean")
# What of the AV's score is owed to v.
AV_DIFFERENCES = (
    ("AV − unrelated texts, best-of-K", BEST_MINUS_UNRELATED),
    ("AV − AV of other targets, best-of-K", BEST_MINUS_OTHERS),
    ("AV − AV of other targets, greedy", GREEDY_MINUS_OTHERS),
)
# A column by protocol and results file.
Columns = Callable[[str, str], dict]


@dataclass(frozen=True)
class Depth:
    """Runs of several layers that are otherwise alike, by layer, and what ``nla depth`` found of text alone, if it
    was asked: ``{"K", "layers", …}``, at more layers, from sequences of its own."""

    runs: dict[int, RunResults]
    record: Optional[dict]

    @property
    def title(self) -> str:
        return title(self.runs)

    @property
    def by_seed(self) -> dict[int, list[int]]:
        """Layers where an AV was trained, by seed; first the seed of the record, which shares its sequences."""
        order = sorted({run.seed for run in self.runs.values()}, key=lambda s: (s != _seed(self.record), s))
        return {seed: [layer for layer, run in self.runs.items() if run.seed == seed] for seed in order}

    @property
    def texts(self) -> dict[int, Columns]:
        """Columns of what text can reach, the reader's among it, by layer."""
        if self.record is None:
            return self.evaluated
        layers = {int(layer): columns for layer, columns in self.record["layers"].items()}
        return {layer: lambda protocol, _, c=columns: c[protocol] for layer, columns in sorted(layers.items())}

    @property
    def evaluated(self) -> dict[int, Columns]:
        """Columns of the runs, by layer."""
        return {layer: lambda protocol, name, r=run: _column(r, protocol, name) for layer, run in self.runs.items()}


def _seed(record: Optional[dict]) -> Optional[int]:
    return record and record["identity"]["seed"]


def seed_groups(runs: Sequence[RunResults]) -> list[dict[int, RunResults]]:
    """Runs of at least two seeds that are otherwise alike, by seed."""
    return _groups(runs, lambda r: (r.backbone, r.family, r.layer), lambda r: r.seed, 2)


def depth_record(run: RunResults) -> Optional[dict]:
    """What ``nla depth`` found of text alone, if it was asked."""
    return optional_results(run, DEPTH)


def depths(runs: Sequence[RunResults]) -> list[Depth]:
    """Every set of runs that says something about depth: of several layers, or with a record of text alone.

    Beside a record stand runs of any seed, of each layer the one that shares the record's where there is one.
    """
    recorded = {(r.backbone, r.family): record for r in runs if (record := depth_record(r))}
    others = [r for r in runs if (r.backbone, r.family) not in recorded]
    swept = _groups(others, lambda r: (r.backbone, r.family, r.seed), lambda r: r.layer, LEAST_LAYERS)
    found = [_beside([r for r in runs if (r.backbone, r.family) == family], recorded[family]) for family in sorted(recorded)]
    return found + [Depth(group, None) for group in swept]


def _beside(runs: Sequence[RunResults], record: dict) -> Depth:
    chosen: dict[int, RunResults] = {}
    for run in sorted(runs, key=lambda r: (r.seed != _seed(record), r.seed)):
        chosen.setdefault(run.layer, run)
    return Depth(dict(sorted(chosen.items())), record)


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


def depth_table(depth: Depth) -> pd.DataFrame:
    """One row a layer: ‖μ‖, the raw floor, what text can reach there, and what an AV reaches where one was trained."""
    rows, (label, protocol, name, key) = [], AV_CURVE
    for layer, columns in depth.texts.items():
        of_pool = columns("corrected", "oracle_ceiling")
        row = {"layer": layer, "‖μ‖": number(of_pool["mu_norm"], 1)}
        row["raw floor"] = number(of_pool["random_floor_raw_fve_mean"])
        row |= {text: with_interval(columns(p, file), k) for text, p, file, k, _ in TEXT_CURVES}
        row["paraphrase − unrelated, best of 8"] = with_interval(of_pool, MEANING)
        row["reader − NN-retrieval"] = with_interval(columns("reader", "centered_eval"), GREEDY_MINUS_RETRIEVAL)
        if layer in depth.runs:
            of_av = depth.evaluated[layer](protocol, name)
            row |= {heading: with_interval(of_av, k) for heading, k in ((label, key), *AV_DIFFERENCES)}
        rows.append(row)
    return pd.DataFrame(rows).set_index("layer").fillna("–")


def figure_7(runs: Sequence[RunResults]) -> Figure:
    """Against depth: centred scores, ‖μ‖, raw floor; one row for each backbone that was looked at by depth."""
    found = depths(runs)
    fig, axes = plt.subplots(len(found), 3, figsize=(12, 4.4 * len(found)), layout="constrained", squeeze=False,
                             width_ratios=(2.4, 1, 1))  # fmt: skip
    for row, depth in zip(axes, found):
        shade = colour(next(iter(depth.runs.values())).backbone)
        _draw_scores(row[0], depth, shade)
        style(row[0], "layer", "centred fve_nrm", depth.title)
        of_pool = {layer: columns("corrected", "oracle_ceiling") for layer, columns in depth.texts.items()}
        for ax, key, label in ((row[1], "mu_norm", "‖μ‖"), (row[2], "random_floor_raw_fve_mean", "raw floor")):
            ax.plot(list(of_pool), [c[key] for c in of_pool.values()], "o-", color=shade, markersize=4)
            style(ax, "layer", label)
        for ax in row:
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


def _draw_scores(ax: Axes, depth: Depth, shade: str) -> None:
    """Curves and bands of text, named at their ends; points with intervals of the AV, named beside the last."""
    ends = {}
    for label, protocol, name, key, line in TEXT_CURVES:
        x, y, low, high = _series(depth.texts, protocol, name, key)
        color = NULL_GREY if label.startswith("unrelated") else shade
        ax.plot(x, y, linestyle=line, linewidth=READER_WIDTH if protocol == "reader" else None, color=color, label=label)
        ax.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        ends[label] = (y[-1], color)
    for label, y in _apart({label: y for label, (y, _) in ends.items()}, LEAST_GAP * np.ptp(ax.get_ylim())).items():
        ax.annotate(label, (x[-1], y), (8, 0), textcoords="offset points", fontsize=7, va="center", color=ends[label][1])
    label, protocol, name, key = AV_CURVE
    x, y, low, high = _series(depth.evaluated, protocol, name, key)
    ax.errorbar(x, y, [y - low, high - y], fmt="o", color="black", markersize=4, label=label)
    ax.annotate(label, (x[-1], y[-1]), (5, 5), textcoords="offset points", fontsize=7)


def _apart(heights: dict[str, float], gap: float) -> dict[str, float]:
    """The heights, those that are closer than ``gap`` pushed upwards."""
    placed: dict[str, float] = {}
    for label, y in sorted(heights.items(), key=lambda item: item[1]):
        placed[label] = max(y, max(placed.values(), default=-np.inf) + gap)
    return placed


def _series(by_layer: dict[int, Columns], protocol: str, name: str, key: str) -> tuple[np.ndarray, ...]:
    """(layers, means, lower and upper ends of their intervals)."""
    columns = [of(protocol, name) for of in by_layer.values()]
    low, high = np.array([c["ci95"][key] for c in columns]).T
    return np.array(list(by_layer)), np.array([c[key] for c in columns]), low, high
