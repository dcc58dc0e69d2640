"""Released targets: a ``targets.safetensors`` of this repository's own releases, or one ``.pt`` with named fields.

A ``.pt`` is a mapping, or a list of mappings, with the fields of :data:`FIELDS`; the texts of some targets must then
re-encode to their activations. No code of a file is run (``weights_only``), and none of it is held in memory: it is
mapped, and one position of each sample is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone
from nla_utils.metrics import fve
from nla_utils.progress import Progress

CHECKED_ROWS = 64
NEEDED_AGREEMENT = 0.9
FIELDS = {
    "hidden": "(T, d) activations of each sample, the start token's first",
    "ids": "token ids of each sample, the start token first",
    "lengths": "how many of them are valid, the start token counted; needed where samples are padded",
}


def read_released(folder: Path, backbone: Backbone, n: int) -> dict[str, np.ndarray]:
    """The first ``n`` released targets: ids (n, T) int32 of generated tokens, lengths (n,), v (n, d) float32.

    Raises ``ArtefactError`` that names the file where there is none, where a field is missing, where it holds fewer
    than ``n``, or where its texts do not re-encode to its activations on this backbone and layer.
    """
    ours, pt_files = folder / "targets.safetensors", sorted(folder.glob("*.pt"))
    if not ours.exists() and len(pt_files) != 1:
        names = [p.name for p in pt_files]
        raise ArtefactError(f"{folder} holds {names}; released targets are targets.safetensors or exactly one .pt")
    path = ours if ours.exists() else pt_files[0]
    tensors = _read_own(path, n) if ours.exists() else _read_pt(path, backbone, n)
    _check(tensors, path, backbone)
    return tensors


def _read_own(path: Path, n: int) -> dict[str, np.ndarray]:
    with safe_open(path, "np") as f:
        missing = {"ids", "lengths", "v"} - set(f.keys())
        if missing:
            raise ArtefactError(f"{path} lacks {sorted(missing)}")
        _check_count(path, f.get_slice("v").get_shape()[0], n)
        return {k: f.get_slice(k)[:n] for k in ("ids", "lengths", "v")}


def _read_pt(path: Path, backbone: Backbone, n: int) -> dict[str, np.ndarray]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # The loader has an error of its own for each way in which a file can be broken or unsafe.
    except Exception as error:
        raise ArtefactError(
            f"{path} was not read: it is broken, or holds more than tensors and plain values ({error})"
        ) from None
    hidden, ids, lengths = _columns(content, path)
    _check_count(path, len(hidden), n)
    v_nd, rows = np.empty((n, backbone.d), dtype=np.float32), []
    for i in Progress(range(n), desc="reading released targets", unit="target"):
        length = len(ids[i]) if lengths is None else int(lengths[i])
        row = [int(x) for x in ids[i][:length]]
        if len(row) < 2 or row[0] != backbone.start_id or len(hidden[i]) < length:
            raise ArtefactError(
                f"{path}: sample {i} has ids {row[:4]}… and activations {tuple(hidden[i].shape)}; its ids begin with "
                f"the start token {backbone.start_id}, and each valid id has an activation"
            )
        v_nd[i] = hidden[i][length - 1].float().numpy()
        rows.append(row[1:])
    counts = np.array([len(r) for r in rows], dtype=np.int32)
    ids_nT = np.full((n, counts.max()), backbone.pad_id, dtype=np.int32)
    for filled, row in zip(ids_nT, rows):
        filled[: len(row)] = row
    return {"ids": ids_nT, "lengths": counts, "v": v_nd}


def _columns(content: Any, path: Path) -> tuple[Sequence[Tensor], Sequence[Any], Sequence[int] | None]:
    """Activations, ids and lengths of a file's samples; raises ``ArtefactError`` that says what is there instead."""
    if isinstance(content, list) and content and isinstance(content[0], dict):
        content = {key: [sample[key] for sample in content] for key in content[0]}
    found = sorted(content) if isinstance(content, dict) else type(content).__name__
    if not isinstance(content, dict) or not {"hidden", "ids"} <= set(content):
        wanted = "; ".join(f"{k!r}: {v}" for k, v in FIELDS.items())
        raise ArtefactError(f"{path} holds {found}, not the fields of released targets ({wanted})")
    if isinstance(content["hidden"], Tensor) and "lengths" not in content:
        raise ArtefactError(f"{path}: its samples are padded to one length, so it needs 'lengths': {FIELDS['lengths']}")
    return content["hidden"], content["ids"], content.get("lengths")


def _check_count(path: Path, held: int, n: int) -> None:
    if held < n:
        raise ArtefactError(f"{path} holds {held} targets, the run needs {n}; add --set n_targets={held}")


def _check(tensors: dict[str, np.ndarray], path: Path, backbone: Backbone) -> None:
    """Texts of some targets must re-encode to their v, behind the start token."""
    n, width = tensors["v"].shape
    if width != backbone.d:
        raise ArtefactError(f"{path}: activations have width {width}, the backbone has {backbone.d}")
    rows = np.linspace(0, n - 1, min(CHECKED_ROWS, n)).astype(int)
    sequences = [tensors["ids"][i, : tensors["lengths"][i]].tolist() for i in rows]
    score = fve(backbone.encode(sequences, start=True), tensors["v"][rows], tensors["v"].mean(axis=0))
    agree = float((score > 0.98).mean())
    if agree < NEEDED_AGREEMENT:
        raise ArtefactError(
            f"{path}: the texts of only {agree:.0%} of {len(rows)} samples re-encode to their activations at layer "
            f"{backbone.layer} of {backbone.name}; it is of another backbone or layer"
        )
