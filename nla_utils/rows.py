"""The registry of rows: for each its label, its key in the results, what it needs, how it is made, and where the paper
prints it.

Results files, tables, figures and notebooks all read it: a new row is one entry here, a new statistic one function and
one entry. ``{kind}`` in a key or path stands for ``raw``, ``cen`` or, of ``corrected`` alone, ``cen1``: centred, with
the pool's first principal direction projected out. Keys are the authors' where they have one.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, Optional

import numpy as np
import pandas as pd

from nla_utils import metrics, protocol
from nla_utils.config import N_PARAPHRASES, PROBE_LENGTHS, TAIL_LENGTHS

CEILING_FILE, EVALUATION_FILE, RERANK_FILE = "oracle_ceiling", "centered_eval", "rerank_eval"
TOP_N = 5


def _same(values):
    return values


@dataclass(frozen=True)
class Row:
    """One row of a results file.

    ``needs``: other rows, and names of :data:`~nla_utils.scores.KEPT` and :data:`~nla_utils.scores.FACTS`; ``value``
    makes of them the values per target (M,), and ``summary`` of those a number and its interval. ``under``: a slip, and
    what is needed while it is in force; a row that needs nothing is not measured. ``only``: of ``raw``, ``cen`` and
    ``cen1`` those that it is made of, where not of all. ``part``: of which targets, where not of those that are asked
    for.
    """

    label: str
    key: str
    needs: tuple = ()
    value: Callable = _same
    published_path: str = ""
    control: bool = False
    file: str = EVALUATION_FILE
    summary: Callable = metrics.mean
    under: Optional[tuple[str, tuple]] = None
    only: tuple[str, ...] = ()
    part: str = ""

    @property
    def cen(self) -> str:
        """The key of the centred row."""
        return self.at("cen")

    @property
    def raw(self) -> str:
        """The key of the uncentred row."""
        return self.at("raw")

    def at(self, kind: str) -> str:
        """The key, ``kind`` being ``raw``, ``cen`` or ``cen1``."""
        return self.key.format(kind=kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it is made of: ``raw``, ``cen`` and ``cen1`` where its key holds them, else ``cen``."""
        return self.only or (("raw", "cen", "cen1") if "{kind}" in self.key else ("cen",))

    @property
    def title(self) -> str:
        """The label, marked if the row is a control."""
        return f"control: {self.label}" if self.control else self.label


def minus(a: Row, b: Row, **fields) -> Row:
    """The paired difference of two rows."""
    named = {"label": f"{a.label} − {b.label}", "key": f"{a.key}_minus_{b.key}", "file": a.file}
    return Row(needs=(a, b), value=operator.sub, **named | fields)


def _no_interval(value) -> tuple:
    return value, None


def _fact(key: str, needs: tuple, value: Callable = _same, **fields) -> Row:
    """A number that is no mean over targets."""
    return Row("", key, needs, value, summary=_no_interval, **fields)


def _column(j: int) -> Callable:
    return lambda scores_MK: scores_MK[:, j]


def _top(scores_MK: np.ndarray) -> np.ndarray:
    return np.sort(scores_MK, axis=1)[:, -TOP_N:].mean(axis=1)


def _best_8(scores_MK: np.ndarray) -> np.ndarray:
    return metrics.exact_k_curve(scores_MK, [min(N_PARAPHRASES, scores_MK.shape[1])])[:, 0]


_mean, _max = partial(np.mean, axis=1), partial(np.max, axis=1)
# Of what is kept of rollouts (M, 1+K) column 0 is greedy; the others are sampled.
DRAWS = Row("", "", ("rollout",), lambda kept: kept[:, 1:])
LOGP = replace(DRAWS, needs=("logp",), under=("logp_embeds", ("logp_published",)))
ANCHORED = replace(DRAWS, needs=("anchor",))


# What text can reach. While slip ``self_mu`` is in force these are centred by μ of the targets themselves.
def _ceiling(label: str, key: str, needs: tuple, value: Callable = _same, path: str = "", **fields) -> Row:
    path = path and f"ceilings.{path}.{{kind}}"
    return Row(label, f"{key}_{{kind}}_fve_mean", needs, value, path, file=CEILING_FILE, **fields)


