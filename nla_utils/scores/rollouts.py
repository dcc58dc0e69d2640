"""Notebook 04: the AV's rows and their controls, raw, centred and as ρ (PROTOCOL.md §4, §8)."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from nla_utils import metrics
from nla_utils.config import N_PARAPHRASES
from nla_utils.protocol import CORRECTED, PAPER, Protocol
from nla_utils.scores import rows
from nla_utils.scores.ceilings import score_ceilings
from nla_utils.scores.column import Column
from nla_utils.scores.evidence import Evidence, part_of

# What notebook 04 shows: each protocol on its own targets, and on the other's.
WAYS = {
    "paper": (PAPER, "in_sample"), "corrected": (CORRECTED, "held_out"),
    "paper_on_held_out": (PAPER, "held_out"), "corrected_on_in_sample": (CORRECTED, "in_sample"),
}  # fmt: skip


class RolloutScores:
    """What the evaluation's rows are made of, ``raw`` or ``cen``, of the targets of one part read as one protocol reads;
    see :data:`nla_utils.scores.rows.EVALUATION`."""

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

    ρ is added where ``part`` is the one that the protocol evaluates; in ``paper`` its ceiling is the row that
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
    """``paper``: all ordered pairs of the pool's first 512. ``corrected``: each target against the pool."""
    if protocol.mu_of == "pool":
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

    ``paper``: floor and ceiling of notebook 03, whatever K. ``corrected``: a ceiling drawn as often as the
    row it divides: one paraphrase for greedy, the best of 8 for the best of 8 rollouts.
    """
    own, scale = column.per_target, ceilings.per_target
    k = min(N_PARAPHRASES, scores.own.shape[1] - 1)
    best_8, paraphrase, floor = "adapter_cen_bestof8_mean", scale[rows.PARAPHRASE.cen], scale[rows.FLOOR.cen]
    column.add(best_8, metrics.exact_k_curve(scores.own[:, 1:], [k])[:, 0])
    column.add(rows.BEST_MINUS_PARAPHRASE.key, own[rows.BEST.cen] - paraphrase)
    column.add(rows.BEST_8_MINUS_PARAPHRASE.key, own[best_8] - paraphrase)
    column.add(rows.RAW_GREEDY_MINUS_FLOOR.key, own[rows.GREEDY.raw] - scale[rows.FLOOR.raw])
    if protocol.equal_k:
        divided = {"greedy": (rows.GREEDY.cen, rows.PARAPHRASE_ALL.cen), "bestof8": (best_8, rows.PARAPHRASE.cen),
                   "sampled": (rows.SAMPLED.cen, rows.PARAPHRASE_ALL.cen)}  # fmt: skip
    else:
        numerators = {"greedy": rows.GREEDY, "sampled": rows.SAMPLED, "bestofK": rows.BEST, "nn_retrieval": rows.RETRIEVAL}
        divided = {name: (row.cen, f"{ceiling}_cen_fve_mean") for name, row in numerators.items()}
    for name, (row, divisor) in divided.items():
        column.ratio(f"rho_cen_{name}", own[row], floor, scale[divisor])
