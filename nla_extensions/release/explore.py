"""One HTML page to look at a text's activations: tokens × layers, what each one reads as and how far above chance.

The bundle's own layer is read by its reader. The other layers' readers are fitted on the bundle's stored texts, all in
one pass over them, and kept in the cache.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Sequence

import jinja2
import numpy as np
from scipy.ndimage import label
from scipy.stats import false_discovery_control

from nla_extensions.release.api import NLA, label_tokens
from nla_extensions.release.bundle import SHIPPED_TAIL
from nla_extensions.tail_reader.reader import ARTEFACT, RIDGES, reader_from, solve_reader, sums_at_layers
from nla_utils import metrics
from nla_utils.config import cache_dir
from nla_utils.encoding import read
from nla_utils.errors import ConfigError
from nla_utils.lm.backbone import pad
from nla_utils.lm.sampling import row_streams
from nla_utils.lm.weights import weights_note
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import CORRECTED
from nla_utils.store import Progress, RunFolder, atomic_write, json_hash
from nla_utils.targets import Targets

MOST_TOKENS = 48


def explore(nla: NLA, text: str, layers: Sequence[int], k: int = 8) -> dict:
    """What the page shows: tokens, layers, and a cell for each layer and token.

    A cell's ``above`` is the score of the best of ``k`` texts less what the best of ``k`` stored texts gets on average.
    Raises ``ConfigError`` for a text without tokens or with too many, and for a ``k`` out of range.
    """
    stored = len(nla.bundle.pool_texts)
    if not 1 <= k <= stored:
        raise ConfigError(f"k is {k}; choose 1 to {stored}, the number of stored texts that a reading is compared with")
    ids = nla.token_ids(text)
    if len(ids) > MOST_TOKENS:
        raise ConfigError(f"the text has {len(ids)} tokens; at most {MOST_TOKENS} are shown")
    prefixes = [ids[: i + 1] for i in range(len(ids))]
    v_LTd = nla.backbone.encode_layers(prefixes, True, layers)
    at = nla_at_layers(nla, layers)
    cells = [_cells(at[layer], v_Td, k) for layer, v_Td in zip(layers, v_LTd)]
    return {
        "text": text,
        "backbone": nla.backbone.name,
        "weights": weights_note([nla.backbone.name]),
        "own_layer": nla.backbone.layer,
        "k": k,
        "layers": list(layers),
        "stored": stored,
        "tokens": label_tokens(nla.backbone.tokenizer, ids),
        "cells": cells,
        "found": _discoveries(np.array([[cell["p"] for cell in row] for row in cells]), k),
    }


def _discoveries(p_LT: np.ndarray, k: int, level: float = 0.05) -> dict:
    """How many cells are no chance at a false discovery rate, by Benjamini and Hochberg and by Benjamini and Yekutieli,
    in how many clusters of neighbours, and how many stored texts one would need."""
    bh, by = metrics.discoveries(p_LT.ravel(), level)
    found_LT = false_discovery_control(p_LT, axis=None).reshape(p_LT.shape) <= level
    needed = int(np.ceil(k * (p_LT.size / level - 1)))
    return {"cells": p_LT.size, "bh": bh, "by": by, "clusters": int(label(found_LT)[1]), "stored_for_one": needed}


def _cells(nla: NLA, v_Td: np.ndarray, k: int) -> list[dict]:
    """The cells of one layer, one for each token."""
    n_tokens, decode = len(v_Td), nla.backbone.decode_text
    readings = nla.verbalizer("reader").write(v_Td, k, row_streams(0, "explore", range(n_tokens), k + 1))
    score_TK = fve(read(nla.backbone, readings, CORRECTED).read_as(CORRECTED), v_Td[:, None], nla.bundle.mu)
    null_TP = fve_matrix(v_Td, nla.bundle.pool_v, nla.bundle.mu)
    chance_T = metrics.exact_k_curve(null_TP, [k])[:, 0]
    found = []
    for t in range(n_tokens):
        order = 1 + np.argsort(-score_TK[t, 1:], kind="stable")
        best, near = score_TK[t, order[0]], int(null_TP[t].argmax())
        texts = [decode(readings.sequence(t, j)) for j in range(k + 1)]
        found.append(
            {
                "reading": texts[order[0]],
                "score": float(best),
                "above": float(best - chance_T[t]),
                "percentile": float((null_TP[t] < best).mean() ** k),
                "p": metrics.chance_of_rank(int((null_TP[t] >= best).sum()), null_TP.shape[1], k),
                "greedy": texts[0],
                "greedy_score": float(score_TK[t, 0]),
                "retrieved": decode(nla.bundle.pool_texts[near]),
                "retrieved_score": float(null_TP[t, near]),
                "candidates": [[texts[j], float(score_TK[t, j])] for j in order],
            }
        )
    return found


def nla_at_layers(nla: NLA, layers: Sequence[int]) -> dict[int, NLA]:
    """The same at each layer; readers that are not in the cache are fitted in one pass over the stored texts."""
    backbone, bundle, texts = nla.backbone, nla.bundle, nla.bundle.pool_texts
    others = [layer for layer in layers if layer != backbone.layer]
    v_LPd = backbone.encode_layers(texts, True, others) if others else []
    # All in the pool, none of them held out.
    ids, lengths = pad(texts, 0, "right")[0].numpy(), np.array([len(t) for t in texts], dtype=np.int32)
    targets = {x: Targets(ids, lengths, v_Pd, 0, len(texts), sha256="") for x, v_Pd in zip(others, v_LPd)}
    folders = {}
    for layer in others:
        # Kept under a hash of all that the reader is made from.
        identity = {**backbone.identity(), "layer": layer}
        made_from = {**identity, "texts": [list(map(int, t)) for t in texts], "ridge": RIDGES[-1]}
        name = f"{backbone.name}-layer{layer}-{json_hash(made_from)[:16]}"
        folders[layer] = RunFolder(cache_dir() / "explore" / name, identity)
    missing = {layer: targets[layer] for layer in others if not folders[layer].has(ARTEFACT)}
    if missing:
        sums_of = sums_at_layers(backbone, missing, np.arange(len(texts)), SHIPPED_TAIL)
        for layer, sums in Progress(sums_of.items(), desc="readers of the other layers, once", unit="layer"):
            folders[layer].save(ARTEFACT, solve_reader(backbone, sums, RIDGES[-1]))
    found = {backbone.layer: nla}
    for layer, own in targets.items():
        reader = reader_from(folders[layer].load(ARTEFACT).tensors, backbone)
        own_bundle = dataclasses.replace(bundle, reader=reader, mu=own.mu, pool_v=own.v)
        found[layer] = NLA(dataclasses.replace(backbone, layer=layer), own_bundle)
    return found


def write_page(found: dict, path: Path) -> Path:
    """The page as one self-contained HTML file."""
    source = Path(__file__).with_name("explore.html.j2").read_text(encoding="utf-8")
    # No text may end the script element that it stands in.
    data = json.dumps(found, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    values = {k: v for k, v in found.items() if k != "cells"}
    atomic_write(path, jinja2.Template(source, autoescape=True).render(data=data, **values).encode())
    return path
