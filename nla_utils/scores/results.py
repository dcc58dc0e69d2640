"""The results files of §11 as they are made from a run's evidence, and from nothing else."""

from __future__ import annotations

from typing import Callable

from nla_utils.protocol import PROTOCOLS
from nla_utils.scores import rows
from nla_utils.scores.ablation import score_ablation
from nla_utils.scores.ceilings import score_ceilings, score_replay_ladder
from nla_utils.scores.evidence import Evidence
from nla_utils.scores.k_curve import score_k_curve
from nla_utils.scores.rollouts import score_evaluation
from nla_utils.scores.source_loss import score_source_loss, source_nats


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
    rows.CEILING_FILE: oracle_ceiling, rows.EVALUATION_FILE: centered_eval, rows.RERANK_FILE: rerank_eval,
}  # fmt: skip


def _records(columns: dict) -> dict:
    return {name: column.to_json() for name, column in columns.items()}
