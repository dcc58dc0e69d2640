"""Notebook 04: what v is worth to the AV, as cross-entropy of the sources' own texts (PROTOCOL.md §9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nla_utils.protocol import CORRECTED
from nla_utils.scores import rows
from nla_utils.scores.column import Column

if TYPE_CHECKING:
    from nla_utils.stages.source_loss import SourceLoss


def score_source_loss(loss: SourceLoss) -> Column:
    """Mean nats a token under each condition, what v saves against each other one, paired by target, and both by
    position: ``nats_by_position``, ``{condition: [mean over targets]}``."""
    column = Column(CORRECTED.name, len(loss.rows))
    for name, nats_M in loss.per_target.items():
        column.add(f"nats_{name}", nats_M)
    for row in rows.NATS_GAINED:
        column.difference(*row.key.split("_minus_"))
    column.put("nats_by_position", {name: np.nanmean(nats_MT, axis=0).tolist() for name, nats_MT in loss.nats.items()})
    return column
