"""One protocol's column of a results file: values by key, with intervals from shared resamples."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Callable, Mapping

import numpy as np

from nla_utils import metrics, rows
from nla_utils.config import N_PARAPHRASES
from nla_utils.evidence import Evidence, part_of, reading_of_ids
from nla_utils.protocol import CORRECTED, LADDER, PROTOCOLS, PUBLISHED, Protocol, ablation_steps


class Column:
    """Numbers of one protocol over ``n`` targets.

    Means over targets are added with their values per target (M,), so that intervals and paired differences come from
    the same resamples. An interval is computed when it is first asked for, and once.
    """

    def __init__(self, protocol: str, n: int):
        self.protocol, self.n = protocol, n
        self.values: dict[str, object] = {}
        self.per_target: dict[str, np.ndarray] = {}
        self._intervals: dict[str, object] = {}

    def add(self, key: str, values_M: np.ndarray) -> None:
        """Add a mean over targets; NaN rows are left out."""
        self.per_target[key] = np.asarray(values_M, dtype=np.float64)
        self.values[key] = float(np.nanmean(values_M))

    def put(self, key: str, value: object, ci95: object = None) -> None:
        """Add a figure that is no mean over targets, with its interval if it has one."""
        self.values[key] = value
        if ci95 is not None:
            self._intervals[key] = ci95

    def difference(self, a: str, b: str) -> None:
        """Add ``a`` − ``b``, paired by target."""
        self.add(f"{a}_minus_{b}", self.per_target[a] - self.per_target[b])

    def ratio(self, key: str, score_M: np.ndarray, floor_M: np.ndarray, ceiling_M: np.ndarray) -> None:
        """Add ρ of three means over targets, its interval from joint resamples of the three; targets without a
        ceiling (NaN: their text is not known) are left out."""
        known = ~np.isnan(ceiling_M)
        score_M, floor_M, ceiling_M = (x[known] for x in (score_M, floor_M, ceiling_M))
        if not known.any():
            return self.put(key, math.nan)
        s, f, c = metrics.bootstrap_means(np.stack([score_M, floor_M, ceiling_M], axis=1)).T
        rho = float(metrics.rho(score_M.mean(), floor_M.mean(), ceiling_M.mean()))
        self.put(key, rho, interval(metrics.rho(s, f, c)))

    def unpaired(self, key: str, a_M: np.ndarray, b_M: np.ndarray) -> None:
        """Add mean of a − mean of b, two different sets of targets, each resampled on its own."""
        gap_R = metrics.bootstrap_means(a_M) - metrics.bootstrap_means(b_M, seed=metrics.BOOTSTRAP_SEED + 1)
        self.put(key, float(a_M.mean() - b_M.mean()), interval(gap_R))

    @property
    def ci95(self) -> dict[str, object]:
        """95 % intervals by key."""
        for key, values_M in self.per_target.items():
            if key not in self._intervals:
                self._intervals[key] = metrics.ci95(values_M)
        return self._intervals

    def to_json(self) -> dict:
        """The column as a results file holds it; NaN, which is not JSON, is null."""
        return _without_nan({"protocol": self.protocol, "n": self.n, **self.values, "ci95": self.ci95})


def interval(resampled_R: np.ndarray) -> list[float]:
    """95 % percentile interval [low, high] of a resampled figure (R,)."""
    return [float(x) for x in np.percentile(resampled_R, [2.5, 97.5])]


def _without_nan(x):
    if isinstance(x, dict):
        return {k: _without_nan(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_without_nan(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x


class CeilingScores:
    """What the ceilings' rows are made of, ``raw`` or ``cen``: centred by the pool's μ, or by the targets' own (slip
    ``self_mu``); see :data:`nla_utils.rows.CEILINGS`."""

    def __init__(self, evidence: Evidence, protocol: Protocol, kind: str):
        self.evidence, self.protocol = evidence, protocol
        self.part, self.reading = part_of(protocol), protocol.reading
        self.centring = "own" if kind == "cen" and "self_mu" in protocol.slips else kind

    def _texts(self, kind: str) -> np.ndarray:
        return self.evidence.texts(kind, self.part, self.reading, self.centring)

    def _target(self, what: str) -> np.ndarray:
        return self.evidence.targets(self.part, self.protocol.name, f"{what}_{self.centring}")

    @property
    def replay(self) -> np.ndarray:
        return self._texts("source")[:, 0]

    @cached_property
    def paraphrase(self) -> np.ndarray:
        return self._texts("paraphrase")

    @cached_property
    def tail(self) -> np.ndarray:
        return self._texts("tail")

    @property
    def nearest(self) -> np.ndarray:
        return self._target("nearest")

    @property
    def nearest_target(self) -> np.ndarray:
        return self._target("nearest_other")

    @property
    def floor(self) -> np.ndarray:
        """Against the pool, or against the other targets (slip ``self_mu``)."""
        return self._target("floor" if "self_mu" not in self.protocol.slips else "pair_floor")

    @property
    def unrelated(self) -> np.ndarray:
        """Expected best of 8 unrelated texts (M,)."""
        return self.evidence.null(self.part, self.protocol.name, self.centring, [N_PARAPHRASES])[:, 0]


def score_ceilings(evidence: Evidence, protocol: Protocol) -> Column:
    """The column of one protocol: every row of ``rows.CEILINGS``, raw and centred."""
    column = Column(protocol.name, evidence.facts["sizes"]["M"])
    own, norms = "self_mu" in protocol.slips, evidence.facts["mu_norm"]
    column.put("mu_norm", norms[part_of(protocol) if own else "pool"])
    column.put("mu_of", "the evaluated targets" if own else "the pool")
    column.put("unrelated_text_pool_size", evidence.facts["null_pool"][protocol.name])
    for kind in ("raw", "cen"):
        scores = CeilingScores(evidence, protocol, kind)
        for row in (*rows.CEILINGS, rows.GAP):
            column.add(row.at(kind), row.values(scores))
        column.put(f"replay_{kind}_fve_p50", float(np.nanmedian(scores.replay)))
        column.difference(rows.PARAPHRASE.at(kind), rows.UNRELATED_8.at(kind))
    return column


def score_replay_ladder(evidence: Evidence) -> Column:
    """Centred replay of the same targets as one slip after the other is corrected; μ of the pool."""
    column = Column("ladder", evidence.facts["sizes"]["M"])
    for protocol in LADDER:
        replay = evidence.texts("source", part_of(protocol), protocol.reading, "cen")
        column.add(f"replay_cen_{protocol.reading}", replay[:, 0])
    return column


# What notebook 04 shows: each protocol on its own targets, and on the other's.
WAYS = {
    "published": (PUBLISHED, "in_sample"),
    "corrected": (CORRECTED, "held_out"),
    "published_on_held_out": (PUBLISHED, "held_out"),
    "corrected_on_in_sample": (CORRECTED, "in_sample"),
}


class RolloutScores:
    """What the evaluation's rows are made of, ``raw`` or ``cen``, of the targets of one part read as one protocol reads;
    see :data:`nla_utils.rows.EVALUATION`."""

    def __init__(self, evidence: Evidence, part: str, reading: str, kind: str):
        self.evidence, self.part, self.reading, self.kind = evidence, part, reading, kind

    def _target(self, what: str, kind: str = "target") -> np.ndarray:
        return self.evidence.targets(self.part, self.reading, f"{what}_{self.kind}", kind)

    @cached_property
    def own(self) -> np.ndarray:
        """Scores of the rollouts (M, 1+K), column 0 greedy."""
        return self.evidence.texts("rollout", self.part, self.reading, self.kind)

    @property
    def nearest(self) -> np.ndarray:
        return self._target("nearest")

    @property
    def floor(self) -> np.ndarray:
        return self._target("floor")

    @cached_property
    def unrelated(self) -> np.ndarray:
        """The best of 1 and of K unrelated texts (M, 2)."""
        return self.evidence.null(self.part, self.reading, self.kind, [1, self.own.shape[1] - 1])

    @property
    def others(self) -> tuple[np.ndarray, np.ndarray]:
        """Rollouts of every other target: mean greedy (M,) and mean best-of-K (M,)."""
        return self._target("others_greedy", "others"), self._target("others_best", "others")

    @cached_property
    def probe(self) -> np.ndarray:
        return self.evidence.texts("probe", self.part, self.reading, self.kind)


def score_evaluation(evidence: Evidence) -> dict[str, Column]:
    """The columns of notebook 04 by name: those of :data:`WAYS`, the corrected one with what training on a target was
    worth."""
    columns = {name: score_rollouts(evidence, *way) for name, way in WAYS.items()}
    compare_in_sample(columns["corrected"], columns["corrected_on_in_sample"])
    return columns


def score_rollouts(evidence: Evidence, protocol: Protocol, part: str) -> Column:
    """The column of one protocol: every row of ``rows.EVALUATION``, their differences, ρ and identification.

    ρ is added where ``part`` is the one that the protocol evaluates; in ``published`` its ceiling is the row that
    ``facts["ceiling"]`` names.
    """
    facts, reading = evidence.facts, protocol.name
    column = Column(protocol.name, facts["sizes"]["M"])
    column.put("K", facts["K"])
    column.put("pool_size", facts["sizes"]["pool"])
    column.put("mu_norm", facts["mu_norm"]["pool"])
    column.put("unrelated_text_pool_size", facts["null_pool"][reading])
    column.put("probe_length", max(rows.PROBE))
    for kind in ("raw", "cen"):
        scores = RolloutScores(evidence, part, reading, kind)
        for row in rows.EVALUATION:
            if row.values is not None:
                column.add(row.at(kind), row.values(scores))
        _add_floor(column, rows.POOL_FLOOR.at(kind), protocol, scores)
        for difference in rows.PAIRED:
            column.difference(*difference.at(kind).split("_minus_"))
    column.add(rows.CONSTANT_MU.key, evidence.targets(part, reading, "constant_mu"))
    means = column.per_target
    column.add(rows.GREEDY_MINUS_PROBE.key, means[rows.GREEDY.cen] - means[rows.PROBE[max(rows.PROBE)].cen])
    _add_identification(column, evidence.targets(part, reading, "greedy_rank", "others"))
    tokens = evidence.texts("rollout", part, reading, "tokens")[:, 1:]
    column.put("shorter_than_limit_share", float((tokens < facts["T"]).mean()))
    # Ceilings were measured on the protocol's own targets; on other ones there is nothing to pair with.
    if part == part_of(protocol):
        _add_against_ceilings(column, scores, score_ceilings(evidence, protocol), protocol, facts["ceiling"])
    return column


def _add_floor(column: Column, key: str, protocol: Protocol, scores: RolloutScores) -> None:
    """``published``: all ordered pairs of the pool's first 512. ``corrected``: each target against the pool."""
    if "self_mu" not in protocol.slips:
        column.add(key, scores.floor)
    else:
        pairs = scores.evidence.targets(part_of(protocol), protocol.name, f"floor_{scores.kind}", "pool")
        column.put(key, float(pairs.mean()), metrics.ci95(pairs))


