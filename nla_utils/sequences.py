"""A run's sequences as one small file, from which another machine goes on.

A seed draws the same sequences only on the same kind of machine: rounding differs between kinds, and a sampled text
parts ways at the first token that it decides. Activations of given sequences agree up to that rounding.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nla_utils.config import ROOT, RunConfig
from nla_utils.store import ArtefactError, RunFolder, atomic_write
from nla_utils.targets import Targets, sequences_hash, target_settings

# What two runs must have in common for the one's sequences to be the other's: not the layer, not the device.
SHARED = ("backbone", "weight_hash", "start_id", "eos_ids", "pad_id", "dtype", "seed")


def committed_sequences(run: RunConfig, backbone: str) -> Path:
    """Where the repository keeps the sequences of a run."""
    return ROOT / "paper" / "sequences" / backbone / f"{dataclasses.replace(run, layer=None).folder_name}.safetensors"


def _record(run: RunConfig, folder: RunFolder) -> dict:
    return {**{key: folder.identity[key] for key in SHARED}, "sampling": target_settings(run).record()}


def write_sequences(path: Path, run: RunConfig, folder: RunFolder, targets: Targets) -> None:
    """Keep ids (N, T) int32 and lengths (N,) int32 of a run's targets, with what drew them."""
    tensors = {name: np.ascontiguousarray(x) for name, x in targets.texts.items()}
    record = {**_record(run, folder), "sha256": sequences_hash(**tensors)}
    atomic_write(path, save(tensors, metadata={"record": json.dumps(record)}))


def read_sequences(path: Path, run: RunConfig, folder: RunFolder) -> dict[str, np.ndarray]:
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
    for key, live in _record(run, folder).items():
        if record.get(key) != live:
            raise ArtefactError(f"{path} was drawn with {key} = {record.get(key)!r}, this run has {key} = {live!r}")
    if record.get("sha256") != sequences_hash(**tensors):
        raise ArtefactError(f"{path} was altered: its sequences are not those it was written with")
    if len(tensors["ids"]) < n:
        held = len(tensors["ids"])
        raise ArtefactError(f"{path} holds {held} sequences, the run needs {n}; add --set n_targets={held}")
    return {name: x[:n] for name, x in tensors.items()}
