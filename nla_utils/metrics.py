"""Pure functions on arrays, and summaries of them with intervals (PROTOCOL.md §1, §8)."""

from __future__ import annotations

import functools
import math
from typing import Optional, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri, stdtrit
from scipy.stats import false_discovery_control, rankdata

Array = NDArray[np.floating]

N_RESAMPLES = 10_000
BOOTSTRAP_SEED = 20_240
NORMAL_95 = float(ndtri(0.975))


def _unit(x: Array, mu: Optional[Array] = None, out: Optional[Array] = None) -> Array:
    """x − μ, without its part along ``out``, at norm 1; a zero vector stays one."""
    x = np.asarray(x, dtype=np.float64)
    if mu is not None:
        x = x - mu
    if out is not None:
        x = x - (x @ out)[..., None] * out
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm == 0, 1.0, norm)


def fve(h: Array, v: Array, mu: Optional[Array] = None, out: Optional[Array] = None) -> Array:
    """½ (1 + cos(h − μ, v − μ)) over the last axis, in [0, 1]; raw where ``mu`` is ``None``.

    ``h`` and ``v`` broadcast against each other; a zero vector has cosine 0 with everything. ``out``: a direction (d,)
    at norm 1 that is projected out of both once they are centred.
    """
    return np.clip(0.5 * (1.0 + (_unit(h, mu, out) * _unit(v, mu, out)).sum(axis=-1)), 0.0, 1.0)


def variance_explained(h: Array, v: Array, predictor: Array) -> Array:
    """1 − ‖ĥ − v̂‖² / ‖v̂ − m‖² over the last axis, ĥ and v̂ at norm 1, m the ``predictor``: the mean of a pool's v̂.

    1 where h has v's direction, 0 where it is no better a guess than m, below 0 where it is a worse one.
    """
    h, v = _unit(h), _unit(v)
    return 1 - ((h - v) ** 2).sum(axis=-1) / ((v - predictor) ** 2).sum(axis=-1)


def mean_direction(pool_Pd: Array) -> Array:
    """Mean (d,) of a pool's activations at norm 1: what :func:`variance_explained` compares with."""
    return _unit(pool_Pd).mean(axis=0)


def fve_matrix(a_Nd: Array, b_Md: Array, mu: Optional[Array] = None, out: Optional[Array] = None) -> Array:
    """fve of every row of ``a`` against every row of ``b``, (N, M)."""
    return np.clip(0.5 * (1.0 + _unit(a_Nd, mu, out) @ _unit(b_Md, mu, out).T), 0.0, 1.0)


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
    return ordered_MK @ np.stack([expected_max_weights(ordered_MK.shape[1], k) for k in ks], axis=1)


def expected_max_weights(n: int, k: int) -> Array:
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


# Bits at K, pool P (PROTOCOL.md §11).


def limits_of_bits(k: int, p: int) -> tuple[float, float]:
    """The least and the most bits that P unrelated texts can tell of a best of k: one text, and all of them."""
    return 0.0 - math.log2(k), math.log2(p / k)


def bits(score: float | Array, ks: Sequence[int], null_J: Array, k: int) -> float | Array:
    """log₂ K₀ − log₂ k, where the best of K₀ unrelated texts scores as much as a best of k: how many doublings of k
    unrelated texts it is worth. Of several null curves (R, J) all at once (R,), with a score each or one for all.

    ``null_J`` is the null's mean curve at ``ks``, joined by lines against log₂; NaN, which ends it where there are too
    few texts, is left out. Beyond its ends the figure is that of the end (:func:`limits_of_bits`): nothing is
    extrapolated.
    """
    log2_J, null_J, score = np.log2(ks), np.asarray(null_J, dtype=np.float64), np.asarray(score)[..., None]
    last = np.isfinite(null_J).sum(axis=-1, keepdims=True) - 1
    left = np.clip((null_J <= score).sum(axis=-1, keepdims=True) - 1, 0, last)
    right = np.minimum(left + 1, last)
    lower, upper = (np.take_along_axis(null_J, at, axis=-1) for at in (left, right))
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(upper > lower, np.clip((score - lower) / (upper - lower), 0, 1), 0)
    found = log2_J[left] + share * (log2_J[right] - log2_J[left]) - math.log2(k)
    return found[..., 0] if found.ndim > 1 else float(found[0])


