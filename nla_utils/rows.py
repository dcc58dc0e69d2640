"""The registry of rows: for each, its label, its key in the results, where the paper prints it, and how it is made.

Scores, tables, figures and notebooks all read it, so a new row is added here alone. ``{kind}`` in a key or path
stands for ``raw`` or ``cen``. Keys are the authors' where they have one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional

import numpy as np

from nla_utils import metrics
from nla_utils.config import PROBE_LENGTHS, TAIL_LENGTHS

CEILING_FILE, EVALUATION_FILE, RERANK_FILE = "oracle_ceiling", "centered_eval", "rerank_eval"
TOP_N = 5


@dataclass(frozen=True)
class Row:
    """One row. ``file`` is the results file that holds it; ``values`` gives its values per target (M,) from the
    scores that the file is made of (:class:`~nla_utils.scores.CeilingScores`,
    :class:`~nla_utils.scores.RolloutScores`), ``None`` where the row is no plain mean over targets."""

    label: str
    key: str
    published_path: str = ""
    control: bool = False
    file: str = EVALUATION_FILE
    values: Optional[Callable[..., np.ndarray]] = None

    @property
    def cen(self) -> str:
        """The key of the centred row."""
        return self.at("cen")

    @property
    def raw(self) -> str:
        """The key of the uncentred row."""
        return self.at("raw")

    def at(self, kind: str) -> str:
        """The key, ``kind`` being ``raw`` or ``cen``."""
        return self.key.format(kind=kind)

    @property
    def title(self) -> str:
        """The label, marked if the row is a control."""
        return f"control: {self.label}" if self.control else self.label


def minus(a: Row, b: Row) -> Row:
    """The paired difference of two rows."""
    return Row(f"{a.label} − {b.label}", f"{a.key}_minus_{b.key}", file=a.file)


def _ceiling(label: str, key: str, path: str, values: Optional[Callable] = None, control: bool = False) -> Row:
    return Row(label, key + "_{kind}_fve_mean", path and f"ceilings.{path}.{{kind}}", control, CEILING_FILE, values)


REPLAY = _ceiling("replay", "replay", "replay", lambda s: s.replay)
NN_IN_POOL = _ceiling("NN-in-pool", "nn_in_pool", "nn_in_pool", lambda s: s.nearest_target)
NN_LARGE_POOL = _ceiling("NN in the large pool", "nn_large_pool", "", lambda s: s.nearest)
PARAPHRASE = _ceiling(
    "paraphrase best-of-8", "paraphrase_bestof8", "paraphrase_best_of_8", lambda s: s.paraphrase.max(axis=1)
)
PARAPHRASE_ALL = _ceiling("paraphrase, all", "paraphrase_all", "paraphrase_all", lambda s: s.paraphrase.mean(axis=1))
FLOOR = _ceiling("random floor", "random_floor", "random_floor", lambda s: s.floor)
UNRELATED_8 = _ceiling("unrelated text best-of-8", "unrelated_text_bestof8", "", lambda s: s.unrelated, control=True)
TAILS = {
    n: _ceiling(f"tail oracle, last {n}", f"tail_oracle_{n}", "", lambda s, j=j: s.tail[:, j])
    for j, n in enumerate(TAIL_LENGTHS)
}
GAP = Row(
    "paraphrase best-of-8 − random floor",
    "gap_{kind}",
    "ceilings.gap_{kind}",
    file=CEILING_FILE,
    values=lambda s: s.paraphrase.max(axis=1) - s.floor,
)
# Replay of the same targets in other readings.
LADDER = tuple(
    Row(label, f"replay_cen_{reading}", file=CEILING_FILE)
    for label, reading in (
        ("as published", "published"),
        ("last token from the mask", "left_pad"),
        ("sampled ids, no BOS", "left_pad+eos_text"),
        ("text behind BOS", "left_pad+bos"),
        ("sampled ids behind BOS", "left_pad+bos+eos_text"),
    )
)
CEILINGS = (REPLAY, NN_IN_POOL, NN_LARGE_POOL, PARAPHRASE, PARAPHRASE_ALL, FLOOR, UNRELATED_8, *TAILS.values())

GREEDY = Row("greedy", "adapter_{kind}_greedy_mean", "centred_eval.greedy.{kind}", values=lambda s: s.own[:, 0])
SAMPLED = Row(
    "sampled (mean)",
    "adapter_{kind}_sampled_mean",
    "centred_eval.sampled_mean.{kind}",
    values=lambda s: s.own[:, 1:].mean(axis=1),
)
BEST = Row(
    "best-of-K",
    "adapter_{kind}_bestofK_mean",
    "centred_eval.best_of_k.{kind}",
    values=lambda s: s.own[:, 1:].max(axis=1),
)
TOP_5 = Row(
    "mean of the best 5",
    "adapter_{kind}_top5_mean",
    "centred_eval.top5_of_k.{kind}",
    values=lambda s: metrics.top_mean(s.own[:, 1:], TOP_N),
)
RETRIEVAL = Row(
    "NN-retrieval", "nn_retrieval_{kind}_mean", "centred_eval.nn_retrieval.{kind}", values=lambda s: s.nearest
)
POOL_FLOOR = Row("random floor", "random_floor_{kind}_mean", "centred_eval.random_floor.{kind}")
PROBE = {
    n: Row(
        f"probe decode, last {n}", f"probe_decode_{n}_{{kind}}_mean", control=True, values=lambda s, j=j: s.probe[:, j]
    )
    for j, n in enumerate(PROBE_LENGTHS)
}
UNRELATED_1 = Row(
    "unrelated text, one", "unrelated_text_{kind}_bestof1_mean", control=True, values=lambda s: s.unrelated[:, 0]
)
UNRELATED = Row(
    "unrelated text, best-of-K", "unrelated_text_{kind}_bestofK_mean", control=True, values=lambda s: s.unrelated[:, 1]
)
OTHERS_GREEDY = Row(
    "greedy of other targets", "shuffled_v_{kind}_greedy_mean", control=True, values=lambda s: s.others[0]
)
OTHERS_BEST = Row(
    "best-of-K of other targets", "shuffled_v_{kind}_bestofK_mean", control=True, values=lambda s: s.others[1]
)
EVALUATION = (
    GREEDY,
    SAMPLED,
    BEST,
    TOP_5,
    RETRIEVAL,
    POOL_FLOOR,
    *PROBE.values(),
    UNRELATED_1,
    UNRELATED,
    OTHERS_GREEDY,
    OTHERS_BEST,
)
# Raw alone: centred, μ is the zero vector, which has no direction.
CONSTANT_MU = Row("constant μ", "constant_mu_raw_mean", control=True)

GREEDY_MINUS_OTHERS = minus(GREEDY, OTHERS_GREEDY)
BEST_MINUS_OTHERS = minus(BEST, OTHERS_BEST)
BEST_MINUS_UNRELATED = minus(BEST, UNRELATED)
GREEDY_MINUS_RETRIEVAL = minus(GREEDY, RETRIEVAL)
PAIRED = (GREEDY_MINUS_OTHERS, BEST_MINUS_OTHERS, BEST_MINUS_UNRELATED, GREEDY_MINUS_RETRIEVAL)
PARAPHRASE_MINUS_UNRELATED = minus(PARAPHRASE, UNRELATED_8)
GREEDY_MINUS_PROBE = Row("greedy − probe decode", "adapter_cen_greedy_minus_probe_decode")
BEST_MINUS_PARAPHRASE = Row("best-of-K − paraphrase best-of-8", "adapter_cen_bestofK_minus_paraphrase_bestof8")
BEST_8_MINUS_PARAPHRASE = Row("best-of-8 − paraphrase best-of-8", "adapter_cen_bestof8_minus_paraphrase_bestof8")
RAW_GREEDY_MINUS_FLOOR = Row("raw greedy − raw floor", "adapter_raw_greedy_minus_random_floor")
IN_SAMPLE_GREEDY = Row("in-sample − held-out margin of greedy", "in_sample_advantage_greedy")
IN_SAMPLE_BEST = Row("in-sample − held-out margin of best-of-K", "in_sample_advantage_bestofK")
IDENTIFIED = Row("greedy ranks its own v first", "greedy_identification_top1")
RECIPROCAL_RANK = Row("mean reciprocal rank of its own v", "greedy_identification_mrr")
RANK_MINUS_CHANCE = Row("mean reciprocal rank − chance", "greedy_identification_mrr_minus_chance")
DIFFERENCES = (
    *PAIRED,
    GREEDY_MINUS_PROBE,
    BEST_MINUS_PARAPHRASE,
    BEST_8_MINUS_PARAPHRASE,
    IN_SAMPLE_GREEDY,
    IN_SAMPLE_BEST,
    RANK_MINUS_CHANCE,
)

# Nats a token of the source's own text; what stands in the slot differs.
NATS_OWN = Row("its own v", "nats_own")
NATS_OTHER = Row("another target's v", "nats_other", control=True)
NATS_MEAN = Row("μ", "nats_mean", control=True)
NATS_NONE = Row("no slot", "nats_none", control=True)
NATS = (NATS_OWN, NATS_OTHER, NATS_MEAN, NATS_NONE)
NATS_GAINED = tuple(minus(row, NATS_OWN) for row in NATS[1:])
NATS_OTHER_MINUS_OWN, NATS_MEAN_MINUS_OWN, NATS_NONE_MINUS_OWN = NATS_GAINED

RHO = (
    Row("greedy", "rho_cen_greedy", "centred_eval.greedy.rho_cen"),
    Row("sampled (mean)", "rho_cen_sampled", "centred_eval.sampled_mean.rho_cen"),
    Row("best-of-K over paraphrase best-of-8", "rho_cen_bestofK", "centred_eval.best_of_k.rho_cen"),
    Row("best-of-8 over paraphrase best-of-8", "rho_cen_bestof8"),
    Row("NN-retrieval", "rho_cen_nn_retrieval", "centred_eval.nn_retrieval.rho_cen"),
    Row("random floor", "rho_cen_random_floor", "centred_eval.random_floor.rho_cen"),
)
# Rows of one text: their ceiling, at equal counts, is one paraphrase.
RHO_OF_ONE = RHO[:2]


def _rerank(label: str, key: str, path: str = "", control: bool = False) -> Row:
    return Row(label, key, path, control, RERANK_FILE)


LOGP_RERANK = _rerank("logp-rerank", "logp_rerank_{kind}_mean", "rerank.logp.cen")
ANCHOR_RERANK = _rerank("NN-anchor rerank", "nn_anchor_rerank_{kind}_mean", "rerank.nn_anchor.cen")
ANCHOR = _rerank("NN-anchor itself", "nn_anchor_baseline", "rerank.nn_anchor_baseline_uncentred")
LOGP_MINUS_GREEDY = _rerank(
    "logp-rerank − greedy", f"{LOGP_RERANK.cen}_minus_{GREEDY.cen}", "rerank.logp.vs_greedy_cen"
)
ANCHOR_MINUS_GREEDY = _rerank("NN-anchor rerank − greedy", f"{ANCHOR_RERANK.cen}_minus_{GREEDY.cen}")
MEAN_LOGP = _rerank("mean token log-probability", "mean_logp")
SPEARMAN = _rerank(
    "Spearman(logp, oracle), mean", "spearman_logp_vs_oracle_cen_mean", "rerank.spearman_logp_vs_oracle_cen.mean"
)
SPEARMAN_TAILS = tuple(
    _rerank(f"Spearman, {p}", f"spearman_logp_vs_oracle_cen_{p}", f"rerank.spearman_logp_vs_oracle_cen.{p}")
    for p in ("p50", "p05", "p95")
)
RERANKS = (
    _rerank("greedy", GREEDY.key, "k_curve.greedy.cen"),
    _rerank("sampled (mean)", SAMPLED.key, "k_curve.sampled_mean.cen"),
    LOGP_RERANK,
    LOGP_MINUS_GREEDY,
    ANCHOR_RERANK,
    ANCHOR,
    SPEARMAN,
    *SPEARMAN_TAILS,
)
SLOPE = _rerank("slope per doubling of K", "slope_per_doubling_{kind}", "k_curve.stated_slope_per_doubling_cen")
SLOPE_R_SQUARED = _rerank("R² of the mean curve", "slope_per_doubling_{kind}_r2")
SLOPE_UNRELATED = _rerank("slope of unrelated text", "slope_per_doubling_unrelated_text_{kind}", control=True)
SLOPE_OTHERS = _rerank("slope of other targets' rollouts", "slope_per_doubling_shuffled_v_cen", control=True)
SLOPE_MINUS_UNRELATED = _rerank("slope − slope of unrelated text", "slope_per_doubling_{kind}_minus_unrelated_text")
# K-curves: {k: value} for each K.
CURVE = _rerank("best of K", "kcurve_oracle_top1_{kind}")
CURVE_UNRELATED = _rerank("K unrelated texts", "kcurve_unrelated_text_{kind}", control=True)
CURVE_OTHERS = _rerank("other targets' rollouts", "kcurve_shuffled_v_cen", control=True)
