"""Notebook 04: what v is worth to the AV, as cross-entropy of the sources' own texts (PROTOCOL.md §9)."""

from __future__ import annotations

from typing import Mapping

import numpy as np

from nla_utils.protocol import CORRECTED
from nla_utils.scores import rows
from nla_utils.scores.column import Column
from nla_utils.scores.evidence import Evidence, part_of


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
