"""Targets of many layers from one set of sequences: every ℓ in a single forward pass, streamed to disk.

The sequences do not depend on the layer, so each layer's targets are byte for byte those that a run of that layer
alone would draw.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Optional, Sequence

import numpy as np

from nla_utils.backbone import Backbone
from nla_utils.config import ConfigError, RunConfig
from nla_utils.progress import Progress
from nla_utils.run import folder_of
from nla_utils.sampling import SAMPLE_BATCH
from nla_utils.sequences import read_sequences
from nla_utils.store import ArtefactError, ChunkStore, RunFolder, derive_seed, require_disk
from nla_utils.targets import ARTEFACT, Targets, draw_sequences, save_targets, sequences_hash, target_settings


def parse_layers(text: str, n_layers: int) -> list[int]:
    """``all``, or ``6,13`` as sorted numbers; raises ``ConfigError`` for what is no layer of the backbone.

    The last index is left out: ``hidden_states[L]`` is already normalised.
    """
    if text == "all":
        return list(range(1, n_layers))
    parts = [p.strip() for p in text.split(",")]
    wrong = [p for p in parts if not p.isdigit() or not 1 <= int(p) < n_layers]
    if wrong:
        raise ConfigError(f"--layers {text!r}: {wrong[0]!r} is none of 1 to {n_layers - 1}; write all, or 6,13")
    return sorted({int(p) for p in parts})


def config_at(run: RunConfig, own_layer: int, layer: int) -> RunConfig:
    """The run at another layer; at the backbone's own layer it is the plain run, so that nothing is run twice."""
    return dataclasses.replace(run, layer=None if layer == own_layer else layer)


def folder_at(run: RunConfig, backbone: Backbone, layer: int) -> RunFolder:
    """Folder of a run of that layer, with that layer's identity."""
    return folder_of(run, dataclasses.replace(backbone, layer=layer))


def extract_layers(
    run: RunConfig, backbone: Backbone, layers: Sequence[int], sequences: Optional[Path] = None
) -> None:
    """Draw the run's sequences once and keep the targets of each layer in that layer's run folder.

    ``backbone`` stands at its own layer. Layers whose targets are whole are left alone. The sequences are taken from
    a file where one is named, from layers that are whole already where there are some. Needs N · L · d · 4 bytes twice
    while it works. Raises ``ArtefactError`` if the file is not of this run, or not all is of the same sequences.
    """
    own = backbone.layer
    folders = {x: folder_at(config_at(run, own, x), backbone, x) for x in layers}
    texts = {f.path: Targets.of(f.load(ARTEFACT), run).texts for f in folders.values() if f.has(ARTEFACT)}
    plan = {}
    if sequences is not None:
        texts[sequences] = read_sequences(sequences, run, folder_at(run, backbone, own))
        plan["sequences"] = sequences_hash(**texts[sequences])
    hashes = {path: sequences_hash(**given) for path, given in texts.items()}
    if len(set(hashes.values())) > 1:
        raise ArtefactError(
            "not of the same sequences: " + ", ".join(f"{path} ({found[:12]}…)" for path, found in hashes.items())
            + "; choose another --out, or delete the targets that are not wanted"
        )
    _extract_missing(run, backbone, folders, next(iter(texts.values()), None), plan)


def _extract_missing(
    run: RunConfig, backbone: Backbone, folders: dict[int, RunFolder], given: Optional[dict], plan: dict
) -> None:
    """Targets of the layers that have none, of the given ids and lengths or of sequences that are drawn."""
    layers, missing = list(folders), [x for x, folder in folders.items() if not folder.has(ARTEFACT)]
    if not missing:
        return
    own, n = backbone.layer, run.sizes.n_targets
    home = folder_at(run, backbone, own)
    require_disk(home.path, 2 * n * len(layers) * backbone.d * 4)
    # All the layers, missing or not: a sweep that was cut while some were kept already finds its chunks again.
    sampling = target_settings(run).record()
    plan = {**plan, **home.identity, "layer": layers, "n": n, "sampling": sampling, "batch": SAMPLE_BATCH}
    chunks = ChunkStore(home.file("layers.chunks"), plan)
    starts = range(0, n, SAMPLE_BATCH)
    with Progress(total=n, desc=f"{'reading' if given else 'drawing'} targets, {len(layers)} layers", unit="seq") as bar:
        for c, first in enumerate(starts):
            size = min(SAMPLE_BATCH, n - first)
            # All the layers of all chunks are never in memory at once, so they are not joined as other chunks are.
            if chunks.get(c) is None:
                texts = _part(given, first, size) if given else _drawn(run, backbone, c, size)
                chunks.put(c, {**texts, **_activations(backbone, texts, layers)})
            bar.update(size)
    for x in missing:
        names = {"ids": "ids", "lengths": "lengths", "v": f"v.{x}"}
        tensors = {k: np.concatenate([chunks.tensor(c, name) for c in range(len(starts))]) for k, name in names.items()}
        save_targets(config_at(run, own, x), folders[x], tensors)
    chunks.clear()


def _part(given: dict[str, np.ndarray], first: int, size: int) -> dict[str, np.ndarray]:
    return {name: x[first : first + size] for name, x in given.items()}


def _drawn(run: RunConfig, backbone: Backbone, c: int, size: int) -> dict[str, np.ndarray]:
    """Chunk ``c`` of the run's sequences."""
    samples = draw_sequences(backbone, target_settings(run), size, derive_seed(run.seed, "targets", c))
    return {"ids": samples.ids, "lengths": samples.lengths}


def _activations(backbone: Backbone, texts: dict[str, np.ndarray], layers: Sequence[int]) -> dict[str, np.ndarray]:
    """v (B, d) of each layer at the end of each text, as ``v.ℓ``."""
    ids = [row[:length].tolist() for row, length in zip(texts["ids"], texts["lengths"])]
    return {f"v.{x}": v_Bd for x, v_Bd in zip(layers, backbone.encode_layers(ids, True, layers))}