REPLAY = _ceiling("replay", "replay", ("source",), path="replay")
NN_IN_POOL = _ceiling("NN-in-pool", "nn_in_pool", ("nearest_other",), path="nn_in_pool")
NN_LARGE_POOL = _ceiling("NN in the large pool", "nn_large_pool", ("nearest",))
PARAPHRASE = _ceiling("paraphrase best-of-8", "paraphrase_bestof8", ("paraphrase",), _max, "paraphrase_best_of_8")
PARAPHRASE_ALL = _ceiling("paraphrase, all", "paraphrase_all", ("paraphrase",), _mean, "paraphrase_all")
# Against the pool, or against the other targets.
OTHER_TARGETS = ("self_mu", ("pair_floor",))
FLOOR = _ceiling("random floor", "random_floor", ("floor",), path="random_floor", under=OTHER_TARGETS)
UNRELATED_8 = _ceiling(
    "unrelated text best-of-8", "unrelated_text_bestof8", ("null",), lambda null: null[N_PARAPHRASES], control=True
)
TAILS = {
    n: _ceiling(f"tail oracle, last {n}", f"tail_oracle_{n}", ("tail",), _column(j)) for j, n in enumerate(TAIL_LENGTHS)
}
CEILINGS = (REPLAY, NN_IN_POOL, NN_LARGE_POOL, PARAPHRASE, PARAPHRASE_ALL, FLOOR, UNRELATED_8, *TAILS.values())
GAP = minus(PARAPHRASE, FLOOR, key="gap_{kind}", published_path="ceilings.gap_{kind}")
PARAPHRASE_MINUS_UNRELATED = minus(PARAPHRASE, UNRELATED_8)
OF_CEILINGS = (
    *(*CEILINGS, GAP, PARAPHRASE_MINUS_UNRELATED),
    _fact("replay_{kind}_fve_p50", (REPLAY,), np.nanmedian),
    _fact("mu_norm", ("mu_norm",), under=("self_mu", ("own_mu_norm",))),
    *(_fact(key, (key,)) for key in ("mu_of", "unrelated_text_pool_size")),
)
# Replay of the same targets in other readings, centred by μ of the pool.
_OF_IDS = ("sampled ids, no BOS", "text behind BOS", "sampled ids behind BOS")
LADDER = tuple(
    Row(label, f"replay_cen_{step.reading}", (REPLAY,), file=CEILING_FILE)
    for label, step in zip(("as published", "last token from the mask", *_OF_IDS), protocol.LADDER)
)

GREEDY = Row("greedy", "adapter_{kind}_greedy_mean", ("rollout",), _column(0), "centred_eval.greedy.{kind}")
SAMPLED = Row("sampled (mean)", "adapter_{kind}_sampled_mean", (DRAWS,), _mean, "centred_eval.sampled_mean.{kind}")
BEST = Row("best-of-K", "adapter_{kind}_bestofK_mean", (DRAWS,), _max, "centred_eval.best_of_k.{kind}")
TOP_5 = Row("mean of the best 5", "adapter_{kind}_top5_mean", (DRAWS,), _top, "centred_eval.top5_of_k.{kind}")
RETRIEVAL = Row("NN-retrieval", "nn_retrieval_{kind}_mean", ("nearest",), _same, "centred_eval.nn_retrieval.{kind}")
# Each target against the pool, or all ordered pairs of the pool's first 512.
POOL_PAIRS = ("self_mu", (Row("", "", ("pairs_of_pool",), part="in_sample"),))
POOL_FLOOR = Row(
    "random floor", "random_floor_{kind}_mean", ("floor",), _same, "centred_eval.random_floor.{kind}", under=POOL_PAIRS
)
_control = partial(Row, control=True)
PROBE = {
    n: _control(f"probe decode, last {n}", f"probe_decode_{n}_{{kind}}_mean", ("probe",), _column(j))
    for j, n in enumerate(PROBE_LENGTHS)
}
UNRELATED_1 = _control("unrelated text, one", "unrelated_text_{kind}_bestof1_mean", ("null",), lambda null: null[1])
UNRELATED = _control(
    "unrelated text, best-of-K", "unrelated_text_{kind}_bestofK_mean", ("null", "K"), lambda null, k: null[k]
)
OTHERS_GREEDY = _control("greedy of other targets", "shuffled_v_{kind}_greedy_mean", ("others_greedy",))
OTHERS_BEST = _control("best-of-K of other targets", "shuffled_v_{kind}_bestofK_mean", ("others_best",))
EVALUATION = (
    *(GREEDY, SAMPLED, BEST, TOP_5, RETRIEVAL, POOL_FLOOR),
    *PROBE.values(),
    *(UNRELATED_1, UNRELATED, OTHERS_GREEDY, OTHERS_BEST),
)
# Raw alone: centred, μ is the zero vector, which has no direction.
CONSTANT_MU = _control("constant μ", "constant_mu_raw_mean", ("constant_mu",))
# How far apart the scores of unrelated texts are for one target: the less, the sharper a centring measures.
NULL_SD = _control("standard deviation of unrelated texts", "unrelated_text_{kind}_sd", ("null_sd",))

