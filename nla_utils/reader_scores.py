"""The tail reader's rows: the AV's scores and controls on its texts, and what it is asked to beat."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.evaluation import Column, score_ceilings, score_rollouts
from nla_utils.meaning import sentence_embeddings, token_overlap
from nla_utils.metrics import fve, fve_matrix
from nla_utils.rollouts import rollout_set
from nla_utils.store import Artefact
from nla_utils.targets import Targets


def score_reader(targets: Targets, readings: Artefact, ceilings: Artefact, av: Column, protocol: str) -> Column:
    """The reader's column of one protocol, with paired differences from the AV's of the same protocol.

    ``corrected`` also holds the guided search and the distance to the tail oracles of 4 and 8 tokens.
    """
    own = rollout_set(readings, targets, protocol)
    column = score_rollouts(targets, own, ceilings, readings, protocol, "paraphrase_bestof8")
    mine, theirs = column.per_target, av.per_target
    for row in ("greedy", "bestofK"):
        key = f"adapter_cen_{row}_mean"
        column.add(f"reader_minus_av_cen_{row}", mine[key] - theirs[key])
    if protocol == "corrected":
        _add_oracles(column, targets, readings, ceilings)
    return column


def _add_oracles(column: Column, targets: Targets, readings: Artefact, ceilings: Artefact) -> None:
    oracle = score_ceilings(targets, ceilings, "corrected").per_target
    v, mine = targets.v[targets.held_out], column.per_target
    column.add("guided_cen_mean", fve(readings.tensors["guided_h"], v, targets.mu))
    column.put("guided_forward_tokens", int(readings.tensors["guided_spent"][-1]))
    column.add("guided_minus_bestofK", mine["guided_cen_mean"] - mine["adapter_cen_bestofK_mean"])
    column.add("guided_minus_tail_oracle_8", mine["guided_cen_mean"] - oracle["tail_oracle_8_cen_fve_mean"])
    column.add("bestofK_minus_tail_oracle_4", mine["adapter_cen_bestofK_mean"] - oracle["tail_oracle_4_cen_fve_mean"])
    hits, reciprocal = metrics.identification(readings.tensors["guided_h"], v, targets.mu)
    column.add("guided_identification_top1", hits)
    column.add("guided_identification_mrr", reciprocal)


def compute_curves(targets: Targets, rollouts: Artefact, readings: Artefact, ceilings: Artefact) -> dict:
    """Centred score against forward tokens per target, held out, ``corrected``: ``{name: [{tokens, mean, ci95}]}``.

    An AV's text of T tokens costs T to write and T + 1 to read behind BOS; an unrelated text only the reading;
    the reader writes without the model, so a tail of n tokens costs n + 1.
    """
    v, mu = targets.v[targets.held_out], targets.mu
    av, own = (rollout_set(a, targets, "corrected") for a in (rollouts, readings))
    length, n = rollouts.tensors["ids"].shape[2], readings.tensors["ids"].shape[2]
    null_MP = fve_matrix(v, ceilings.tensors["corrected.pool_h"], mu)
    curves = {
        "AV": _curve(fve(av.h("corrected")[:, 1:], v[:, None], mu), 2 * length + 1),
        "unrelated text": _curve(null_MP, length + 1, av.ids.shape[1] - 1),
        "reader": _curve(fve(own.h("corrected")[:, 1:], v[:, None], mu), n + 1),
    }
    guided_MR, spent_R = readings.tensors["guided_curve"], readings.tensors["guided_spent"]
    curves["reader, guided"] = [_point(int(s), guided_MR[:, r]) for r, s in enumerate(spent_R)]
    return curves


def _curve(score_MK: np.ndarray, tokens: int, k_max: int | None = None) -> list[dict]:
    ks = metrics.k_values(k_max or score_MK.shape[1])
    curve_MJ = metrics.exact_k_curve(score_MK, ks)
    return [_point(k * tokens, curve_MJ[:, j]) for j, k in enumerate(ks)]


def _point(tokens: int, score_M: np.ndarray) -> dict:
    return {"tokens": tokens, "mean": float(score_M.mean()), "ci95": metrics.ci95(score_M)}


def greedy_texts(targets: Targets, rollouts: Artefact, readings: Artefact) -> dict[str, list[list[int]]]:
    """Token ids of each verbalizer's text of the held-out targets; all but the guided one chosen without v."""
    av, own = (rollout_set(a, targets, "corrected") for a in (rollouts, readings))
    held = len(targets.held_out)
    return {
        "AV, greedy": [av.sequence(m, 0) for m in range(held)],
        "probe decode": readings.tensors["probe_ids"][-held:].tolist(),
        "reader, greedy": [own.sequence(m, 0) for m in range(held)],
        "reader, guided": readings.tensors["guided_ids"].tolist(),
    }


def score_meaning(backbone: Backbone, targets: Targets, texts: dict[str, list[list[int]]]) -> dict[str, dict]:
    """What each verbalizer's texts share with their sources, and with the sources of other targets.

    ``last_token``, ``overlap`` (see :func:`~nla_utils.meaning.token_overlap`) and ``similarity`` (cosine of
    sentence embeddings with the whole source), each beside ``…_other``, the next target's source in its place.
    """
    sources = targets.sequences(targets.held_out)
    others = sources[1:] + sources[:1]
    source_Md = _embed(backbone, sources)
    scored = {"source's own last 8": [s[-8:] for s in sources], **texts}
    return {name: _meaning(backbone, ids, sources, others, source_Md).to_json() for name, ids in scored.items()}


def _embed(backbone: Backbone, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    return sentence_embeddings([backbone.decode_text(s) for s in sequences])


def _meaning(backbone: Backbone, ids, sources, others, source_Md: np.ndarray) -> Column:
    column = Column("corrected", len(ids))
    text_Md = _embed(backbone, ids)
    for end, against, against_Md in (("", sources, source_Md), ("_other", others, np.roll(source_Md, -1, axis=0))):
        column.add(f"last_token{end}", np.array([float(t[-1] == s[-1]) for t, s in zip(ids, against)]))
        column.add(f"overlap{end}", np.array([token_overlap(t, s) for t, s in zip(ids, against)]))
        column.add(f"similarity{end}", (text_Md * against_Md).sum(axis=1))
    column.difference("similarity", "similarity_other")
    return column
