"""The registry of rows: for each its label, its key in the results, what it needs, how it is made, and where the paper
prints it.

Results files, tables, figures and notebooks all read it: a new row is one entry here, a new statistic one function and
one entry. ``{kind}`` in a key or path stands for ``raw`` or ``cen``. Keys are the authors' where they have one.
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
    what is needed while it is in force; a row that needs nothing is not measured. ``only``: ``raw`` or ``cen``, where
    it is not made of both. ``part``: of which targets, where not of those that are asked for.
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
    only: str = ""
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
        """The key, ``kind`` being ``raw`` or ``cen``."""
        return self.key.format(kind=kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it is made of: ``raw`` and ``cen`` where its key holds both, else ``cen``."""
        if self.only:
            return (self.only,)
        return ("raw", "cen") if "{kind}" in self.key else ("cen",)

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


def _picked(by_MK: np.ndarray, scores_MK: np.ndarray) -> np.ndarray:
    """The score of the rollout that ``by`` ranks first (M,)."""
    return np.take_along_axis(scores_MK, by_MK.argmax(axis=1)[:, None], axis=1)[:, 0]


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
    *(*EVALUATION, CONSTANT_MU, *PAIRED, GREEDY_MINUS_PROBE),
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
    GREEDY, FLOOR, label="raw greedy − raw floor", key="adapter_raw_greedy_minus_random_floor", only="raw"
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
OF_ROLLOUTS = (*OF_ANY_TARGETS, BEST_8, *BESIDE_CEILINGS, RAW_GREEDY_MINUS_FLOOR, *RHO)


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
    return Row(label, key, (key,), partial(np.nanmean, axis=1), control=control)


NATS_OWN = _nats("its own v", "nats_own", control=False)
NATS_OTHER = _nats("another target's v", "nats_other")
NATS_MEAN, NATS_NONE = _nats("μ", "nats_mean"), _nats("no slot", "nats_none")
NATS = (NATS_OWN, NATS_OTHER, NATS_MEAN, NATS_NONE)
NATS_OTHER_MINUS_OWN, NATS_MEAN_MINUS_OWN = minus(NATS_OTHER, NATS_OWN), minus(NATS_MEAN, NATS_OWN)
NATS_GAINED = (NATS_OTHER_MINUS_OWN, NATS_MEAN_MINUS_OWN, minus(NATS_NONE, NATS_OWN))


def _by_position(*nats_MT: np.ndarray) -> dict[str, list[float]]:
    return dict(zip(("own", "other", "mean", "none"), [np.nanmean(x, axis=0).tolist() for x in nats_MT]))


BY_POSITION = _fact("nats_by_position", tuple(need for row in NATS for need in row.needs), _by_position)
OF_LOSSES = (*NATS, *NATS_GAINED, BY_POSITION)

_rerank = partial(Row, file=RERANK_FILE)
LOGP_RERANK = _rerank("logp-rerank", "logp_rerank_{kind}_mean", (LOGP, DRAWS), _picked, "rerank.logp.cen")
ANCHOR_RERANK = _rerank(
    "NN-anchor rerank", "nn_anchor_rerank_{kind}_mean", (ANCHORED, DRAWS), _picked, "rerank.nn_anchor.cen", only="cen"
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
    path = f"rerank.spearman_logp_vs_oracle_cen.{of}"
    return _rerank(f"Spearman{name}", f"spearman_logp_vs_oracle_cen_{of}", needs, value, path, **fields)


SPEARMAN = _spearman("(logp, oracle), mean", "mean", (LOGP, DRAWS), metrics.spearman_rows)
SPEARMAN_TAILS = tuple(
    _spearman(f", {of}", of, (SPEARMAN,), partial(np.nanpercentile, q=q), summary=_no_interval)
    for of, q in (("p50", 50), ("p05", 5), ("p95", 95))
)
RERANKS = (
    _rerank("greedy", GREEDY.key, (GREEDY,), _same, "k_curve.greedy.cen"),
    _rerank("sampled (mean)", SAMPLED.key, (SAMPLED,), _same, "k_curve.sampled_mean.cen", only="cen"),
    *(LOGP_RERANK, LOGP_MINUS_GREEDY, ANCHOR_RERANK, ANCHOR, SPEARMAN, *SPEARMAN_TAILS),
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
    *(ANCHOR_MINUS_GREEDY, MEAN_LOGP, CURVE, CURVE_FIRST, CURVE_EXACT, CURVE_UNRELATED, CURVE_OTHERS),
    *SLOPES,
    *(_line_row(row, "intercept", 1) for row in SLOPES),
    *(_line_row(row, "r2", 2) for row in SLOPES),
    _fact("ks", ("K",), metrics.k_values),
    *(_fact(key, (key,)) for key in ("K", "unrelated_text_pool_size")),
)