GREEDY_MINUS_OTHERS = minus(GREEDY, OTHERS_GREEDY)
BEST_MINUS_OTHERS = minus(BEST, OTHERS_BEST)
BEST_MINUS_UNRELATED = minus(BEST, UNRELATED)
GREEDY_MINUS_RETRIEVAL = minus(GREEDY, RETRIEVAL)
PAIRED = (GREEDY_MINUS_OTHERS, BEST_MINUS_OTHERS, BEST_MINUS_UNRELATED, GREEDY_MINUS_RETRIEVAL)
LONGEST_PROBE = PROBE[max(PROBE_LENGTHS)]
GREEDY_MINUS_PROBE = minus(
    GREEDY, LONGEST_PROBE, label="greedy − probe decode", key="adapter_cen_greedy_minus_probe_decode"
)
# Whether the greedy text of target i ranks v_i first, and what chance gives. Top-1 hits are too few for a bootstrap
# interval (none at all gives one of no width); the rank is not.
IDENTIFIED = Row("greedy ranks its own v first", "greedy_identification_top1", ("greedy_rank",), lambda rank: rank == 1)
RECIPROCAL_RANK = Row(
    "mean reciprocal rank of its own v", "greedy_identification_mrr", ("greedy_rank",), lambda rank: 1 / rank
)
CHANCE = _fact("identification_chance_mrr", ("greedy_rank",), lambda rank: (1 / np.arange(1, len(rank) + 1)).mean())
RANK_MINUS_CHANCE = minus(
    RECIPROCAL_RANK, CHANCE, label="mean reciprocal rank − chance", key="greedy_identification_mrr_minus_chance"
)
OF_ANY_TARGETS = (
    *(*EVALUATION, CONSTANT_MU, NULL_SD, *PAIRED, GREEDY_MINUS_PROBE),
    *(IDENTIFIED, RECIPROCAL_RANK, RANK_MINUS_CHANCE, CHANCE),
    _fact("identification_chance_top1", ("greedy_rank",), lambda rank: 1 / len(rank)),
    _fact("shorter_than_limit_share", ("tokens", "T"), lambda n, t: (n[:, 1:] < t).mean()),
    *(_fact(key, (key,)) for key in ("K", "pool_size", "mu_norm", "unrelated_text_pool_size", "probe_length")),
)


# Beside the ceilings, which are measured of a protocol's own targets alone.
BEST_8 = Row("best-of-8", "adapter_cen_bestof8_mean", (DRAWS,), _best_8)
BEST_MINUS_PARAPHRASE = minus(BEST, PARAPHRASE, key="adapter_cen_bestofK_minus_paraphrase_bestof8")
BEST_8_MINUS_PARAPHRASE = minus(BEST_8, PARAPHRASE, key="adapter_cen_bestof8_minus_paraphrase_bestof8")
RAW_GREEDY_MINUS_FLOOR = minus(
    GREEDY, FLOOR, label="raw greedy − raw floor", key="adapter_raw_greedy_minus_random_floor", only=("raw",)
)


def _rho(label: str, key: str, equal: tuple = (), mismatched: tuple = (), path: str = "") -> Row:
    """ρ of a row over its ceiling: at equal counts, as the best of 8 over the best of 8, and while ``k_mismatch`` is in
    force."""
    equal, mismatched = (pair and (pair[0], FLOOR, pair[1]) for pair in (equal, mismatched))
    path, under = path and f"centred_eval.{path}.rho_cen", ("k_mismatch", mismatched)
    return Row(label, key, equal, lambda *s: np.stack(s, axis=1), path, summary=metrics.rho_of_means, under=under)


