"""Notebook 05: K-curve, slope per doubling, cheap reranks, Spearman (PROTOCOL.md §6). Reads, never generates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nla_utils import metrics
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import Protocol
from nla_utils.scores import rows
from nla_utils.scores.column import Column, Scorer, interval

if TYPE_CHECKING:
    from nla_utils.stages.ceilings import Ceilings
    from nla_utils.stages.rollouts import Rollouts
    from nla_utils.stages.targets import Targets


def score_k_curve(targets: Targets, rollouts: Rollouts, ceilings: Ceilings, protocol: Protocol) -> Column:
    """K-curves and reranks of one protocol, of the protocol's own targets.

    ``paper`` takes the first K' columns; ``corrected`` the expected maximum over all K'-subsets. Both
    are reported (``kcurve_first_*``, ``kcurve_exact_*``); ``kcurve_oracle_top1_*`` is the protocol's own.
    """
    rollouts = rollouts.at(targets.eval_rows(protocol))
    v, pool, h = targets.v[rollouts.rows], targets.v[targets.pool], rollouts.h(protocol)
    ks = metrics.k_values(rollouts.k)
    column = Column(protocol.name, len(v))
    column.put("K", rollouts.k)
    column.put("ks", ks)
    for kind, mu in (("raw", None), ("cen", targets.mu)):
        scorer = Scorer(v, pool, mu)
        scores_MK = scorer.own(h)[:, 1:]
        first, exact = metrics.first_k_curve(scores_MK, ks), metrics.exact_k_curve(scores_MK, ks)
        null = scorer.best_unrelated(ceilings.texts[protocol.name].pool_h, ks)
        own = exact if protocol.all_subsets else first
        _add_curve(column, rows.CURVE.at(kind), ks, own)
        _add_curve(column, f"kcurve_first_{kind}", ks, first)
        _add_curve(column, f"kcurve_exact_{kind}", ks, exact)
        _add_curve(column, rows.CURVE_UNRELATED.at(kind), ks, null)
        _add_slope(column, rows.SLOPE.at(kind), ks, own)
        _add_slope(column, rows.SLOPE_UNRELATED.at(kind), ks, null)
        _add_slope(column, rows.SLOPE_MINUS_UNRELATED.at(kind), ks, own - null)
    shuffled = shuffled_k_curve(v, h[:, 1:], targets.mu, ks)
    _add_curve(column, rows.CURVE_OTHERS.key, ks, shuffled)
    _add_slope(column, rows.SLOPE_OTHERS.key, ks, shuffled)
    _add_reranks(column, Scorer(v, pool, targets.mu), h, rollouts.mean_logp(protocol), protocol)
    return column


def _add_curve(column: Column, key: str, ks: list[int], curve_MJ: np.ndarray) -> None:
    intervals = {str(k): metrics.ci95(curve_MJ[:, j]) for j, k in enumerate(ks)}
    column.put(key, {str(k): float(m) for k, m in zip(ks, curve_MJ.mean(axis=0))}, intervals)


def _add_slope(column: Column, key: str, ks: list[int], curve_MJ: np.ndarray) -> None:
    """Slope of the mean curve against log₂ K, with R², and its interval over resampled targets."""
    slope, intercept, r2 = metrics.slope_per_doubling(ks, curve_MJ.mean(axis=0))
    slopes_R = None if len(ks) < 2 else np.polyfit(np.log2(ks), metrics.bootstrap_means(curve_MJ).T, 1)[0]
    column.put(key, slope, None if slopes_R is None else interval(slopes_R))
    column.put(f"{key}_intercept", intercept)
    column.put(f"{key}_r2", r2)


def _add_reranks(column: Column, scorer: Scorer, h: np.ndarray, logp_MK: np.ndarray, protocol: Protocol) -> None:
    v, pool, at = scorer.v, scorer.pool, np.arange(len(scorer.v))
    raw, cen = fve(h, v[:, None]), scorer.own(h)
    column.add(rows.GREEDY.cen, cen[:, 0])
    column.add(rows.GREEDY.raw, raw[:, 0])
    raw, cen, h = raw[:, 1:], cen[:, 1:], h[:, 1:]
    column.add(rows.SAMPLED.cen, cen.mean(axis=1))
    pick = logp_MK.argmax(axis=1)
    column.put(rows.MEAN_LOGP.key, float(logp_MK.mean()))
    column.add(rows.LOGP_RERANK.raw, raw[at, pick])
    column.add(rows.LOGP_RERANK.cen, cen[at, pick])
    column.difference(rows.LOGP_RERANK.cen, rows.GREEDY.cen)
    anchor = pool[scorer.against_pool.argmax(axis=1)]
    nearest = fve(h, anchor[:, None], scorer.mu).argmax(axis=1)
    column.add(rows.ANCHOR_RERANK.cen, cen[at, nearest])
    column.difference(rows.ANCHOR_RERANK.cen, rows.GREEDY.cen)
    # Slip uncentred_anchor: the paper's row is labelled centred and computed raw.
    column.add(rows.ANCHOR.key, Scorer(v, pool, scorer.mu if protocol.centred_anchor else None).nearest)
    spearman = metrics.spearman_rows(logp_MK, cen)
    column.add(rows.SPEARMAN.key, spearman)
    for row, q in zip(rows.SPEARMAN_TAILS, (50, 5, 95)):
        column.put(row.key, float(np.nanpercentile(spearman, q)))


def shuffled_k_curve(v_Md: np.ndarray, h_MKd: np.ndarray, mu_d: np.ndarray, ks: list[int]) -> np.ndarray:
    """Exact K-curve of other targets' rollouts, centred, mean over the others (M, len(ks))."""
    m = len(v_Md)
    curve_MJ = np.zeros((m, len(ks)))
    for j in range(m):
        others = np.arange(m) != j
        curve_MJ[others] += metrics.exact_k_curve(fve_matrix(v_Md[others], h_MKd[j], mu_d), ks)
    return curve_MJ / (m - 1)