def _add_identification(column: Column, rank_M: np.ndarray) -> None:
    """Whether the greedy text of target i ranks v_i first, and what chance gives."""
    chance = float((1 / np.arange(1, len(rank_M) + 1)).mean())
    column.add(rows.IDENTIFIED.key, rank_M == 1)
    column.add(rows.RECIPROCAL_RANK.key, 1 / rank_M)
    # Top-1 hits are too few for a bootstrap interval (none at all gives one of no width); the rank is not.
    column.add(rows.RANK_MINUS_CHANCE.key, 1 / rank_M - chance)
    column.put("identification_chance_top1", 1 / len(rank_M))
    column.put("identification_chance_mrr", chance)


def compare_in_sample(held_out: Column, in_sample: Column) -> None:
    """Adds to ``held_out`` what training on a target was worth: in-sample minus held-out, greedy and best-of-K.

    Both are taken above the rollouts of other targets, so that an easier set of targets does not count.
    """
    pairs = ((rows.IN_SAMPLE_GREEDY, rows.GREEDY_MINUS_OTHERS), (rows.IN_SAMPLE_BEST, rows.BEST_MINUS_OTHERS))
    for advantage, margin in pairs:
        held_out.unpaired(advantage.key, in_sample.per_target[margin.cen], held_out.per_target[margin.cen])