# What ρ takes as ceiling in ``published``, by name.
RHO_CEILINGS = {"paraphrase_bestof8": PARAPHRASE, "nn_in_pool": NN_IN_POOL}
RHO = (
    _rho("greedy", "rho_cen_greedy", (GREEDY, PARAPHRASE_ALL), (GREEDY, "ceiling"), "greedy"),
    _rho("sampled (mean)", "rho_cen_sampled", (SAMPLED, PARAPHRASE_ALL), (SAMPLED, "ceiling"), "sampled_mean"),
    _rho("best-of-K over paraphrase best-of-8", "rho_cen_bestofK", (), (BEST, "ceiling"), "best_of_k"),
    _rho("best-of-8 over paraphrase best-of-8", "rho_cen_bestof8", (BEST_8, PARAPHRASE)),
    _rho("NN-retrieval", "rho_cen_nn_retrieval", (), (RETRIEVAL, "ceiling"), "nn_retrieval"),
    _rho("random floor", "rho_cen_random_floor", path="random_floor"),
)
# Rows of one text: their ceiling, at equal counts, is one paraphrase.
RHO_OF_ONE = RHO[:2]
BESIDE_CEILINGS = (BEST_MINUS_PARAPHRASE, BEST_8_MINUS_PARAPHRASE)


# Bits at K, pool P: what a row is worth in doublings of unrelated texts, and the same by ranks, which any monotone
# change of the score leaves alone. A row that takes the best of k texts is compared at that k.
@dataclass(frozen=True)
class Bits:
    """The row ``of`` in bits, the same by rank, and its k: a number, or ``K``."""

    of: Row
    row: Row
    by_rank: Row
    k: int | str


_NULL = ("null", "null_left_out", "K")


def _curves(best_M: np.ndarray, null: pd.DataFrame, left_out: np.ndarray, k: int) -> tuple:
    ks = [int(x) for x in null]
    return best_M, null.to_numpy(), left_out.reshape(len(best_M), -1, len(ks)), ks, k


def _bits(of: Row, key: str, kind: str, pick: Callable, k: int | str = 1) -> Bits:
    def by_score(scores_MK, null, left_out, k_max) -> tuple:
        return _curves(pick(scores_MK), null, left_out, k_max if k == "K" else k)

    def by_rank(rank_MK, null, k_max) -> tuple:
        p = max(null)
        return pick(metrics.surprise_of_rank(rank_MK, p)), p, k_max if k == "K" else k

    summary, needs = metrics.bits_of_means, (f"rank_of_{kind}", "null", "K")
    row = Row(of.label, f"bits_{{kind}}_{key}", (kind, *_NULL), by_score, summary=summary, only=("cen", "cen1"))
    ranked = Row(f"{of.label}, by rank", f"bits_by_rank_{key}", needs, by_rank, summary=metrics.bits_by_rank)
    return Bits(of, row, ranked, k)


def _of_draws(pick: Callable) -> Callable:
    return lambda kept_MK: pick(kept_MK[:, 1:])


BITS_BEST = _bits(BEST, "bestofK", "rollout", _of_draws(_max), "K")
BITS = (
    _bits(GREEDY, "greedy", "rollout", _column(0)),
    _bits(SAMPLED, "sampled", "rollout", _of_draws(_mean)),
    _bits(BEST_8, "bestof8", "rollout", _of_draws(_best_8), N_PARAPHRASES),
    BITS_BEST,
    _bits(LONGEST_PROBE, "probe_decode", "probe", _column(-1)),
    _bits(PARAPHRASE, "paraphrase_bestof8", "paraphrase", _max, N_PARAPHRASES),
)
OF_BITS = tuple(row for figure in BITS for row in (figure.row, figure.by_rank))
OF_ROLLOUTS = (*OF_ANY_TARGETS, BEST_8, *BESIDE_CEILINGS, RAW_GREEDY_MINUS_FLOOR, *RHO, *OF_BITS)


def _in_sample(name: str, key: str, margin: Row) -> Row:
    """What training on a target was worth: a margin of targets trained on less the same of held-out ones. It is that
    over the rollouts of other targets, so that an easier set of targets does not count."""
    label, needs = f"in-sample − held-out margin of {name}", (replace(margin, part="in_sample"), margin)
    return Row(label, key, needs, lambda *both: both, summary=metrics.gap_of_means)


IN_SAMPLE_GREEDY = _in_sample("greedy", "in_sample_advantage_greedy", GREEDY_MINUS_OTHERS)
IN_SAMPLE_BEST = _in_sample("best-of-K", "in_sample_advantage_bestofK", BEST_MINUS_OTHERS)
IN_SAMPLE = (IN_SAMPLE_GREEDY, IN_SAMPLE_BEST)
DIFFERENCES = (*PAIRED, GREEDY_MINUS_PROBE, *BESIDE_CEILINGS, *IN_SAMPLE, RANK_MINUS_CHANCE)

