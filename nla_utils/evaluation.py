"""Scores to the numbers of notebooks 03-05, under each protocol, with intervals and controls.

A :class:`Column` is one protocol's column of a results file. Every mean over targets is added with
its per-target values, so that its interval and paired differences come from the same resamples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from nla_utils import metrics
from nla_utils.config import FLOOR_ROWS, N_PARAPHRASES, TAIL_LENGTHS
from nla_utils.metrics import fve, fve_matrix
from nla_utils.readings import probe_lengths
from nla_utils.rollouts import RolloutSet, rows_at
from nla_utils.store import Artefact
from nla_utils.targets import Targets

TOP_N = 5


@dataclass
class Column:
    """One protocol's numbers: ``values`` by key, ``ci95`` for those that are means over targets."""

    protocol: str
    n: int
    values: dict = field(default_factory=dict)
    ci95: dict = field(default_factory=dict)
    per_target: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, key: str, values_M: np.ndarray) -> None:
        """A mean over targets, with its bootstrap interval; NaN rows are left out."""
        self.per_target[key] = np.asarray(values_M, dtype=np.float64)
        self.values[key] = float(np.nanmean(values_M))
        self.ci95[key] = metrics.ci95(values_M)

    def put(self, key: str, value: object) -> None:
        """A figure that is no mean over targets."""
        self.values[key] = value

    def difference(self, a: str, b: str) -> None:
        """``a`` − ``b``, paired by target."""
        self.add(f"{a}_minus_{b}", self.per_target[a] - self.per_target[b])

    def ratio(self, key: str, score_M: np.ndarray, floor_M: np.ndarray, ceiling_M: np.ndarray) -> None:
        """ρ of three means over targets, its interval from joint resamples of the three."""
        s, f, c = metrics.bootstrap_means(np.stack([score_M, floor_M, ceiling_M], axis=1)).T
        self.values[key] = float(metrics.rho(score_M.mean(), floor_M.mean(), ceiling_M.mean()))
        self.ci95[key] = [float(x) for x in np.percentile(metrics.rho(s, f, c), [2.5, 97.5])]

    def to_json(self) -> dict:
        return _without_nan(
            {"protocol": self.protocol, "n": self.n, **self.values, "ci95": self.ci95}
        )


