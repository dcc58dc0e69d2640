"""Notebook 03: replay, paraphrase, nearest neighbours, floor, null and tail oracle as scores (PROTOCOL.md §5, §8)."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from nla_utils.config import N_PARAPHRASES
from nla_utils.protocol import LADDER, Protocol, encoding_key
from nla_utils.scores import rows
from nla_utils.scores.column import Column
from nla_utils.scores.evidence import Evidence, part_of


class CeilingScores:
    """What the ceilings' rows are made of, ``raw`` or ``cen``: centred by the pool's μ, or by the targets' own (slip
    ``self_mu``); see :data:`nla_utils.scores.rows.CEILINGS`."""

    def __init__(self, evidence: Evidence, protocol: Protocol, kind: str):
        self.evidence, self.protocol = evidence, protocol
        self.part, self.reading = part_of(protocol), encoding_key(protocol)
        self.centring = "own" if kind == "cen" and protocol.mu_of == "targets" else kind

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
        return self._target("floor" if self.protocol.mu_of == "pool" else "pair_floor")

    @property
    def unrelated(self) -> np.ndarray:
        """Expected best of 8 unrelated texts (M,)."""
        return self.evidence.null(self.part, self.protocol.name, self.centring, [N_PARAPHRASES])[:, 0]


def score_ceilings(evidence: Evidence, protocol: Protocol) -> Column:
    """The column of one protocol: every row of ``rows.CEILINGS``, raw and centred."""
    column = Column(protocol.name, evidence.facts["sizes"]["M"])
    own, norms = protocol.mu_of == "targets", evidence.facts["mu_norm"]
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
    for step, protocol in LADDER.items():
        replay = evidence.texts("source", part_of(protocol), encoding_key(protocol), "cen")
        column.add(f"replay_cen_{step}", replay[:, 0])
    return column