# A step of the slip-by-slip ablation, and what there is of its rollouts.
OF_STEPS = (
    Row("replay", "replay", (REPLAY,)),
    Row("paraphrase best-of-8", "paraphrase_bestof8", (PARAPHRASE,)),
    Row("random floor", "random_floor", (FLOOR,)),
)
OF_STEPS_OF_ROLLOUTS = (
    Row("greedy", "greedy", (GREEDY,)),
    Row("best-of-K", "bestofK", (BEST,)),
    _rho("greedy", "rho_greedy", (GREEDY, PARAPHRASE_ALL), (GREEDY, PARAPHRASE)),
    _rho("best-of-K", "rho_bestofK", (BEST_8, PARAPHRASE), (BEST, PARAPHRASE)),
)


# Nats a token of the source's own text (M, T), NaN after the end; what stands in the slot differs.
def _nats(label: str, key: str, control: bool = True) -> Row:
    return Row(label, key, (key,), partial(metrics.mean_of_known, axis=1), control=control)


NATS_OWN = _nats("its own v", "nats_own", control=False)
NATS_OTHER = _nats("another target's v", "nats_other")
NATS_MEAN, NATS_NONE = _nats("μ", "nats_mean"), _nats("no slot", "nats_none")
NATS = (NATS_OWN, NATS_OTHER, NATS_MEAN, NATS_NONE)
NATS_OTHER_MINUS_OWN, NATS_MEAN_MINUS_OWN = minus(NATS_OTHER, NATS_OWN), minus(NATS_MEAN, NATS_OWN)
NATS_GAINED = (NATS_OTHER_MINUS_OWN, NATS_MEAN_MINUS_OWN, minus(NATS_NONE, NATS_OWN))


# What of v the saving is at one end of the text: another's v whose source has the same token there (NaN without one).
ENDS = {"last": ("ends_alike", -1), "first": ("begins_alike", 0)}


def _at(end: int) -> Callable:
    def value(a_MT: np.ndarray, b_MT: np.ndarray) -> np.ndarray:
        at = [np.flatnonzero(np.isfinite(row))[end] for row in b_MT]
        return np.array([a_T[i] - b_T[i] for a_T, b_T, i in zip(a_MT, b_MT, at)])

    return value


def _at_end(end: str, whose: str, key: str, nats: str, **fields) -> Row:
    label, needs = f"at the {end} token, {whose} − own", (nats, "nats_own")
    return Row(label, f"nats_at_{end}_{key}_minus_own", needs, _at(ENDS[end][1]), **fields)


OF_ENDS = tuple(
    row
    for end, (alike, _) in ENDS.items()
    for row in (
        _at_end(end, "another's", "other", "nats_other"),
        _at_end(end, "another's with the same one", "alike", f"nats_{alike}", control=True),
    )
)


def _by_position(*nats_MT: np.ndarray) -> dict[str, list[float]]:
    return dict(zip(("own", "other", "mean", "none"), [metrics.mean_of_known(x, axis=0).tolist() for x in nats_MT]))


BY_POSITION = _fact("nats_by_position", tuple(need for row in NATS for need in row.needs), _by_position)
OF_LOSSES = (*NATS, *NATS_GAINED, BY_POSITION)

_rerank = partial(Row, file=RERANK_FILE)
LOGP_RERANK = _rerank("logp-rerank", "logp_rerank_{kind}_mean", (LOGP, DRAWS), metrics.picked, "rerank.logp.cen")
ANCHOR_RERANK = _rerank(
    "NN-anchor rerank",
    "nn_anchor_rerank_{kind}_mean",
    (ANCHORED, DRAWS),
    metrics.picked,
    "rerank.nn_anchor.cen",
    only=("cen",),
)
# Slip uncentred_anchor: the paper's row is labelled centred and computed raw.
ANCHOR = _rerank(
    "NN-anchor itself",
    "nn_anchor_baseline",
    ("nearest_cen",),
    published_path="rerank.nn_anchor_baseline_uncentred",
    under=("uncentred_anchor", ("nearest_raw",)),
)
LOGP_MINUS_GREEDY = minus(LOGP_RERANK, GREEDY, key=f"{LOGP_RERANK.cen}_minus_{GREEDY.cen}")
LOGP_MINUS_GREEDY = replace(LOGP_MINUS_GREEDY, published_path="rerank.logp.vs_greedy_cen")
ANCHOR_MINUS_GREEDY = minus(ANCHOR_RERANK, GREEDY, key=f"{ANCHOR_RERANK.cen}_minus_{GREEDY.cen}")
MEAN_LOGP = _rerank("mean token log-probability", "mean_logp", (LOGP,), np.mean, summary=_no_interval)


