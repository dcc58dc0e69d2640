"""One HTML page to look at a text's activations: tokens × layers, what each one reads as and how far above chance.

The bundle's own layer is read by its reader. The other layers' readers are fitted on the bundle's stored texts, all in one
pass over them, and kept in the cache.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import jinja2
import numpy as np
import torch

from nla_extensions.release.api import NLA
from nla_extensions.release.bundle import SHIPPED_TAIL
from nla_extensions.tail_reader.reader import ARTEFACT, RIDGES, TailReader, read_tails, reader_from, solve_reader
from nla_extensions.tail_reader.sums import sums_at_layers
from nla_utils import metrics
from nla_utils.config import cache_dir
from nla_utils.errors import ConfigError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import row_streams
from nla_utils.lm.weights import weights_note
from nla_utils.metrics import fve, fve_matrix
from nla_utils.store import Progress, RunFolder, atomic_write, json_hash
from nla_utils.targets import Targets

SHOWN_CANDIDATES = 8
MOST_TOKENS = 48


@dataclass
class LayerReader:
    """How one layer is read: the backbone at it, a reader, μ (d,) and the stored activations (P, d)."""

    backbone: Backbone
    reader: TailReader
    mu: np.ndarray
    pool_v: np.ndarray


def explore(nla: NLA, text: str, layers: Sequence[int], k: int = SHOWN_CANDIDATES) -> dict:
    """What the page shows: tokens, layers, and a cell for each layer and token.

    A cell's ``above`` is the score of the best of ``k`` texts less what the best of ``k`` stored texts gets on average.
    Raises ``ConfigError`` for a text without tokens or with too many, and where ``k`` is not between 1 and the number of
    stored texts.
    """
    stored = len(nla.bundle.pool_texts)
    if not 1 <= k <= stored:
        raise ConfigError(f"k is {k}; choose 1 to {stored}, the number of stored texts that a reading is compared with")
    ids = nla.token_ids(text)
    if len(ids) > MOST_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens; at most {MOST_TOKENS} are shown")
    prefixes = [ids[: i + 1] for i in range(len(ids))]
    v_LTd = nla.backbone.encode_layers(prefixes, True, layers)
    readers = layer_readers(nla, layers)
    cells = [_cells(nla, readers[layer], v_Td, k) for layer, v_Td in zip(layers, v_LTd)]
    return {
        "text": text,
        "backbone": nla.backbone.name,
        "weights": weights_note([nla.backbone.name]),
        "own_layer": nla.backbone.layer,
        "k": k,
        "layers": list(layers),
        "stored": stored,
        "tokens": nla.backbone.label_tokens(ids),
        "cells": cells,
    }


def _cells(nla: NLA, at: LayerReader, v_Td: np.ndarray, k: int) -> list[dict]:
    """The cells of one layer, one for each token."""
    n_tokens = len(v_Td)
    repeated = torch.from_numpy(np.repeat(v_Td, k + 1, axis=0)).to(at.backbone.device)
    greedy = torch.arange(len(repeated)) % (k + 1) == 0
    streams = row_streams(0, "explore", range(n_tokens), k + 1)
    ids = read_tails(at.reader, repeated, streams, greedy)[0].tolist()
    h_TKd = at.backbone.encode(ids, start=True).reshape(n_tokens, k + 1, -1)
    score_TK = fve(h_TKd, v_Td[:, None], at.mu)
    null_TP = fve_matrix(v_Td, at.pool_v, at.mu)
    chance_T = metrics.exact_k_curve(null_TP, [k])[:, 0]
    found = []
    for t in range(n_tokens):
        order = 1 + np.argsort(-score_TK[t, 1:], kind="stable")
        best, near = score_TK[t, order[0]], int(null_TP[t].argmax())
        texts = [nla.backbone.decode_text(row) for row in ids[t * (k + 1) : (t + 1) * (k + 1)]]
        found.append(
            {
                "reading": texts[order[0]],
                "score": float(best),
                "above": float(best - chance_T[t]),
                "percentile": float((null_TP[t] < best).mean() ** k),
                "greedy": texts[0],
                "greedy_score": float(score_TK[t, 0]),
                "retrieved": nla.backbone.decode_text(nla.bundle.pool_texts[near]),
                "retrieved_score": float(null_TP[t, near]),
                "candidates": [[texts[j], float(score_TK[t, j])] for j in order],
            }
        )
    return found


def layer_readers(nla: NLA, layers: Sequence[int]) -> dict[int, LayerReader]:
    """A reader for each layer; those that are not in the cache are fitted in one pass over the stored texts."""
    backbone, bundle, texts = nla.backbone, nla.bundle, nla.bundle.pool_texts
    others = [layer for layer in layers if layer != backbone.layer]
    v_LPd = backbone.encode_layers(texts, True, others) if others else []
    targets = {layer: _as_targets(texts, v_Pd) for layer, v_Pd in zip(others, v_LPd)}
    folders = {layer: _folder(backbone, layer, texts) for layer in others}
    _fit(backbone, {layer: t for layer, t in targets.items() if not folders[layer].has(ARTEFACT)}, folders)
    found = {backbone.layer: LayerReader(backbone, bundle.reader, bundle.mu, bundle.pool_v)}
    for layer in others:
        at = dataclasses.replace(backbone, layer=layer)
        reader = reader_from(folders[layer].load(ARTEFACT).tensors, backbone)
        found[layer] = LayerReader(at, reader, targets[layer].mu, targets[layer].v)
    return found


def _fit(backbone: Backbone, missing: dict[int, Targets], folders: dict[int, RunFolder]) -> None:
    if not missing:
        return
    rows = np.arange(len(next(iter(missing.values())).v))
    sums_of = sums_at_layers(backbone, missing, rows, SHIPPED_TAIL)
    for layer, sums in Progress(sums_of.items(), desc="readers of the other layers, once", unit="layer"):
        folders[layer].save(ARTEFACT, solve_reader(backbone, sums, RIDGES[-1]))


def _as_targets(texts: Sequence[Sequence[int]], v_Pd: np.ndarray) -> Targets:
    """Stored texts as targets that are all in the pool and none of them held out."""
    lengths = np.array([len(t) for t in texts], dtype=np.int32)
    ids = np.zeros((len(texts), lengths.max()), dtype=np.int32)
    for row, text in zip(ids, texts):
        row[: len(text)] = text
    return Targets(ids, lengths, v_Pd, n_eval=0, pool_size=len(texts), sha256="")


def _folder(backbone: Backbone, layer: int, texts: Sequence[Sequence[int]]) -> RunFolder:
    """Where a layer's reader is kept, under a hash of all that it is made from."""
    identity = {**backbone.identity(), "layer": layer}
    name = json_hash({**identity, "texts": [list(map(int, t)) for t in texts], "ridge": RIDGES[-1]})[:16]
    return RunFolder(cache_dir() / "explore" / f"{backbone.name}-layer{layer}-{name}", identity)


def write_page(found: dict, path: Path) -> Path:
    """The page as one HTML file that asks nothing of a network."""
    source = Path(__file__).with_name("explore.html.j2").read_text(encoding="utf-8")
    # No text may end the script element that it stands in.
    data = json.dumps(found, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    page = jinja2.Template(source, autoescape=True).render(
        data=data, **{k: v for k, v in found.items() if k != "cells"}
    )
    atomic_write(path, page.encode())
    return path
