"""What text can reach at each layer of a backbone, with no AV: one set of sequences, one pass over each text.

Replay, tail oracle, paraphrase, retrieval and the unrelated-text null need v and the texts alone, and the tail reader
is solved for at all layers from one pass over the sequences, or from a few where memory is short. A layer of them costs
a small part of what training and rolling out an AV there does, so they can be had for all layers.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.ceilings import draw_paraphrases, replay, tail_ids
from nla_utils.config import N_PARAPHRASES, TAIL_LENGTHS, RunConfig
from nla_utils.evaluation import Column
from nla_utils.layers import config_at, extract_layers, folder_at
from nla_utils.metrics import fve, fve_matrix
from nla_utils.progress import Progress
from nla_utils.reader import TAIL_TOKENS, TailReader, fit_readers, load_reader, read_greedy
from nla_utils.store import RunFolder
from nla_utils.targets import Targets, load_targets, sequences_hash

# Readers of as many layers as this many bytes hold are fitted from one pass: all of a small backbone's.
FIT_BYTES = 4 * 2**30


def reach_of_text(
    run: RunConfig, backbone: Backbone, layers: Sequence[int], sequences: Optional[Path] = None
) -> tuple[dict, dict[str, str]]:
    """(``{"K", "sequences", "layers": {layer: {protocol: column}}}``, hashes of the targets), in the key names of
    notebooks 03, 04. The sequences are drawn, or read from a file; see :func:`nla_utils.layers.extract_layers`.

    ``corrected``: held-out targets, μ of the pool. ``reader``: the tail reader's greedy texts of them. ``paper``: replay
    alone, of the first M, μ their own mean. ``backbone`` stands at its own layer.
    """
    extract_layers(run, backbone, layers, sequences)
    at_once = _layers_in(FIT_BYTES, backbone.d, run.sizes.n_targets)
    for start in range(0, len(layers), at_once):
        fit_readers(run, backbone, {layer: _at(run, backbone, layer) for layer in layers[start : start + at_once]})
    first, _ = _at(run, backbone, layers[0])
    texts = _texts(run, backbone, first)
    h = {name: backbone.encode_layers(ids, True, layers) for name, ids in texts.items()}
    columns, parents = {}, {}
    for i, layer in enumerate(Progress(layers, desc="scoring layers", unit="layer")):
        (targets, folder), standing = _at(run, backbone, layer), dataclasses.replace(backbone, layer=layer)
        corrected = _score(targets, {name: h_LNd[i] for name, h_LNd in h.items()}, run.sizes.n_rollouts)
        found = {
            "paper": _published_replay(standing, targets),
            "corrected": corrected,
            "reader": _read(standing, load_reader(standing, folder), targets, corrected),
        }
        columns[str(layer)] = {name: column.to_json() for name, column in found.items()}
        parents[f"targets of layer {layer}"] = targets.sha256
    return {"K": run.sizes.n_rollouts, "sequences": sequences_hash(**first.texts), "layers": columns}, parents


def _at(run: RunConfig, backbone: Backbone, layer: int) -> tuple[Targets, RunFolder]:
    """A layer's targets, and the folder they are kept in."""
    config = config_at(run, backbone.layer, layer)
    folder = folder_at(config, backbone, layer)
    return load_targets(config, folder), folder


def _layers_in(room: int, d: int, n_targets: int) -> int:
    """How many layers' targets (N, d) float32 and sums XᵀV (n · d, d) float64 are held in that many bytes."""
    return max(1, room // (4 * n_targets * d + 8 * TAIL_TOKENS * d * d))


def _texts(run: RunConfig, backbone: Backbone, targets: Targets) -> dict[str, list[list[int]]]:
    """Ids of what is written of the held-out targets: all of it, its ends, its paraphrases; the same at each layer."""
    rows = targets.held_out
    folder = folder_at(run, backbone, backbone.layer)
    return {
        "replay": targets.sequences(rows),
        "tail": tail_ids(targets, rows),
        "paraphrase": draw_paraphrases(run, backbone, targets, rows, "corrected", folder),
    }


def _score(targets: Targets, h: dict[str, np.ndarray], k: int) -> Column:
    v, pool, mu = targets.v[targets.held_out], targets.v[targets.pool], targets.mu
    column = Column("corrected", len(v))
    column.put("mu_norm", float(np.linalg.norm(mu)))
    column.add("random_floor_raw_fve_mean", fve_matrix(v, pool).mean(axis=1))
    column.add("constant_mu_raw_mean", fve(mu, v))
    column.add("replay_cen_fve_mean", fve(h["replay"], v, mu))
    tail_MJd = h["tail"].reshape(len(v), len(TAIL_LENGTHS), -1)
    for n, score_M in zip(TAIL_LENGTHS, fve(tail_MJd, v[:, None], mu).T):
        column.add(f"tail_oracle_{n}_cen_fve_mean", score_M)
    paraphrase_M8 = fve(h["paraphrase"].reshape(len(v), N_PARAPHRASES, -1), v[:, None], mu)
    column.add("paraphrase_bestof8_cen_fve_mean", paraphrase_M8.max(axis=1))
    score_MP = fve_matrix(v, pool, mu)
    column.add("random_floor_cen_fve_mean", score_MP.mean(axis=1))
    column.add("nn_retrieval_cen_mean", score_MP.max(axis=1))
    # Behind BOS the pool's texts re-encode to the pool's own activations.
    null = metrics.exact_k_curve(score_MP, [N_PARAPHRASES, k])
    column.add("unrelated_text_bestof8_cen_fve_mean", null[:, 0])
    column.add("unrelated_text_cen_bestofK_mean", null[:, 1])
    column.difference("paraphrase_bestof8_cen_fve_mean", "unrelated_text_bestof8_cen_fve_mean")
    column.difference("tail_oracle_8_cen_fve_mean", "nn_retrieval_cen_mean")
    return column


def _read(backbone: Backbone, reader: TailReader, targets: Targets, texts_column: Column) -> Column:
    """The reader's greedy texts in the key names of notebook 04, with the two that it is compared with.

    Retrieval is that of ``texts_column``, the layer's own.
    """
    rows, mu = targets.held_out, targets.mu
    v, sources = targets.v[rows], targets.sequences(rows)
    texts = read_greedy(reader, torch.from_numpy(v).to(backbone.device)).tolist()
    score_MM = fve_matrix(v, backbone.encode(texts, start=True), mu)
    greedy = score_MM.diagonal()
    column = Column("corrected", len(v))
    column.add("adapter_cen_greedy_mean", greedy)
    column.add("shuffled_v_cen_greedy_mean", (score_MM.sum(axis=1) - greedy) / (len(v) - 1))
    column.add("nn_retrieval_cen_mean", texts_column.per_target["nn_retrieval_cen_mean"])
    column.add("names_last_token", np.array([float(t[-1] == s[-1]) for t, s in zip(texts, sources)]))
    column.difference("adapter_cen_greedy_mean", "shuffled_v_cen_greedy_mean")
    column.difference("adapter_cen_greedy_mean", "nn_retrieval_cen_mean")
    return column


def _published_replay(backbone: Backbone, targets: Targets) -> Column:
    rows = targets.in_sample
    v = targets.v[rows]
    column = Column("paper", len(rows))
    column.add("replay_cen_fve_mean", fve(replay(backbone, targets, rows, "paper"), v, v.mean(axis=0)))
    return column
