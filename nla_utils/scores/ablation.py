"""Slip by slip: what each correction moves, scored from the readings of :mod:`nla_utils.stages.ablation`."""

from __future__ import annotations

from nla_utils import metrics
from nla_utils.config import N_PARAPHRASES
from nla_utils.protocol import Protocol, ablation_steps, encoding_key
from nla_utils.scores.column import Column
from nla_utils.scores.evidence import Evidence, part_of, reading_of_ids


def score_step(evidence: Evidence, protocol: Protocol, with_rollouts: bool) -> Column:
    """Centred replay, paraphrase ceiling and floor of one step; with rollouts also greedy, best-of-K and ρ.

    ρ divides by the paraphrase best-of-8; with ``equal_k`` by as many paraphrases as rollouts: greedy by one, the
    best of 8 by the best of 8.
    """
    part, key, own = part_of(protocol), encoding_key(protocol), protocol.mu_of == "targets"
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
        k = min(N_PARAPHRASES, k_all) if protocol.equal_k else k_all
        column.ratio("rho_greedy", score[:, 0], floor, one if protocol.equal_k else best)
        column.ratio("rho_bestofK", metrics.exact_k_curve(score[:, 1:], [k])[:, 0], floor, best)
    return column


def score_ablation(evidence: Evidence, with_rollouts: bool = False) -> dict:
    """``{"in_order": {step: column}, "alone": {slip: column}}`` as JSON, the steps in their order."""
    return {
        way: {step: score_step(evidence, protocol, with_rollouts).to_json() for step, protocol in steps.items()}
        for way, steps in ablation_steps().items()
    }