def bits_of_means(values: tuple[Array, Array, Array, Sequence[int], int]) -> tuple[float, list[float]]:
    """Bits of a best of k (M,) against its null's curve (M, J) at ``ks``, and an interval.

    Targets are resampled together with their null rows. The pool is never resampled, which would be biased: what
    another pool would move is a jackknife's, from the curves without one block of it each (M, B, J). The two are added
    as independent errors are.
    """
    score_M, null_MJ, left_out_MBJ, ks, k = values
    known = np.isfinite(score_M) & np.isfinite(null_MJ[:, 0])
    if not known.any():
        return math.nan, [math.nan, math.nan]
    parts = bits_again((score_M[known], null_MJ[known], left_out_MBJ[known], ks, k))
    return parts[0], [float(x) for x in np.clip(interval_of_bits(*parts), *limits_of_bits(k, ks[-1]))]


def bits_again(values: tuple[Array, Array, Array, Sequence[int], int]) -> tuple[float, Array, Array]:
    """Bits of a best of k, those of each resample of the targets (R,), and without each block of the pool (B,)."""
    score_M, null_MJ, left_out_MBJ, ks, k = values
    found = bits(score_M.mean(), ks, null_MJ.mean(axis=0), k)
    blocks_B = bits(score_M.mean(), ks, left_out_MBJ.mean(axis=0), k)
    return found, bits(bootstrap_means(score_M), ks, bootstrap_means(null_MJ), k), blocks_B


def interval_of_bits(found: float, resampled_R: Array, blocks_B: Array) -> list[float]:
    """95 % interval of a figure in bits, or of a difference of two, from :func:`bits_again`."""
    pool = NORMAL_95 * math.sqrt((len(blocks_B) - 1) * blocks_B.var())
    ends = zip((-1, 1), interval(resampled_R))
    return [float(found + sign * math.hypot(end - found, pool)) for sign, end in ends]


def surprise_of_rank(closer: Array, p: int) -> Array:
    """−log₂((r + 1) / (P + 1)) of a text that r of P unrelated texts equal or beat."""
    return -np.log2((np.asarray(closer, dtype=np.float64) + 1) / (p + 1))


@functools.lru_cache(maxsize=4)
def expected_surprise(p: int) -> tuple[Array, Array]:
    """(log₂ x, the surprise that the best of x unrelated texts has on average), for x from 1 to P.

    Pr(r ≥ j | x) = P! Γ(P + x − j + 1) / [(P − j)! Γ(P + x + 1)]: all P + x texts are in random order.
    """
    log2_x, j = np.linspace(0, math.log2(p), 1 + 16 * math.ceil(math.log2(p))), np.arange(p + 1)
    drops_P = -np.diff(surprise_of_rank(j, p))
    expected = []
    for x in 2**log2_x:
        log_tail = gammaln(p + 1) - gammaln(p - j + 1) + gammaln(p + x - j + 1) - gammaln(p + x + 1)
        expected.append(surprise_of_rank(0, p) - drops_P @ np.exp(log_tail[1:]))
    return log2_x, np.array(expected)


def bits_by_rank(values: tuple[Array, int, int]) -> tuple[float, list[float]]:
    """Bits of the best of k from its surprise (M,) among P unrelated texts: the number of texts whose best would have
    the same on average, over k. It does not change with any monotone change of the score."""
    surprise_M, p, k = values
    surprise_M = surprise_M[np.isfinite(surprise_M)]
    if not len(surprise_M):
        return math.nan, [math.nan, math.nan]
    log2_x, expected = expected_surprise(p)
    found, *ends = np.interp([surprise_M.mean(), *ci95(surprise_M)], expected, log2_x) - math.log2(k)
    return float(found), [float(x) for x in ends]


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
    return (_unit_ranks(a_MK) * _unit_ranks(b_MK)).sum(axis=1)


