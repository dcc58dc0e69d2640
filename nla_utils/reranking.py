"""Notebook 05: K-curve, slope per doubling, cheap reranks, Spearman (PROTOCOL.md §6). Reads, never generates."""

from __future__ import annotations

import numpy as np

from nla_utils import metrics
from nla_utils.evaluation import Column
from nla_utils.metrics import fve, fve_matrix
from nla_utils.rollouts import RolloutSet
from nla_utils.store import Artefact
from nla_utils.targets import Targets


def score_k_curve(targets: Targets, rollouts: RolloutSet, ceilings: Artefact, protocol: str) -> Column:
    """K-curves and reranks of one protocol.

    ``paper`` takes the first K' columns; ``corrected`` the expected maximum over all K'-subsets. Both
    are reported (``kcurve_first_*``, ``kcurve_exact_*``); ``kcurve_oracle_top1_*`` is the protocol's own.
    """
    v, pool, h = targets.v[rollouts.rows], targets.v[targets.pool], rollouts.h(protocol)[:, 1:]
    ks = metrics.k_values(h.shape[1])
    column = Column(protocol, len(v))
    column.put("K", h.shape[1])
    column.put("ks", ks)
    for kind, mu in (("raw", None), ("cen", targets.mu)):
        scores_MK = fve(h, v[:, None], mu)
        first, exact = metrics.first_k_curve(scores_MK, ks), metrics.exact_k_curve(scores_MK, ks)
        null = metrics.exact_k_curve(fve_matrix(v, ceilings.tensors[f"{protocol}.pool_h"], mu), ks)
        own = first if protocol == "paper" else exact
        for name, curve_MJ in (("oracle_top1", own), ("first", first), ("exact", exact), ("unrelated_text", null)):
            _add_curve(column, f"kcurve_{name}_{kind}", ks, curve_MJ)
        _add_slope(column, f"slope_per_doubling_{kind}", ks, own)
        _add_slope(column, f"slope_per_doubling_unrelated_text_{kind}", ks, null)
        _add_slope(column, f"slope_per_doubling_{kind}_minus_unrelated_text", ks, own - null)
    shuffled = shuffled_k_curve(targets, rollouts, protocol, ks)
    _add_curve(column, "kcurve_shuffled_v_cen", ks, shuffled)
    _add_slope(column, "slope_per_doubling_shuffled_v_cen", ks, shuffled)
    _add_reranks(column, targets, rollouts, protocol, v, h, pool)
    return column


def _add_curve(column: Column, key: str, ks: list[int], curve_MJ: np.ndarray) -> None:
    column.put(key, {str(k): float(m) for k, m in zip(ks, curve_MJ.mean(axis=0))})
    column.ci95[key] = {str(k): metrics.ci95(curve_MJ[:, j]) for j, k in enumerate(ks)}


def _add_slope(column: Column, key: str, ks: list[int], curve_MJ: np.ndarray) -> None:
    """Slope of the mean curve against log₂ K, with R², and its interval over resampled targets."""
    slope, intercept, r2 = metrics.slope_per_doubling(ks, curve_MJ.mean(axis=0))
    column.put(key, slope)
    column.put(f"{key}_intercept", intercept)
    column.put(f"{key}_r2", r2)
    if len(ks) > 1:
        slopes_R = np.polyfit(np.log2(ks), metrics.bootstrap_means(curve_MJ).T, 1)[0]
        column.ci95[key] = [float(x) for x in np.percentile(slopes_R, [2.5, 97.5])]


def _add_reranks(column: Column, targets: Targets, rollouts: RolloutSet, protocol: str, v, h, pool) -> None:
    mu, rows = targets.mu, np.arange(len(v))
    raw, cen = fve(h, v[:, None]), fve(h, v[:, None], mu)
    column.add("adapter_cen_greedy_mean", fve(rollouts.h(protocol)[:, 0], v, mu))
    column.add("adapter_raw_greedy_mean", fve(rollouts.h(protocol)[:, 0], v))
    column.add("adapter_cen_sampled_mean", cen.mean(axis=1))
    logp = rollouts.logp_paper if protocol == "paper" else rollouts.logp
    pick = logp.argmax(axis=1)
    column.put("mean_logp", float(logp.mean()))
    column.add("logp_rerank_raw_mean", raw[rows, pick])
    column.add("logp_rerank_cen_mean", cen[rows, pick])
    column.difference("logp_rerank_cen_mean", "adapter_cen_greedy_mean")
    anchor = pool[fve_matrix(v, pool, mu).argmax(axis=1)]
    nearest = fve(h, anchor[:, None], mu).argmax(axis=1)
    column.add("nn_anchor_rerank_cen_mean", cen[rows, nearest])
    column.difference("nn_anchor_rerank_cen_mean", "adapter_cen_greedy_mean")
    # Slip uncentred_anchor: the paper's row is labelled centred and computed raw.
    anchor_mu = None if protocol == "paper" else mu
    anchor_raw = pool[fve_matrix(v, pool, anchor_mu).argmax(axis=1)]
    column.add("nn_anchor_baseline", fve(anchor_raw, v, anchor_mu))
    spearman = metrics.spearman_rows(logp, cen)
    column.add("spearman_logp_vs_oracle_cen_mean", spearman)
    for name, q in (("p50", 50), ("p05", 5), ("p95", 95)):
        column.put(f"spearman_logp_vs_oracle_cen_{name}", float(np.nanpercentile(spearman, q)))


def shuffled_k_curve(targets: Targets, rollouts: RolloutSet, protocol: str, ks: list[int]) -> np.ndarray:
    """Exact K-curve of other targets' rollouts, centred, mean over the others (M, len(ks))."""
    v, h = targets.v[rollouts.rows], rollouts.h(protocol)[:, 1:]
    m = len(v)
    curve_MJ = np.zeros((m, len(ks)))
    for j in range(m):
        others = np.arange(m) != j
        curve_MJ[others] += metrics.exact_k_curve(fve_matrix(v[others], h[j], targets.mu), ks)
    return curve_MJ / (m - 1)
