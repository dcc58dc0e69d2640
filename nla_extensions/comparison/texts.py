"""What each way of reading writes for some activations, as much of it as so many forward tokens buy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from nla_extensions.release.api import NLA
from nla_extensions.release.baselines import ASK, IDENTITY_PROMPT, PLACE
from nla_extensions.release.methods import draw_texts
from nla_extensions.tail_reader.rollouts import GUIDED_BATCH, guided_search
from nla_utils.lm.sampling import row_streams
from nla_utils.metrics import fve_matrix
from nla_utils.store import Progress

# Draws of the reader that the guided search goes on from.
GUIDED_DRAWS = 64


@dataclass
class Texts:
    """``ids``: for each of M activations 1 + K texts, the likeliest first; ``h`` (M, 1 + K, d), re-encoded behind BOS."""

    name: str
    ids: list[list[list[int]]]
    h: np.ndarray

    @property
    def k(self) -> int:
        return self.h.shape[1] - 1


def budget_of(nla: NLA, n_rollouts: int) -> int:
    """Forward tokens of so many rollouts of the AV, written and read again."""
    return n_rollouts * _cost(nla, "av")


def _cost(nla: NLA, method: str) -> int:
    """Forward tokens of one text, written and read again behind BOS; the reader writes without the model."""
    n, longest = nla.bundle.reader.n, nla.bundle.av.config.max_new_tokens
    prompt = 1 + sum(len(nla.backbone.tokenize_text(part)) for part in (IDENTITY_PROMPT, PLACE, ASK))
    return {"reader": n + 1, "av": 2 * longest + 1, "lens": 2, "patchscope": prompt + 2 * n + 1}[method]


def draw(nla: NLA, method: str, v_Md: np.ndarray, budget: int, seed: int) -> Texts:
    """The texts of a way of reading that draws, at the most draws that the budget has room for, one at least."""
    k = min(max(1, budget // _cost(nla, method)), len(nla.backbone.head_weight))
    together, ids = max(1, nla.backbone.sample_batch // (k + 1)), []
    with Progress(total=len(v_Md), desc=method, unit="activation") as bar:
        for first in range(0, len(v_Md), together):
            part = v_Md[first : first + together]
            streams_B = row_streams(seed, method, range(first, first + len(part)), k + 1)
            ids += draw_texts(nla.backbone, nla.bundle, method, part, k, streams_B)
            bar.update(len(part))
    return _encoded(nla, method, ids)


def guided(nla: NLA, start: Texts, v_Md: np.ndarray, budget: int, fluency: float = 0.0) -> Texts:
    """The guided search from the reader's first draws, one text an activation."""
    backbone, mu, k = nla.backbone, nla.bundle.mu, min(GUIDED_DRAWS, start.k)
    drawn, found = np.array(start.ids)[:, 1 : k + 1], []
    name = "guided" + (f", λ = {fluency:g}" if fluency else "")
    with Progress(total=len(v_Md), desc=name, unit="activation") as bar:
        for first in range(0, len(v_Md), GUIDED_BATCH):
            part = slice(first, first + GUIDED_BATCH)
            h_MKd = start.h[part, 1 : k + 1]
            found += guided_search(
                nla.bundle.reader, backbone, v_Md[part], mu, drawn[part], h_MKd, budget, fluency
            ).ids.tolist()
            bar.update(len(v_Md[part]))
    return single(nla, name, found)


def retrieved(nla: NLA, v_Md: np.ndarray) -> Texts:
    """The stored text whose activation is nearest: a text that is chosen with v in sight and was written without it."""
    nearest_M = fve_matrix(v_Md, nla.bundle.pool_v, nla.bundle.mu).argmax(axis=1)
    return single(nla, "retrieved", [nla.bundle.pool_texts[i] for i in nearest_M])


def single(nla: NLA, name: str, texts: Sequence[Sequence[int]]) -> Texts:
    """One text an activation, which is its likeliest and its best of one."""
    return _encoded(nla, name, [[list(text), list(text)] for text in texts])


def _encoded(nla: NLA, name: str, ids: list[list[list[int]]]) -> Texts:
    h = nla.backbone.encode([text for texts in ids for text in texts], start=True)
    return Texts(name, ids, h.reshape(len(ids), len(ids[0]), -1))
