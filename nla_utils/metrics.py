"""Pure functions on arrays, and summaries of them with intervals (PROTOCOL.md §1, §8)."""

from __future__ import annotations

import functools
import math
from typing import Optional, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import rankdata

Array = NDArray[np.floating]

N_RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_240


def _unit(x: Array, mu: Optional[Array] = None) -> Array:
    """x − μ at norm 1; a zero vector stays one."""
    x = np.asarray(x, dtype=np.float64)
    if mu is not None:
        x = x - mu
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm == 0, 1.0, norm)


def fve(h: Array, v: Array, mu: Optional[Array] = None) -> Array:
    """½ (1 + cos(h − μ, v − μ)) over the last axis, in [0, 1]; raw where ``mu`` is ``None``.

    ``h`` and ``v`` broadcast against each other; a zero vector has cosine 0 with everything.
    """
    return np.clip(0.5 * (1.0 + (_unit(h, mu) * _unit(v, mu)).sum(axis=-1)), 0.0, 1.0)


def variance_explained(h: Array, v: Array, predictor: Array) -> Array:
    """1 − ‖ĥ − v̂‖² / ‖v̂ − m‖² over the last axis, ĥ and v̂ at norm 1, m the ``predictor``: the mean of a pool's v̂.

    1 where h has v's direction, 0 where it is no better a guess than m, below 0 where it is a worse one.
    """
    h, v = _unit(h), _unit(v)
    return 1 - ((h - v) ** 2).sum(axis=-1) / ((v - predictor) ** 2).sum(axis=-1)


def mean_direction(pool_Pd: Array) -> Array:
    """Mean (d,) of a pool's activations at norm 1: what :func:`variance_explained` compares with."""
    return _unit(pool_Pd).mean(axis=0)


def fve_matrix(a_Nd: Array, b_Md: Array, mu: Optional[Array] = None) -> Array:
    """fve of every row of ``a`` against every row of ``b``, (N, M)."""
    return np.clip(0.5 * (1.0 + _unit(a_Nd, mu) @ _unit(b_Md, mu).T), 0.0, 1.0)


def rho(score: float | Array, floor: float, ceiling: float) -> float | Array:
    """(score − floor) / (ceiling − floor): 0 at the floor, 1 at the ceiling."""
    return (score - floor) / (ceiling - floor)


def off_diagonal(scores_MM: Array) -> Array:
    """Each row without its entry on the diagonal (M, M − 1): scores against every other one."""
    m = len(scores_MM)
    return scores_MM[~np.eye(m, dtype=bool)].reshape(m, m - 1)


def k_values(k_max: int) -> list[int]:
    """1, 2, 4, … up to ``k_max``, which is always the last."""
    ks = [1 << i for i in range(k_max.bit_length()) if 1 << i <= k_max]
    return ks if ks[-1] == k_max else ks + [k_max]


def first_k_curve(scores_MK: Array, ks: Sequence[int]) -> Array:
    """Max over the first k columns, per target, (M, len(ks)): the paper's K-curve."""
    running_MK = np.maximum.accumulate(scores_MK, axis=1)
    return running_MK[:, [k - 1 for k in ks]]


def exact_k_curve(scores_MK: Array, ks: Sequence[int]) -> Array:
    """Expected maximum over all k-subsets of the columns, per target, (M, len(ks)); NaN for k > K.

    Σ_i s_(i) · C(i−1, k−1) / C(K, k), scores sorted ascending (PROTOCOL.md §8).
    """
    return _expected_max(np.sort(np.asarray(scores_MK, dtype=np.float64), axis=1), ks)


def _expected_max(ordered_MK: Array, ks: Sequence[int]) -> Array:
    return ordered_MK @ np.stack([_expected_max_weights(ordered_MK.shape[1], k) for k in ks], axis=1)


def _expected_max_weights(n: int, k: int) -> Array:
    """Weight of the i-th smallest of n scores in the expected maximum of k drawn without replacement; NaN for k > n."""
    if k > n:
        return np.full(n, np.nan)
    i = np.arange(1, n + 1)
    # For i < k gammaln(i − k + 1) is infinite, and the weight 0.
    log_choose = gammaln(i) - gammaln(k) - gammaln(i - k + 1)
    log_total = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    return np.exp(log_choose - log_total)


def curves_without_blocks(scores_MK: Array, ks: Sequence[int], n_blocks: int) -> Array:
    """The exact K-curve with each of ``n_blocks`` blocks of successive columns left out, (M, n_blocks · len(ks)), block
    after block; NaN where more are asked for than are left."""
    order_MK = np.argsort(scores_MK, axis=1)
    ordered_MK = np.take_along_axis(np.asarray(scores_MK, dtype=np.float64), order_MK, axis=1)
    m, curves = len(order_MK), []
    for block in np.array_split(np.arange(order_MK.shape[1]), n_blocks):
        kept_MK = (order_MK < block[0]) | (order_MK > block[-1]) if len(block) else np.ones_like(order_MK, dtype=bool)
        curves.append(_expected_max(ordered_MK[kept_MK].reshape(m, -1), ks))
    return np.concatenate(curves, axis=1)


