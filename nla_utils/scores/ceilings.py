"""Notebook 03: replay, paraphrase, nearest neighbours, floor, null and tail oracle as scores (PROTOCOL.md §5, §8)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Sequence

import numpy as np

from nla_utils import metrics
from nla_utils.protocol import Protocol
from nla_utils.scores import rows
from nla_utils.scores.column import Column, Scorer

if TYPE_CHECKING:
    from nla_utils.stages.ceilings import Ceilings, EncodedTexts
    from nla_utils.stages.targets import Targets


class CeilingScores:
    """What the ceilings' rows are made of; see :data:`nla_utils.scores.rows.CEILINGS`."""

    def __init__(self, scorer: Scorer, texts: EncodedTexts, protocol: Protocol):
        self.scorer, self.texts, self.protocol = scorer, texts, protocol

    @cached_property
    def replay(self) -> np.ndarray:
        return self.scorer.own(self.texts.replay)

    @cached_property
    def paraphrase(self) -> np.ndarray:
        return self.scorer.own(self.texts.paraphrase)

    @cached_property
    def tail(self) -> np.ndarray:
        return self.scorer.own(self.texts.tail)

    @property
    def nearest_target(self) -> np.ndarray:
        return metrics.nearest_other(self.scorer.v, self.scorer.mu)

    @property
    def floor(self) -> np.ndarray:
        """Against the pool, or against the other targets (slip ``self_mu``)."""
        pool = self.protocol.mu_of == "pool"
        return self.scorer.floor if pool else metrics.pair_floor(self.scorer.v, self.scorer.mu)

    def best_unrelated(self, ks: Sequence[int]) -> np.ndarray:
        return self.scorer.best_unrelated(self.texts.pool_h, ks)


def mu_of(targets: Targets, protocol: Protocol) -> np.ndarray:
    """The μ (d,) that a protocol's ceilings are centred by: the pool's, or the targets' own (slip ``self_mu``)."""
    return targets.mu if protocol.mu_of == "pool" else targets.v[targets.eval_rows(protocol)].mean(axis=0)


def score_ceilings(targets: Targets, ceilings: Ceilings, protocol: Protocol) -> Column:
    """The column of one protocol: every row of ``rows.CEILINGS``, raw and centred."""
    v, pool, texts = targets.v[targets.eval_rows(protocol)], targets.v[targets.pool], ceilings.texts[protocol.name]
    mu_d = mu_of(targets, protocol)
    column = Column(protocol.name, len(v))
    column.put("mu_norm", float(np.linalg.norm(mu_d)))
    column.put("mu_of", "the pool" if protocol.mu_of == "pool" else "the evaluated targets")
    for kind, mu in (("raw", None), ("cen", mu_d)):
        scores = CeilingScores(Scorer(v, pool, mu), texts, protocol)
        for row in (*rows.CEILINGS, rows.GAP):
            column.add(row.at(kind), row.values(scores))
        column.put(f"replay_{kind}_fve_p50", float(np.nanmedian(scores.replay)))
        column.difference(rows.PARAPHRASE.at(kind), rows.UNRELATED_8.at(kind))
    return column


def score_replay_ladder(targets: Targets, ceilings: Ceilings) -> Column:
    """Centred replay of the same targets as one slip after the other is corrected; μ of the pool."""
    scorer = Scorer(targets.v[targets.in_sample], targets.v[targets.pool], targets.mu)
    column = Column("ladder", len(scorer.v))
    for step, h_Md in ceilings.ladder.items():
        column.add(f"replay_cen_{step}", scorer.own(h_Md))
    return column