def _spearman(name: str, of: str, needs: tuple, value: Callable, **fields) -> Row:
    path, key = f"rerank.spearman_logp_vs_oracle_cen.{of}", f"spearman_logp_vs_oracle_{{kind}}_{of}"
    return _rerank(f"Spearman{name}", key, needs, value, path, only=("cen", "cen1"), **fields)


SPEARMAN = _spearman("(logp, oracle), mean", "mean", (LOGP, DRAWS), metrics.spearman_rows)
SPEARMAN_TAILS = tuple(
    _spearman(f", {of}", of, (SPEARMAN,), partial(np.nanpercentile, q=q), summary=_no_interval)
    for of, q in (("p50", 50), ("p05", 5), ("p95", 95))
)
RERANKS = (
    _rerank("greedy", GREEDY.key, (GREEDY,), _same, "k_curve.greedy.cen"),
    _rerank("sampled (mean)", SAMPLED.key, (SAMPLED,), _same, "k_curve.sampled_mean.cen", only=("cen",)),
    *(LOGP_RERANK, LOGP_MINUS_GREEDY, ANCHOR_RERANK, ANCHOR, SPEARMAN, *SPEARMAN_TAILS),
)


# Whether the sign of that correlation is the AV's doing. First chance alone, the K rollouts' order shuffled within each
# target, whose dispersion is 1. Then others' rollouts with their own log-probabilities, scored against this target's v.
SHUFFLED = Row("", "", (LOGP, DRAWS), metrics.permuted_spearman)
OTHERS_SPEARMAN = Row("", "", (LOGP, "others"), lambda logp_MK, others: _spearman_of_others(logp_MK, others[:, 1:]))


def _spearman_of_others(logp_MK: np.ndarray, others_MKS: np.ndarray) -> np.ndarray:
    return np.stack([metrics.spearman_rows(logp_MK, scores_MK) for scores_MK in np.moveaxis(others_MKS, 2, 0)])


def _dispersion(rho: np.ndarray, k: int) -> np.ndarray:
    return (k - 1) * rho**2


def _fact_of_spread(key: str, label: str, needs: tuple, value: Callable, summary: Callable = _no_interval) -> Row:
    return _rerank(label, f"spearman_{key}", needs, value, summary=summary, under=("logp_embeds", ()))


def _tau2(values: tuple) -> tuple[float, list[float]]:
    rho_M, k = values
    m, rng = len(rho_M), np.random.default_rng(metrics.BOOTSTRAP_SEED)
    resampled = [metrics.between_targets(rho_M[rng.integers(m, size=m)], k) for _ in range(2_000)]
    return metrics.between_targets(rho_M, k), metrics.interval(np.array(resampled))


DISPERSION = _fact_of_spread("dispersion", "dispersion, mean of (K − 1)ρ²", (SPEARMAN, "K"), _dispersion, metrics.mean)
OTHERS_DISPERSION = _fact_of_spread(
    "dispersion_others",
    "dispersion of others' rollouts",
    (OTHERS_SPEARMAN, "K"),
    lambda rho_SM, k: _dispersion(rho_SM, k).mean(axis=0),
    metrics.mean,
)
P_VALUES = (
    _fact_of_spread(
        "dispersion_p",
        "p of the dispersion by chance",
        (SPEARMAN, SHUFFLED),
        lambda rho_M, null_nM: float(metrics.p_of_null((rho_M**2).sum(), (null_nM**2).sum(axis=1))),
    ),
    _fact_of_spread(
        "mean_p",
        "p of the mean by chance",
        (SPEARMAN, SHUFFLED),
        lambda rho_M, null_nM: float(metrics.p_of_null(abs(rho_M.mean()), abs(null_nM.mean(axis=1)))),
    ),
)
SPREAD = (
    *(DISPERSION, OTHERS_DISPERSION, *P_VALUES),
    _fact_of_spread("tau2", "variance between targets, τ²", (SPEARMAN, "K"), lambda *both: both, _tau2),
    _fact_of_spread(
        "significant_share",
        "share of targets that differ from 0 (BH, 5 %)",
        (SPEARMAN, SHUFFLED),
        lambda rho_M, null_nM: metrics.share_of_discoveries(metrics.p_of_null(abs(rho_M), abs(null_nM.ravel()))),
    ),
)