def _without_nan(x):
    """NaN is not JSON: it becomes null."""
    if isinstance(x, dict):
        return {k: _without_nan(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_without_nan(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x


def score_ceilings(targets: Targets, ceilings: Artefact, protocol: str) -> Column:
    """Notebook 03 (PROTOCOL.md §5): replay, floor, NN, paraphrase, tail oracle, null; raw and centred.

    ``paper`` takes μ, floor and NN from the evaluated targets themselves (slip ``self_mu``);
    ``corrected`` takes them from the pool.
    """
    t = {k.split(".", 1)[1]: a for k, a in ceilings.tensors.items() if k.startswith(f"{protocol}.")}
    v = targets.v[targets.eval_rows(protocol)]
    pool = targets.v[targets.pool]
    mu_cen = v.mean(axis=0) if protocol == "paper" else targets.mu
    column = Column(protocol, len(v))
    column.put("mu_norm", float(np.linalg.norm(mu_cen)))
    column.put("mu_of", "the evaluated targets" if protocol == "paper" else "the pool")
    for kind, mu in (("raw", None), ("cen", mu_cen)):
        replay = fve(t["replay"], v, mu)
        column.add(f"replay_{kind}_fve_mean", replay)
        column.put(f"replay_{kind}_fve_p50", float(np.median(replay)))
        paraphrase = fve(t["paraphrase"], v[:, None], mu)
        column.add(f"paraphrase_bestof8_{kind}_fve_mean", paraphrase.max(axis=1))
        column.add(f"paraphrase_all_{kind}_fve_mean", paraphrase.mean(axis=1))
        column.add(f"nn_in_pool_{kind}_fve_mean", metrics.nearest_other(v, mu))
        column.add(f"nn_large_pool_{kind}_fve_mean", fve_matrix(v, pool, mu).max(axis=1))
        floor = metrics.pair_floor(v, mu) if protocol == "paper" else fve_matrix(v, pool, mu).mean(axis=1)
        column.add(f"random_floor_{kind}_fve_mean", floor)
        null = metrics.exact_k_curve(fve_matrix(v, t["pool_h"], mu), [N_PARAPHRASES])[:, 0]
        column.add(f"unrelated_text_bestof8_{kind}_fve_mean", null)
        column.difference(f"paraphrase_bestof8_{kind}_fve_mean", f"unrelated_text_bestof8_{kind}_fve_mean")
        tail = fve(t["tail"], v[:, None], mu)
        for j, n in enumerate(TAIL_LENGTHS):
            column.add(f"tail_oracle_{n}_{kind}_fve_mean", tail[:, j])
        column.add(f"gap_{kind}", paraphrase.max(axis=1) - floor)
    return column


def score_replay_ladder(targets: Targets, ceilings: Artefact) -> Column:
    """Centred replay of the same targets as one slip after the other is corrected; μ of the pool."""
    v = targets.v[targets.in_sample]
    column = Column("ladder", len(v))
    for name in ("published", "right_index", "same_ids_no_bos", "with_bos", "same_ids"):
        column.add(f"replay_cen_{name}", fve(ceilings.tensors[f"ladder.{name}"], v, targets.mu))
    return column


def score_rollouts(
    targets: Targets, rollouts: RolloutSet, ceilings: Artefact, readings: Artefact, protocol: str, ceiling_row: str
) -> Column:
    """Notebook 04 (PROTOCOL.md §4, §8): the AV's rows and their controls; raw, centred, ρ.

    Args:
        rollouts: of the targets to evaluate; ρ is added if they are the protocol's own.
        readings: holds the probe decode of the same targets.
        protocol: how to encode, and what ρ divides by.
        ceiling_row: the row of notebook 03 that ρ takes as ceiling in ``paper``.
    """
    v, pool, h = targets.v[rollouts.rows], targets.v[targets.pool], rollouts.h(protocol)
    k = h.shape[1] - 1
    column = Column(protocol, len(v))
    column.put("K", k)
    column.put("pool_size", len(pool))
    column.put("mu_norm", float(np.linalg.norm(targets.mu)))
    for kind, mu in (("raw", None), ("cen", targets.mu)):
        score = fve(h, v[:, None], mu)
        column.add(f"adapter_{kind}_greedy_mean", score[:, 0])
        column.add(f"adapter_{kind}_sampled_mean", score[:, 1:].mean(axis=1))
        column.add(f"adapter_{kind}_bestofK_mean", score[:, 1:].max(axis=1))
        column.add(f"adapter_{kind}_top5_mean", metrics.top_mean(score[:, 1:], TOP_N))
        column.add(f"nn_retrieval_{kind}_mean", fve_matrix(v, pool, mu).max(axis=1))
        _add_floor(column, kind, protocol, v, pool, mu)
        _add_controls(column, kind, v, h, ceilings.tensors[f"{protocol}.pool_h"], mu, k)
    column.add("constant_mu_raw_mean", fve(targets.mu, v))
    _add_probe(column, v, readings, rollouts.rows, protocol, targets.mu)
    hits, reciprocal = metrics.identification(h[:, 0], v, targets.mu)
    column.add("greedy_identification_top1", hits)
    column.add("greedy_identification_mrr", reciprocal)
    chance = float((1 / np.arange(1, len(v) + 1)).mean())
    # Top-1 hits are too few for a bootstrap interval (none at all gives one of no width); the rank is not.
    column.add("greedy_identification_mrr_minus_chance", reciprocal - chance)
    column.put("identification_chance_top1", 1 / len(v))
    column.put("shorter_than_limit_share", float((rollouts.lengths[:, 1:] < rollouts.ids.shape[2]).mean()))
    column.put("identification_chance_mrr", chance)
    # Ceilings were measured on the protocol's own targets; on other ones there is nothing to pair with.
    if np.array_equal(rollouts.rows, targets.eval_rows(protocol)):
        _add_against_ceilings(column, targets, rollouts, ceilings, protocol, ceiling_row)
    return column


def _add_floor(column: Column, kind: str, protocol: str, v, pool, mu) -> None:
    """``paper``: all ordered pairs of the pool's first 512. ``corrected``: each target against the pool."""
    key = f"random_floor_{kind}_mean"
    if protocol == "paper":
        rows = metrics.pair_floor(pool[:FLOOR_ROWS], mu)
        column.put(key, float(rows.mean()))
        column.ci95[key] = metrics.ci95(rows)
    else:
        column.add(key, fve_matrix(v, pool, mu).mean(axis=1))


def _add_controls(column: Column, kind: str, v, h, pool_h, mu, k: int) -> None:
    """Unrelated-text null at K, and the rollouts of other targets: what selection alone gives."""
    null = metrics.exact_k_curve(fve_matrix(v, pool_h, mu), [1, k])
    column.add(f"unrelated_text_{kind}_bestof1_mean", null[:, 0])
    column.add(f"unrelated_text_{kind}_bestofK_mean", null[:, 1])
    greedy, best = shuffled_scores(v, h, mu)
    column.add(f"shuffled_v_{kind}_greedy_mean", greedy)
    column.add(f"shuffled_v_{kind}_bestofK_mean", best)
    column.difference(f"adapter_{kind}_greedy_mean", f"shuffled_v_{kind}_greedy_mean")
    column.difference(f"adapter_{kind}_bestofK_mean", f"shuffled_v_{kind}_bestofK_mean")
    column.difference(f"adapter_{kind}_bestofK_mean", f"unrelated_text_{kind}_bestofK_mean")
    column.difference(f"adapter_{kind}_greedy_mean", f"nn_retrieval_{kind}_mean")


def _add_probe(column: Column, v, readings: Artefact, rows: np.ndarray, protocol: str, mu) -> None:
    """The probe's last n tokens, re-encoded as the protocol does, and greedy minus the longest of them."""
    h_RJd = readings.tensors["probe_h_nobos" if protocol == "paper" else "probe_h_bos"]
    h = h_RJd[rows_at(readings, rows)]
    lengths = probe_lengths(readings.tensors["probe_ids"].shape[1])
    for kind, center in (("raw", None), ("cen", mu)):
        for j, n in enumerate(lengths):
            column.add(f"probe_decode_{n}_{kind}_mean", fve(h[:, j], v, center))
    column.put("probe_length", lengths[-1])
    longest = column.per_target[f"probe_decode_{lengths[-1]}_cen_mean"]
    column.add("adapter_cen_greedy_minus_probe_decode", column.per_target["adapter_cen_greedy_mean"] - longest)


def add_unpaired(column: Column, key: str, a_M: np.ndarray, b_M: np.ndarray) -> None:
    """Mean of a − mean of b, two different sets of targets, with a bootstrap interval of each drawn apart."""
    column.put(key, float(a_M.mean() - b_M.mean()))
    gap_R = metrics.bootstrap_means(a_M) - metrics.bootstrap_means(b_M, seed=metrics.BOOTSTRAP_SEED + 1)
    column.ci95[key] = [float(x) for x in np.percentile(gap_R, [2.5, 97.5])]


def compare_in_sample(held_out: Column, in_sample: Column) -> None:
    """Adds to ``held_out`` what training on a target was worth: in-sample minus held-out, greedy and best-of-K.

    Both are taken above the rollouts of other targets, so that an easier set of targets does not count.
    """
    for row in ("greedy", "bestofK"):
        key = f"adapter_cen_{row}_mean_minus_shuffled_v_cen_{row}_mean"
        add_unpaired(held_out, f"in_sample_advantage_{row}", in_sample.per_target[key], held_out.per_target[key])


def shuffled_scores(v_Md, h_MKd, mu) -> tuple[np.ndarray, np.ndarray]:
    """Rollouts of every other target against this one: mean greedy (M,) and mean best-of-K (M,)."""
    m = len(v_Md)
    scores_MMK = np.stack([fve_matrix(v_Md, h_Kd, mu) for h_Kd in h_MKd], axis=1)
    other = ~np.eye(m, dtype=bool)
    greedy = scores_MMK[:, :, 0][other].reshape(m, m - 1).mean(axis=1)
    best = scores_MMK[:, :, 1:].max(axis=2)[other].reshape(m, m - 1).mean(axis=1)
    return greedy, best


def _add_against_ceilings(
    column: Column, targets: Targets, rollouts: RolloutSet, ceilings: Artefact, protocol: str, ceiling_row: str
) -> None:
    """ρ_cen, and the paired differences from paraphrase and floor.

    ``paper``: floor and ceiling of notebook 03, whatever K. ``corrected``: a ceiling drawn as often as the
    row it divides: one paraphrase for greedy, the best of 8 for the best of 8 rollouts.
    """
    scale = score_ceilings(targets, ceilings, protocol).per_target
    k = min(N_PARAPHRASES, column.values["K"])
    score_MK = fve(rollouts.h(protocol)[:, 1:], targets.v[rollouts.rows][:, None], targets.mu)
    column.add("adapter_cen_bestof8_mean", metrics.exact_k_curve(score_MK, [k])[:, 0])
    rows, floor = column.per_target, scale["random_floor_cen_fve_mean"]
    best_of_8 = scale["paraphrase_bestof8_cen_fve_mean"]
    column.add("adapter_cen_bestofK_minus_paraphrase_bestof8", rows["adapter_cen_bestofK_mean"] - best_of_8)
    column.add("adapter_cen_bestof8_minus_paraphrase_bestof8", rows["adapter_cen_bestof8_mean"] - best_of_8)
    raw_floor = scale["random_floor_raw_fve_mean"]
    column.add("adapter_raw_greedy_minus_random_floor", rows["adapter_raw_greedy_mean"] - raw_floor)
    if protocol == "paper":
        divisors = {"greedy": ceiling_row, "sampled": ceiling_row, "bestofK": ceiling_row}
        column.ratio("rho_cen_nn_retrieval", rows["nn_retrieval_cen_mean"], floor, scale[f"{ceiling_row}_cen_fve_mean"])
    else:
        divisors = {"greedy": "paraphrase_all", "sampled": "paraphrase_all", "bestof8": "paraphrase_bestof8"}
    for row, ceiling in divisors.items():
        column.ratio(f"rho_cen_{row}", rows[f"adapter_cen_{row}_mean"], floor, scale[f"{ceiling}_cen_fve_mean"])
