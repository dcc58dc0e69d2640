"""Notebook 04: the AV's rows and their controls, raw, centred and as ρ (PROTOCOL.md §4, §8)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from nla_utils import metrics
from nla_utils.config import FLOOR_ROWS, N_PARAPHRASES
from nla_utils.metrics import fve
from nla_utils.protocol import Protocol
from nla_utils.scores import rows
from nla_utils.scores.ceilings import score_ceilings
from nla_utils.scores.column import Column, Scorer

if TYPE_CHECKING:
    from nla_utils.stages.ceilings import Ceilings
    from nla_utils.stages.probe import ProbeTexts
    from nla_utils.stages.rollouts import Rollouts
    from nla_utils.stages.targets import Targets


class RolloutScores:
    """What the evaluation's rows are made of; see :data:`nla_utils.scores.rows.EVALUATION`.

    Args:
        h_MKd: re-encoded rollouts, column 0 greedy.
        null_Pd: re-encoded texts of the pool.
        probe_MJd: the probe's texts, re-encoded.
    """

    def __init__(self, scorer: Scorer, h_MKd: np.ndarray, null_Pd: np.ndarray, probe_MJd: np.ndarray):
        self.scorer, self.h, self.null, self._probe = scorer, h_MKd, null_Pd, probe_MJd

    @cached_property
    def own(self) -> np.ndarray:
        return self.scorer.own(self.h)

    @cached_property
    def unrelated(self) -> np.ndarray:
        """The best of 1 and of K unrelated texts (M, 2)."""
        return self.scorer.best_unrelated(self.null, [1, self.h.shape[1] - 1])

    @cached_property
    def others(self) -> tuple[np.ndarray, np.ndarray]:
        return self.scorer.others(self.h)

    @cached_property
    def probe(self) -> np.ndarray:
        return self.scorer.own(self._probe)


def score_rollouts(
    targets: Targets, rollouts: Rollouts, ceilings: Ceilings, probe: ProbeTexts, protocol: Protocol, ceiling: str
) -> Column:
    """The column of one protocol: every row of ``rows.EVALUATION``, their differences, ρ and identification.

    Args:
        rollouts: of the targets to evaluate; ρ is added if they are the protocol's own.
        ceiling: the row of notebook 03 that ρ takes as ceiling in ``paper``.
    """
    v, pool, h = targets.v[rollouts.rows], targets.v[targets.pool], rollouts.h(protocol)
    null, probe_h = ceilings.texts[protocol.name].pool_h, probe.h(protocol, rollouts.rows)
    column = Column(protocol.name, len(v))
    column.put("K", rollouts.k)
    column.put("pool_size", len(pool))
    column.put("mu_norm", float(np.linalg.norm(targets.mu)))
    column.put("probe_length", max(rows.PROBE))
    for kind, mu in (("raw", None), ("cen", targets.mu)):
        scores = RolloutScores(Scorer(v, pool, mu), h, null, probe_h)
        for row in rows.EVALUATION:
            if row.values is not None:
                column.add(row.at(kind), row.values(scores))
        _add_floor(column, rows.POOL_FLOOR.at(kind), protocol, scores.scorer)
        for difference in rows.PAIRED:
            column.difference(*difference.at(kind).split("_minus_"))
    column.add(rows.CONSTANT_MU.key, fve(targets.mu, v))
    means = column.per_target
    column.add(rows.GREEDY_MINUS_PROBE.key, means[rows.GREEDY.cen] - means[rows.PROBE[max(rows.PROBE)].cen])
    _add_identification(column, h[:, 0], v, targets.mu)
    column.put("shorter_than_limit_share", float((rollouts.lengths[:, 1:] < rollouts.ids.shape[2]).mean()))
    # Ceilings were measured on the protocol's own targets; on other ones there is nothing to pair with.
    if np.array_equal(rollouts.rows, targets.eval_rows(protocol)):
        _add_against_ceilings(column, scores, score_ceilings(targets, ceilings, protocol), protocol, ceiling)
    return column


def _add_floor(column: Column, key: str, protocol: Protocol, scorer: Scorer) -> None:
    """``paper``: all ordered pairs of the pool's first 512. ``corrected``: each target against the pool."""
    if protocol.mu_of == "pool":
        column.add(key, scorer.floor)
    else:
        pairs = metrics.pair_floor(scorer.pool[:FLOOR_ROWS], scorer.mu)
        column.put(key, float(pairs.mean()), metrics.ci95(pairs))


def _add_identification(column: Column, h_Md: np.ndarray, v_Md: np.ndarray, mu_d: np.ndarray) -> None:
    """Whether the greedy text of target i ranks v_i first, and what chance gives."""
    hits, reciprocal = metrics.identification(h_Md, v_Md, mu_d)
    chance = float((1 / np.arange(1, len(v_Md) + 1)).mean())
    column.add(rows.IDENTIFIED.key, hits)
    column.add(rows.RECIPROCAL_RANK.key, reciprocal)
    # Top-1 hits are too few for a bootstrap interval (none at all gives one of no width); the rank is not.
    column.add(rows.RANK_MINUS_CHANCE.key, reciprocal - chance)
    column.put("identification_chance_top1", 1 / len(v_Md))
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