# A rerank by log-probability whose sign is set for each target: what the chosen text scores more than a random one of
# the same texts. The sign is read off v's coordinate on the pool's first principal direction, by a rule learned from
# the other targets. Only own less others' is a claim about the AV.
SIGN = Row("", "", ("pc", SPEARMAN), lambda pc_M4, rho_M: metrics.signs_of_others(pc_M4[:, 0], rho_M))


def _gain(key: str, label: str, needs: tuple, value: Callable, **fields) -> Row:
    label = f"signed rerank, gain: {label}"
    return _rerank(label, f"signed_rerank_{key}_gain", needs, value, under=("logp_embeds", ()), **fields)


def _signed(sign_M: np.ndarray, logp_MK: np.ndarray, scores_MK: np.ndarray) -> np.ndarray:
    return metrics.gain_of_choice(sign_M[:, None] * logp_MK, scores_MK)


def _signed_of_others(sign_M: np.ndarray, logp_MK: np.ndarray, others_MKS: np.ndarray) -> np.ndarray:
    """The last axis has scores against the 1, 2, … S-th target after the rollouts' own; mean over them, by target."""
    found = []
    for s, scores_MK in enumerate(np.moveaxis(others_MKS[:, 1:], 2, 0), 1):
        found.append(np.roll(_signed(np.roll(sign_M, -s), logp_MK, scores_MK), s))
    return np.mean(found, axis=0)


def _signed_of_pool(sign_M: np.ndarray, logp_n: np.ndarray, against_nM: np.ndarray, k: int) -> np.ndarray:
    """The pool's texts, k at a time, chosen by the model's own log-probability of them."""
    known = np.isfinite(logp_n) & np.isfinite(against_nM[:, 0])
    logp_n, against_nM = logp_n[known], against_nM[known]
    groups = [slice(first, first + k) for first in range(0, len(logp_n) - k + 1, k)]
    gains = [_signed(sign_M, np.tile(logp_n[g], (len(sign_M), 1)), against_nM[g].T) for g in groups]
    return np.mean(gains, axis=0) if gains else np.full(len(sign_M), np.nan)


GAIN_OWN = _gain("own", "own rollouts", (SIGN, LOGP, DRAWS), _signed)
GAIN_OTHERS = _gain(
    "others", "others' rollouts, the same rule", (SIGN, LOGP, "others"), _signed_of_others, control=True
)
GAIN_OWN_MINUS_OTHERS = _gain("own_minus_others", "own − others'", (GAIN_OWN, GAIN_OTHERS), operator.sub)
GAINS = (
    *(GAIN_OWN, GAIN_OTHERS, GAIN_OWN_MINUS_OTHERS),
    _gain(
        "constant",
        "one sign for all targets",
        (SPEARMAN, LOGP, DRAWS),
        lambda rho_M, *texts: _signed(metrics.signs_of_others(np.ones(len(rho_M)), rho_M), *texts),
    ),
    _gain(
        "unrelated",
        "K unrelated texts, the model's log-probability",
        (SIGN, "logp_of_pool", "against_of_pool", "K"),
        _signed_of_pool,
        control=True,
    ),
    _gain(
        "reads_h",
        "by v · PC × h · PC, which reads h",
        ("pc", "pc_of_rollout", DRAWS),
        lambda pc_M4, h_MK4, scores_MK: metrics.gain_of_choice(pc_M4[:, :1] * h_MK4[:, 1:, 0], scores_MK),
    ),
    _gain(
        "oracle",
        "the better sign, in hindsight",
        (LOGP, DRAWS),
        lambda logp_MK, scores_MK: np.maximum(*(metrics.gain_of_choice(s * logp_MK, scores_MK) for s in (1, -1))),
    ),
)


# K-curves: per target a column for each K; in the results {K: mean}.
def _curve_of(curve: Callable, scores_MK: np.ndarray) -> pd.DataFrame:
    ks = metrics.k_values(scores_MK.shape[1])
    return pd.DataFrame(curve(scores_MK, ks), columns=ks)