def _add_against_ceilings(
    column: Column, scores: RolloutScores, ceilings: Column, protocol: Protocol, ceiling: str
) -> None:
    """ρ_cen, and the paired differences from paraphrase and floor.

    ``published``: floor and ceiling of notebook 03, whatever K. ``corrected``: a ceiling drawn as often as the
    row it divides: one paraphrase for greedy, the best of 8 for the best of 8 rollouts.
    """
    own, scale = column.per_target, ceilings.per_target
    k = min(N_PARAPHRASES, scores.own.shape[1] - 1)
    best_8, paraphrase, floor = "adapter_cen_bestof8_mean", scale[rows.PARAPHRASE.cen], scale[rows.FLOOR.cen]
    column.add(best_8, metrics.exact_k_curve(scores.own[:, 1:], [k])[:, 0])
    column.add(rows.BEST_MINUS_PARAPHRASE.key, own[rows.BEST.cen] - paraphrase)
    column.add(rows.BEST_8_MINUS_PARAPHRASE.key, own[best_8] - paraphrase)
    column.add(rows.RAW_GREEDY_MINUS_FLOOR.key, own[rows.GREEDY.raw] - scale[rows.FLOOR.raw])
    if "k_mismatch" not in protocol.slips:
        divided = {
            "greedy": (rows.GREEDY.cen, rows.PARAPHRASE_ALL.cen),
            "bestof8": (best_8, rows.PARAPHRASE.cen),
            "sampled": (rows.SAMPLED.cen, rows.PARAPHRASE_ALL.cen),
        }
    else:
        numerators = {
            "greedy": rows.GREEDY,
            "sampled": rows.SAMPLED,
            "bestofK": rows.BEST,
            "nn_retrieval": rows.RETRIEVAL,
        }
        divided = {name: (row.cen, f"{ceiling}_cen_fve_mean") for name, row in numerators.items()}
    for name, (row, divisor) in divided.items():
        column.ratio(f"rho_cen_{name}", own[row], floor, scale[divisor])


