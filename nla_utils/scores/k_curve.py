"""Notebook 05: K-curve, slope per doubling, cheap reranks, Spearman (PROTOCOL.md §6). Reads, never generates."""

from __future__ import annotations

import numpy as np

from nla_utils import metrics
from nla_utils.protocol import Protocol
from nla_utils.scores import rows
from nla_utils.scores.column import Column, interval
from nla_utils.scores.evidence import Evidence, part_of


def score_k_curve(evidence: Evidence, protocol: Protocol) -> Column:
    """K-curves and reranks of one protocol, of the protocol's own targets.

    ``paper`` takes the first K' columns; ``corrected`` the expected maximum over all K'-subsets. Both
    are reported (``kcurve_first_*``, ``kcurve_exact_*``); ``kcurve_oracle_top1_*`` is the protocol's own.
    """
    part, reading = part_of(protocol), protocol.name
    ks = metrics.k_values(evidence.facts["K"])
    column = Column(protocol.name, evidence.facts["sizes"]["M"])
    column.put("K", evidence.facts["K"])
    column.put("ks", ks)
    column.put("unrelated_text_pool_size", evidence.facts["null_pool"][reading])
    for kind in ("raw", "cen"):
        scores_MK = evidence.texts("rollout", part, reading, kind)[:, 1:]
        first, exact = metrics.first_k_curve(scores_MK, ks), metrics.exact_k_curve(scores_MK, ks)
        null = evidence.null(part, reading, kind, ks)
        own = exact if protocol.all_subsets else first
        _add_curve(column, rows.CURVE.at(kind), ks, own)
        _add_curve(column, f"kcurve_first_{kind}", ks, first)
        _add_curve(column, f"kcurve_exact_{kind}", ks, exact)
        _add_curve(column, rows.CURVE_UNRELATED.at(kind), ks, null)
        _add_slope(column, rows.SLOPE.at(kind), ks, own)
        _add_slope(column, rows.SLOPE_UNRELATED.at(kind), ks, null)
        _add_slope(column, rows.SLOPE_MINUS_UNRELATED.at(kind), ks, own - null)
    shuffled = evidence.targets(part, reading, "others_curve", "others")
    _add_curve(column, rows.CURVE_OTHERS.key, ks, shuffled)
    _add_slope(column, rows.SLOPE_OTHERS.key, ks, shuffled)
    _add_reranks(column, evidence, protocol)
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


def _add_reranks(column: Column, evidence: Evidence, protocol: Protocol) -> None:
    part, reading = part_of(protocol), protocol.name
    raw, cen, anchor = (evidence.texts("rollout", part, reading, c) for c in ("raw", "cen", "anchor"))
    logp_MK = evidence.texts("rollout", part, reading, "logp" if protocol.sampled_logp else "logp_paper")[:, 1:]
    at = np.arange(len(cen))
    column.add(rows.GREEDY.cen, cen[:, 0])
    column.add(rows.GREEDY.raw, raw[:, 0])
    raw, cen = raw[:, 1:], cen[:, 1:]
    column.add(rows.SAMPLED.cen, cen.mean(axis=1))
    pick = logp_MK.argmax(axis=1)
    column.put(rows.MEAN_LOGP.key, float(logp_MK.mean()))
    column.add(rows.LOGP_RERANK.raw, raw[at, pick])
    column.add(rows.LOGP_RERANK.cen, cen[at, pick])
    column.difference(rows.LOGP_RERANK.cen, rows.GREEDY.cen)
    column.add(rows.ANCHOR_RERANK.cen, cen[at, anchor[:, 1:].argmax(axis=1)])
    column.difference(rows.ANCHOR_RERANK.cen, rows.GREEDY.cen)
    # Slip uncentred_anchor: the paper's row is labelled centred and computed raw.
    column.add(rows.ANCHOR.key, evidence.targets(part, reading, f"nearest_{'cen' if protocol.centred_anchor else 'raw'}"))
    spearman = metrics.spearman_rows(logp_MK, cen)
    column.add(rows.SPEARMAN.key, spearman)
    for row, q in zip(rows.SPEARMAN_TAILS, (50, 5, 95)):
        column.put(row.key, float(np.nanpercentile(spearman, q)))