def principal_directions(x_Nd: Array, n: int) -> Array:
    """The first n principal directions (n, d) of the rows about their mean, at norm 1, their largest entry positive."""
    x_Nd = np.asarray(x_Nd, dtype=np.float64)
    directions_nd = np.linalg.svd(x_Nd - x_Nd.mean(axis=0), full_matrices=False)[2][:n]
    largest = np.abs(directions_nd).argmax(axis=1)
    return directions_nd * np.sign(directions_nd[np.arange(len(directions_nd)), largest])[:, None]


def chance_of_rank(closer: int, stored: int, k: int) -> float:
    """p-value of the best of ``k`` texts where ``closer`` of ``stored`` unrelated texts score at least as much.

    If the k texts are as unrelated as the stored ones, all ``stored + k`` are in random order; the chance that at most
    ``closer`` stored ones come before the best of the k is 1 − C(stored, closer + 1) / C(stored + k, closer + 1). Its
    smallest value, with none closer, is k / (stored + k) (PROTOCOL.md §11).
    """
    return 1 - math.prod((stored - i) / (stored + k - i) for i in range(closer + 1))


def slope_per_doubling(ks: Sequence[int], curve_J: Array) -> tuple[float, float, float]:
    """Least-squares line of a curve against log₂ K: (slope, intercept, R²)."""
    x = np.log2(np.asarray(ks, dtype=np.float64))
    if len(x) < 2:
        return math.nan, math.nan, math.nan
    slope, intercept = np.polyfit(x, curve_J, 1)
    residual = curve_J - (slope * x + intercept)
    total = ((curve_J - np.mean(curve_J)) ** 2).sum()
    return float(slope), float(intercept), float(1 - (residual**2).sum() / total) if total else math.nan


def spearman_rows(a_MK: Array, b_MK: Array) -> Array:
    """Spearman correlation of a[i] with b[i] per row (M,); NaN where a row is constant."""
    ra = rankdata(a_MK, axis=1) - (a_MK.shape[1] + 1) / 2
    rb = rankdata(b_MK, axis=1) - (b_MK.shape[1] + 1) / 2
    size = np.sqrt((ra**2).sum(axis=1) * (rb**2).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(size > 0, (ra * rb).sum(axis=1) / size, np.nan)


def bootstrap_means(values_M: Array, resamples: int = N_RESAMPLES, seed: int = BOOTSTRAP_SEED) -> Array:
    """Means of ``resamples`` resamples over the first axis, (resamples, …), the same draw for equal M.

    Rows of two quantities of the same targets are thereby resampled together: paired.
    """
    values_M = np.asarray(values_M, dtype=np.float64)
    m = len(values_M)
    return _resample_counts(m, resamples, seed) @ values_M / m


@functools.lru_cache(maxsize=4)
def _resample_counts(m: int, resamples: int, seed: int) -> Array:
    """How often each of m targets is in each resample (resamples, m)."""
    counts = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=resamples)
    return counts.astype(np.float64)


def interval(resampled_R: Array) -> list[float]:
    """95 % percentile interval [low, high] of a resampled figure (R,)."""
    return [float(x) for x in np.percentile(resampled_R, [2.5, 97.5])]


def ci95(values_M: Array) -> list[float]:
    """95 % bootstrap interval of the mean over targets, NaN rows left out."""
    values_M = np.asarray(values_M, dtype=np.float64)
    values_M = values_M[np.isfinite(values_M)]
    return interval(bootstrap_means(values_M)) if len(values_M) else [math.nan, math.nan]


def mean(values_M: Array) -> tuple[float, list[float]]:
    """Mean over targets with its interval, NaN rows left out."""
    return float(np.nanmean(values_M)), ci95(values_M)


def rho_of_means(values_M3: Array) -> tuple[float, Optional[list[float]]]:
    """ρ of the means of score, floor and ceiling, its interval from joint resamples of the three; targets without a
    ceiling (NaN: their text is not known) are left out."""
    values_M3 = values_M3[~np.isnan(values_M3[:, 2])]
    if not len(values_M3):
        return math.nan, None
    return float(rho(*values_M3.mean(axis=0))), interval(rho(*bootstrap_means(values_M3).T))


def gap_of_means(values: tuple[Array, Array]) -> tuple[float, list[float]]:
    """Mean of a − mean of b, two different sets of targets, each resampled on its own."""
    a_M, b_M = values
    gap_R = bootstrap_means(a_M) - bootstrap_means(b_M, seed=BOOTSTRAP_SEED + 1)
    return float(a_M.mean() - b_M.mean()), interval(gap_R)


def rank_of_own(h_Md: Array, v_Md: Array, mu: Optional[Array] = None) -> Array:
    """Rank of v_i among the M targets for h_i (M,), 1 the closest. Ties count against it: a target that another one
    equals is not identified."""
    scores_MM = fve_matrix(h_Md, v_Md, mu)
    return (scores_MM >= np.diag(scores_MM)[:, None]).sum(axis=1)