def _means(curve: pd.DataFrame) -> tuple[dict, dict]:
    values, intervals = zip(*(metrics.mean(curve[k]) for k in curve))
    ks = [str(k) for k in curve]
    return dict(zip(ks, values)), dict(zip(ks, intervals))


_curve = partial(_rerank, summary=_means)
CURVE_FIRST = _curve("best of the first K", "kcurve_first_{kind}", (DRAWS,), partial(_curve_of, metrics.first_k_curve))
CURVE_EXACT = _curve("expected best of K", "kcurve_exact_{kind}", (DRAWS,), partial(_curve_of, metrics.exact_k_curve))
CURVE = _curve("best of K", "kcurve_oracle_top1_{kind}", (CURVE_EXACT,), under=("first_k", (CURVE_FIRST,)))
_null_curve = partial(_curve, control=True)
CURVE_UNRELATED = _null_curve(
    "K unrelated texts", "kcurve_unrelated_text_{kind}", ("null", "K"), lambda null, k: null[metrics.k_values(k)]
)
CURVE_OTHERS = _null_curve(
    "other targets' rollouts",
    "kcurve_shuffled_v_cen",
    ("others_curve", "K"),
    lambda curve_MJ, k: pd.DataFrame(curve_MJ, columns=metrics.k_values(k)),
)


def _bits_of_curve(values: tuple) -> tuple[dict, dict]:
    curve, *null = values
    found = {str(k): metrics.bits_of_means(_curves(curve[k].to_numpy(), *null, k)) for k in curve}
    return {k: value for k, (value, _) in found.items()}, {k: ci95 for k, (_, ci95) in found.items()}


CURVE_BITS = _rerank(
    "bits at K",
    "kcurve_bits_{kind}",
    (CURVE_EXACT, *_NULL[:2]),
    lambda *all_of: all_of,
    summary=_bits_of_curve,
    only=("cen", "cen1"),
)


def _line(curve: pd.DataFrame) -> tuple[float, float, float]:
    return metrics.slope_per_doubling(list(curve), np.asarray(curve).mean(axis=0))


def _slope(curve: pd.DataFrame) -> tuple[float, Optional[list[float]]]:
    """Slope of the mean curve against log₂ K, its interval over resampled targets."""
    slope, _, _ = _line(curve)
    if len(curve.columns) < 2:
        return slope, None
    slopes_R, _ = np.polyfit(np.log2(list(curve)), metrics.bootstrap_means(curve).T, 1)
    return slope, metrics.interval(slopes_R)


_slope_row = partial(_rerank, summary=_slope)
STATED = "k_curve.stated_slope_per_doubling_cen"
SLOPE = _slope_row("slope per doubling of K", "slope_per_doubling_{kind}", (CURVE,), _same, STATED)
SLOPE_UNRELATED = _slope_row(
    "slope of unrelated text", "slope_per_doubling_unrelated_text_{kind}", (CURVE_UNRELATED,), control=True
)
SLOPE_OTHERS = _slope_row(
    "slope of other targets' rollouts", "slope_per_doubling_shuffled_v_cen", (CURVE_OTHERS,), control=True
)
SLOPE_MINUS_UNRELATED = _slope_row(
    "slope − slope of unrelated text",
    "slope_per_doubling_{kind}_minus_unrelated_text",
    (CURVE, CURVE_UNRELATED),
    operator.sub,
)
SLOPES = (SLOPE, SLOPE_UNRELATED, SLOPE_OTHERS, SLOPE_MINUS_UNRELATED)


def _line_row(row: Row, name: str, i: int) -> Row:
    """Intercept (1) or R² (2) of the line whose slope a row is."""
    return replace(row, key=f"{row.key}_{name}", published_path="", summary=lambda curve: (_line(curve)[i], None))


SLOPE_R_SQUARED = replace(_line_row(SLOPE, "r2", 2), label="R² of the mean curve")
OF_RERANKS = (
    *RERANKS,
    *(*SPREAD, *GAINS, CURVE_BITS),
    *(ANCHOR_MINUS_GREEDY, MEAN_LOGP, CURVE, CURVE_FIRST, CURVE_EXACT, CURVE_UNRELATED, CURVE_OTHERS),
    *SLOPES,
    *(_line_row(row, "intercept", 1) for row in SLOPES),
    *(_line_row(row, "r2", 2) for row in SLOPES),
    _fact("ks", ("K",), metrics.k_values),
    *(_fact(key, (key,)) for key in ("K", "unrelated_text_pool_size")),
)