def permuted_spearman(a_MK: Array, b_MK: Array, n: int = 2_000, seed: int = BOOTSTRAP_SEED) -> Array:
    """Spearman per row with the order of b shuffled within each row, (n, M): what there is if the two are unrelated."""
    rng, a_MK, b_MK = np.random.default_rng(seed), _unit_ranks(a_MK), _unit_ranks(b_MK)
    return np.stack([(a_MK * rng.permuted(b_MK, axis=1)).sum(axis=1) for _ in range(n)])


def _unit_ranks(x_MK: Array) -> Array:
    """Ranks within each row, centred, at norm 1; NaN where a row is constant."""
    ranks_MK = rankdata(x_MK, axis=1) - (x_MK.shape[1] + 1) / 2
    with np.errstate(invalid="ignore"):
        return ranks_MK / np.linalg.norm(ranks_MK, axis=1, keepdims=True)


def p_of_null(values: Array, null_n: Array) -> Array:
    """Share of a null's draws that are at least as large, the value itself counted among them."""
    null_n = np.sort(null_n)
    return (1 + len(null_n) - np.searchsorted(null_n, values, "left")) / (1 + len(null_n))


def discoveries(p_M: Array, level: float = 0.05) -> tuple[int, int]:
    """How many p-values are discoveries at a false discovery rate by Benjamini and Hochberg's method, and by Benjamini
    and Yekutieli's, which holds however they depend on each other."""
    known = p_M[np.isfinite(p_M)]
    return tuple(int((false_discovery_control(known, method=name) <= level).sum()) for name in ("bh", "by"))


def share_of_discoveries(p_M: Array, level: float = 0.05) -> float:
    """Share of p-values that Benjamini and Hochberg's method takes for discoveries."""
    return discoveries(p_M, level)[0] / len(p_M)


def between_targets(rho_M: Array, k: int) -> float:
    """τ²: the variance of Spearman's ρ over targets less what k draws alone give, 1 / (k − 1)."""
    return float(rho_M.var(ddof=1) - 1 / (k - 1))


def signs_of_others(x_M: Array, rho_M: Array) -> Array:
    """For each target the sign that ρ has where x has its sign, learned from the other targets (M,); + if they tie."""
    by_sign_M = np.sign(x_M) * rho_M
    return np.sign(x_M) * np.where(by_sign_M.sum() - by_sign_M > -1e-9, 1, -1)


def picked(by_MK: Array, scores_MK: Array) -> Array:
    """The score of the text that ``by`` ranks first (M,)."""
    return np.take_along_axis(scores_MK, by_MK.argmax(axis=1)[:, None], axis=1)[:, 0]


def gain_of_choice(by_MK: Array, scores_MK: Array) -> Array:
    """The score of the text that ``by`` ranks first, less that of a random one (M,)."""
    return picked(by_MK, scores_MK) - scores_MK.mean(axis=1)


def t_interval(values_n: Array) -> list[float]:
    """95 % interval of a mean by Student's t: of trainings, of which there are few."""
    values_n = np.asarray(values_n, dtype=np.float64)
    half = stdtrit(len(values_n) - 1, 0.975) * values_n.std(ddof=1) / math.sqrt(len(values_n))
    return [float(values_n.mean() - half), float(values_n.mean() + half)]


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


def mean_of_known(values: Array, axis: Optional[int] = None) -> Array:
    """Mean of what is not NaN; NaN, and no warning, where nothing is left."""
    total = np.nansum(values, axis=axis)
    with np.errstate(invalid="ignore"):
        return total / (~np.isnan(values)).sum(axis=axis, dtype=total.dtype)


def mean(values_M: Array) -> tuple[float, list[float]]:
    """Mean over targets with its interval, NaN rows left out."""
    return float(mean_of_known(np.asarray(values_M))), ci95(values_M)


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
