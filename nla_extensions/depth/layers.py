"""Targets of many layers from one set of sequences: every ℓ in a single forward pass, streamed to disk.

The sequences do not depend on the layer, so each layer's targets are byte for byte those that a run of that layer
alone would draw.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nla_utils.config import ROOT
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.run import Run
from nla_utils.store import ChunkStore, Progress, atomic_write, require_disk, require_same
from nla_utils.targets import (
    TARGETS,
    Targets,
    draw_sequences,
    load_targets,
    save_targets,
    sequences_hash,
    target_settings,
    target_streams,
)

# What two runs must have in common for the one's sequences to be the other's: not the layer.
SHARED = ("backbone", "format", "weight_hash", "settings_hash", "start_id", "eos_ids", "pad_id", "dtype", "seed")


def committed_sequences(run: Run) -> Path:
    """Where the repository keeps the sequences of a run."""
    name = dataclasses.replace(run.config, layer=None).folder_name
    return ROOT / "paper" / "sequences" / run.folder.backbone / f"{name}.safetensors"


def _record(run: Run) -> dict:
    return {**{key: run.folder.identity[key] for key in SHARED}, "sampling": target_settings(run.config).record()}


def write_sequences(path: Path, run: Run, targets: Targets) -> None:
    """Keep ids (N, T) int32 and lengths (N,) int32 of a run's targets, with what drew them."""
    tensors = {name: np.ascontiguousarray(x) for name, x in targets.texts.items()}
    record = {**_record(run), "sha256": sequences_hash(**tensors)}
    atomic_write(path, save(tensors, metadata={"record": json.dumps(record)}))


def read_sequences(path: Path, run: Run) -> dict[str, np.ndarray]:
    """The run's N sequences: ids (N, T) int32, lengths (N,) int32.

    Raises ``ArtefactError`` that names the file where it is missing, broken, too small, or of a backbone, seed or way
    of sampling that is not the run's.
    """
    n = run.sizes.n_targets
    try:
        with safe_open(path, "np") as f:
            record, names = json.loads((f.metadata() or {}).get("record", "{}")), set(f.keys())
            tensors = {name: f.get_tensor(name) for name in names & {"ids", "lengths"}}
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} was not read ({error}); `nla sequences` writes such a file") from None
    if len(tensors) < 2:
        raise ArtefactError(f"{path} holds {sorted(names)}, not ids and lengths; `nla sequences` writes such a file")
    require_same(path, record, _record(run), "its sequences can be looked at, but this run has to draw its own")
    if record.get("sha256") != sequences_hash(**tensors):
        raise ArtefactError(f"{path} was altered: its sequences are not those it was written with")
    held = len(tensors["ids"])
    if held < n:
        raise ArtefactError(f"{path} holds {held} sequences, the run needs {n}; add --set n_targets={held}")
    return {name: x[:n] for name, x in tensors.items()}


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


def extract_layers(run: Run, layers: Sequence[int], sequences: Optional[Path] = None) -> None:
    """Draw the run's sequences once and keep the targets of each layer in that layer's run folder.

    ``run`` is opened at its backbone's own layer. Layers that have their targets are left alone. The sequences are
    taken from a file where one is named, else from layers that have them. Needs N · L · d · 4 bytes twice while it
    works. Raises ``ArtefactError`` if the file is not of this run, or not all is of the same sequences.
    """
    at = {layer: run.at(layer) for layer in layers}
    texts = {r.folder.path: load_targets(r).texts for r in at.values() if r.folder.has(TARGETS)}
    plan = {}
    if sequences is not None:
        texts[sequences] = read_sequences(sequences, run)
        plan["sequences"] = sequences_hash(**texts[sequences])
    hashes = {path: sequences_hash(**given) for path, given in texts.items()}
    if len(set(hashes.values())) > 1:
        raise ArtefactError(
            "not of the same sequences: "
            + ", ".join(f"{path} ({found[:12]}…)" for path, found in hashes.items())
            + "; choose another --out, or delete the targets that are not wanted"
        )
    missing = {layer: r for layer, r in at.items() if not r.folder.has(TARGETS)}
    if missing:
        _extract(run, list(at), missing, next(iter(texts.values()), None), plan)


def _extract(run: Run, layers: list[int], missing: dict[int, Run], given: Optional[dict], plan: dict) -> None:
    """Targets of the layers that have none, of the given ids and lengths or of sequences that are drawn."""
    n, backbone = run.sizes.n_targets, run.backbone
    require_disk(run.folder.path, 2 * n * len(layers) * backbone.d * 4)
    # All the layers, missing or not: a sweep that was cut while some were kept already finds its chunks again.
    sampling, batch = target_settings(run.config).record(), backbone.sample_batch
    plan = {**plan, **run.folder.conditions, "layer": layers, "n": n, "sampling": sampling, "batch": batch}
    chunks = ChunkStore(run.folder.file("layers.chunks"), plan)
    starts = range(0, n, batch)
    with Progress(
        total=n, desc=f"{'reading' if given else 'drawing'} targets, {len(layers)} layers", unit="seq"
    ) as bar:
        for c, first in enumerate(starts):
            size = min(batch, n - first)
            # All the layers of all chunks are never in memory at once, so they are not joined as other chunks are.
            if chunks.get(c) is None:
                texts = (
                    {k: x[first : first + size] for k, x in given.items()}
                    if given
                    else _drawn(run, slice(first, first + size))
                )
                chunks.put(c, {**texts, **_activations(run, texts, layers)})
            bar.update(size)
    for layer, own in missing.items():
        names = {"ids": "ids", "lengths": "lengths", "v": f"v.{layer}"}
        save_targets(
            own, {k: np.concatenate([chunks.tensor(c, name) for c in range(len(starts))]) for k, name in names.items()}
        )
    chunks.clear()


def _drawn(run: Run, rows: slice) -> dict[str, np.ndarray]:
    """Some of the run's sequences."""
    samples = draw_sequences(run.backbone, target_settings(run.config), target_streams(run, rows))
    return {"ids": samples.ids, "lengths": samples.lengths}


def _activations(run: Run, texts: dict[str, np.ndarray], layers: Sequence[int]) -> dict[str, np.ndarray]:
    """v (B, d) of each layer at the end of each text, as ``v.ℓ``."""
    ids = [row[:length].tolist() for row, length in zip(texts["ids"], texts["lengths"])]
    return {f"v.{x}": v_Bd for x, v_Bd in zip(layers, run.backbone.encode_layers(ids, True, layers))}