def score_k_curve(evidence: Evidence, protocol: Protocol) -> Column:
    """K-curves and reranks of one protocol, of the protocol's own targets.

    ``published`` takes the first K' columns; ``corrected`` the expected maximum over all K'-subsets. Both
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
        own = exact if "first_k" not in protocol.slips else first
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
    logp_MK = evidence.texts(
        "rollout", part, reading, "logp" if "logp_embeds" not in protocol.slips else "logp_published"
    )[:, 1:]
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
    column.add(
        rows.ANCHOR.key,
        evidence.targets(part, reading, f"nearest_{'raw' if 'uncentred_anchor' in protocol.slips else 'cen'}"),
    )
    spearman = metrics.spearman_rows(logp_MK, cen)
    column.add(rows.SPEARMAN.key, spearman)
    for row, q in zip(rows.SPEARMAN_TAILS, (50, 5, 95)):
        column.put(row.key, float(np.nanpercentile(spearman, q)))


def score_source_loss(nats: Mapping[str, np.ndarray]) -> Column:
    """Mean nats a token under each condition, what v saves against each other one, paired by target, and both by
    position: ``nats_by_position``, ``{condition: [mean over targets]}``.

    ``nats``: of every token of M sources (M, T) by condition, NaN after the end.
    """
    nats = {name: np.asarray(nats_MT, dtype=np.float64) for name, nats_MT in nats.items()}
    column = Column(CORRECTED.name, len(nats["own"]))
    for name, nats_MT in nats.items():
        column.add(f"nats_{name}", np.nanmean(nats_MT, axis=1))
    for row in rows.NATS_GAINED:
        column.difference(*row.key.split("_minus_"))
    column.put("nats_by_position", {name: np.nanmean(nats_MT, axis=0).tolist() for name, nats_MT in nats.items()})
    return column


def source_nats(evidence: Evidence) -> dict[str, np.ndarray]:
    """Nats of every token of the held-out sources (M, T) by condition, NaN after the end; M is 0 where no text is known."""
    found, place = {}, ("source_loss", part_of(CORRECTED), CORRECTED.name)
    for key in (row.key for row in rows.NATS):
        nats_MnT = evidence.texts(*place, key) if evidence.has(*place) else np.empty((0, 1, 1))
        found[key.removeprefix("nats_")] = nats_MnT[:, 0]
    return found


def score_step(evidence: Evidence, protocol: Protocol, with_rollouts: bool) -> Column:
    """Centred replay, paraphrase ceiling and floor of one step; with rollouts also greedy, best-of-K and ρ.

    ρ divides by the paraphrase best-of-8; with ``equal_k`` by as many paraphrases as rollouts: greedy by one, the
    best of 8 by the best of 8.
    """
    part, key, own = part_of(protocol), protocol.reading, "self_mu" in protocol.slips
    column, centring = Column(key, evidence.facts["sizes"]["M"]), "own" if own else "cen"
    column.add("replay", evidence.texts("source", part, key, centring)[:, 0])
    paraphrase_M8 = evidence.texts("paraphrase", part, key, centring)
    best, one = paraphrase_M8.max(axis=1), paraphrase_M8.mean(axis=1)
    column.add("paraphrase_bestof8", best)
    reading = reading_of_ids(protocol)
    floor = evidence.targets(part, reading, "pair_floor_own" if own else "floor_cen")
    column.add("random_floor", floor)
    if with_rollouts:
        score = evidence.texts("rollout", part, reading, "cen")
        column.add("greedy", score[:, 0])
        column.add("bestofK", score[:, 1:].max(axis=1))
        k_all = score.shape[1] - 1
        k = min(N_PARAPHRASES, k_all) if "k_mismatch" not in protocol.slips else k_all
        column.ratio("rho_greedy", score[:, 0], floor, one if "k_mismatch" not in protocol.slips else best)
        column.ratio("rho_bestofK", metrics.exact_k_curve(score[:, 1:], [k])[:, 0], floor, best)
    return column


def score_ablation(evidence: Evidence, with_rollouts: bool = False) -> dict:
    """``{"in_order": {step: column}, "alone": {slip: column}}`` as JSON, the steps in their order."""
    return {
        way: {step: score_step(evidence, protocol, with_rollouts).to_json() for step, protocol in steps.items()}
        for way, steps in ablation_steps().items()
    }


def oracle_ceiling(evidence: Evidence) -> dict:
    """What notebook 03 keeps."""
    columns = {p.name: score_ceilings(evidence, p) for p in PROTOCOLS} | {"ladder": score_replay_ladder(evidence)}
    return {"protocols": _records(columns), "ablation": score_ablation(evidence)}


def centered_eval(evidence: Evidence) -> dict:
    """What notebook 04 keeps."""
    return {
        "protocols": _records(score_evaluation(evidence)),
        "source_loss": score_source_loss(source_nats(evidence)).to_json(),
        "ablation": score_ablation(evidence, with_rollouts=True),
    }


def rerank_eval(evidence: Evidence) -> dict:
    """What notebook 05 keeps."""
    return {"protocols": _records({p.name: score_k_curve(evidence, p) for p in PROTOCOLS})}


FILES: dict[str, Callable[[Evidence], dict]] = {
    rows.CEILING_FILE: oracle_ceiling,
    rows.EVALUATION_FILE: centered_eval,
    rows.RERANK_FILE: rerank_eval,
}


def _records(columns: dict) -> dict:
    return {name: column.to_json() for name, column in columns.items()}
