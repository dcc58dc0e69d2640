"""Slip by slip: what each correction moves, scored from the arrays of :mod:`nla_utils.stages.ablation`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from nla_utils import metrics
from nla_utils.config import N_PARAPHRASES
from nla_utils.metrics import fve
from nla_utils.protocol import Protocol, ablation_steps, encoding_key
from nla_utils.scores.ceilings import mu_of
from nla_utils.scores.column import Column, Scorer

if TYPE_CHECKING:
    from nla_utils.stages.ablation import Ablation
    from nla_utils.stages.rollouts import Rollouts
    from nla_utils.stages.targets import Targets


def score_step(targets: Targets, ablation: Ablation, protocol: Protocol, rollouts: Optional[Rollouts] = None) -> Column:
    """Centred replay, paraphrase ceiling and floor of one step; with rollouts also greedy, best-of-K and ρ.

    ρ divides by the paraphrase best-of-8; with ``equal_k`` by as many paraphrases as rollouts: greedy by one, the
    best of 8 by the best of 8.
    """
    chosen, key = targets.eval_rows(protocol), encoding_key(protocol)
    scorer = Scorer(targets.v[chosen], targets.v[targets.pool], mu_of(targets, protocol))
    column = Column(key, len(chosen))
    column.add("replay", scorer.own(ablation.replay[key]))
    paraphrase_M8 = scorer.own(ablation.paraphrase[key])
    best, one = paraphrase_M8.max(axis=1), paraphrase_M8.mean(axis=1)
    column.add("paraphrase_bestof8", best)
    floor = scorer.floor if protocol.mu_of == "pool" else metrics.pair_floor(scorer.v, scorer.mu)
    column.add("random_floor", floor)
    if rollouts is not None:
        own = rollouts.at(chosen)
        score = fve(own.h(protocol), scorer.v[:, None], targets.mu)
        column.add("greedy", score[:, 0])
        column.add("bestofK", score[:, 1:].max(axis=1))
        k = min(N_PARAPHRASES, own.k) if protocol.equal_k else own.k
        column.ratio("rho_greedy", score[:, 0], floor, one if protocol.equal_k else best)
        column.ratio("rho_bestofK", metrics.exact_k_curve(score[:, 1:], [k])[:, 0], floor, best)
    return column


def score_ablation(targets: Targets, ablation: Ablation, rollouts: Optional[Rollouts] = None) -> dict:
    """``{"in_order": {step: column}, "alone": {slip: column}}`` as JSON, the steps in their order."""
    return {
        way: {step: score_step(targets, ablation, protocol, rollouts).to_json() for step, protocol in steps.items()}
        for way, steps in ablation_steps().items()
    }
