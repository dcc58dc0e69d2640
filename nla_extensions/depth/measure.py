"""What text can reach at each layer of a backbone, with no AV: one set of sequences, one pass over each text.

Replay, tail oracle, paraphrase, retrieval and the unrelated-text null need v and the texts alone, and the tail reader
is solved for at all layers from one pass over the sequences, or from a few where memory is short. A layer of them costs
a small part of what training and rolling out an AV there does, so they can be had for all layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence

import torch

from nla_extensions.depth.layers import extract_layers
from nla_extensions.tail_reader.reader import fit_readers, load_reader, read_greedy
from nla_extensions.tail_reader.scores import names_last_token
from nla_utils import rows
from nla_utils.baselines import paraphrases, sources, tails
from nla_utils.config import TAIL_TOKENS
from nla_utils.encoding import Texts, read
from nla_utils.evidence import of_ceilings
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import CORRECTED, PUBLISHED
from nla_utils.run import Run
from nla_utils.scores import Column, Scores
from nla_utils.store import Progress
from nla_utils.targets import Targets, load_targets, sequences_hash

# Readers of as many layers as this many bytes hold are fitted from one pass: all of a small backbone's.
FIT_BYTES = 4 * 2**30


def reach_of_text(run: Run, layers: Sequence[int], sequences: Optional[Path] = None) -> tuple[dict, dict[str, str]]:
    """(``{"K", "sequences", "layers": {layer: {protocol: column}}}``, hashes of the targets), in the key names of
    notebooks 03, 04. The sequences are drawn, or read from a file; see
    :func:`nla_extensions.depth.layers.extract_layers`.

    ``corrected``: held-out targets, μ of the pool. ``reader``: the tail reader's greedy texts of them. ``published``: replay
    alone, of the first M, μ their own mean. ``run`` is opened at its backbone's own layer.
    """
    extract_layers(run, layers, sequences)
    at, together = (
        {layer: run.at(layer) for layer in layers},
        _layers_in(FIT_BYTES, run.backbone.d, run.sizes.n_targets),
    )
    for start in range(0, len(layers), together):
        fit_readers([(at[x], load_targets(at[x])) for x in layers[start : start + together]])
    first = load_targets(at[layers[0]])
    held_out = first.held_out
    written = [sources(first, held_out), tails(first, held_out), paraphrases(run, first, held_out, CORRECTED)]
    h = [run.backbone.encode_layers(texts.sequences, True, layers) for texts in written]
    columns, parents = {}, {}
    for i, layer in enumerate(Progress(layers, desc="scoring layers", unit="layer")):
        own, targets = at[layer], load_targets(at[layer])
        for texts, h_LNd in zip(written, h):
            texts.h = {texts.reading(CORRECTED): h_LNd[i].reshape(*texts.lengths.shape, -1)}
        corrected = _score(targets, written, run.sizes.n_rollouts)
        found = {
            "published": _published_replay(own, targets),
            "corrected": corrected,
            "reader": _read(own, targets, corrected),
        }
        columns[str(layer)] = {name: column.to_json() for name, column in found.items()}
        parents[f"targets of layer {layer}"] = targets.sha256
    return {"K": run.sizes.n_rollouts, "sequences": sequences_hash(**first.texts), "layers": columns}, parents


def _layers_in(room: int, d: int, n_targets: int) -> int:
    """How many layers' targets (N, d) float32 and sums XᵀV (n · d, d) float64 are held in that many bytes."""
    return max(1, room // (4 * n_targets * d + 8 * TAIL_TOKENS * d * d))


def _score(targets: Targets, written: Sequence[Texts], k: int) -> Column:
    m = targets.n_eval
    evidence = of_ceilings(targets, {CORRECTED.texts(texts.kind): texts for texts in written}, k)
    raw, cen = (Scores(evidence, CORRECTED, kind) for kind in ("raw", "cen"))
    column = Column("corrected", m)
    column.put("mu_norm", evidence.facts["mu_norm"]["pool"])
    column.add(rows.FLOOR.raw, raw[rows.FLOOR])
    found = (rows.CONSTANT_MU, rows.REPLAY, rows.PARAPHRASE, rows.FLOOR, rows.UNRELATED_8, rows.RETRIEVAL)
    differences = (rows.PARAPHRASE_MINUS_UNRELATED, rows.minus(rows.TAILS[8], rows.RETRIEVAL))
    for row in (*found, *rows.TAILS.values(), *differences):
        column.add(row.cen, cen[row])
    # The evidence does not say K: there are no rollouts here.
    column.add(rows.UNRELATED.cen, cen.look_up("null", "cen")[k])
    return column


def _read(run: Run, targets: Targets, texts_column: Column) -> Column:
    """The reader's greedy texts in the key names of notebook 04, with the two that it is compared with.

    Retrieval is that of ``texts_column``, the layer's own.
    """
    v, sources = targets.v[targets.held_out], targets.sequences(targets.held_out)
    texts = read_greedy(load_reader(run), torch.from_numpy(v).to(run.backbone.device)).tolist()
    score_MM = fve_matrix(v, run.backbone.encode(texts, start=True), targets.mu)
    greedy = score_MM.diagonal()
    column = Column("corrected", len(v))
    column.add(rows.GREEDY.cen, greedy)
    column.add(rows.OTHERS_GREEDY.cen, (score_MM.sum(axis=1) - greedy) / (len(v) - 1))
    column.add(rows.RETRIEVAL.cen, texts_column.per_target[rows.RETRIEVAL.cen])
    column.add("names_last_token", names_last_token(texts, sources))
    column.difference(rows.GREEDY.cen, rows.OTHERS_GREEDY.cen)
    column.difference(rows.GREEDY.cen, rows.RETRIEVAL.cen)
    return column


def _published_replay(run: Run, targets: Targets) -> Column:
    chosen = targets.eval_rows(PUBLISHED)
    column = Column("published", len(chosen))
    replayed, v = read(run.backbone, sources(targets, chosen), PUBLISHED), targets.v[chosen]
    column.add(rows.REPLAY.cen, fve(replayed.read_as(PUBLISHED)[:, 0], v, v.mean(axis=0)))
    return column
