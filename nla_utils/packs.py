"""Released targets: the authors' ``.pt`` packs and this repository's own releases, as ids, lengths and v.

The fields of a pack are not documented, so its parts are told apart by type and shape: activations are floats, one
(T, d) tensor a sample or one dense (N, T, d); token ids, masks and lengths are whole numbers; texts are strings. What
was understood is then checked: the texts must re-encode to their activations. No code of a pack is run
(``weights_only``), and none of it is held in memory (it is mapped, and one position of each sample is read).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Sequence

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nla_utils.backbone import Backbone
from nla_utils.metrics import fve
from nla_utils.progress import Progress
from nla_utils.store import ArtefactError

CHECKED_ROWS = 64
# Of another layer or layout nothing agrees; of texts that are tokenized again those that give other ids do not.
NEEDED_AGREEMENT = {"ids": 0.9, "texts": 0.25}


@dataclass
class Pack:
    """Columns of a pack, one entry a sample: activations (T_i, d), and ids, or the texts to make them from."""

    activations: Sequence[Tensor]
    ids: Optional[Sequence[Any]] = None
    mask: Optional[Sequence[Any]] = None
    lengths: Optional[Sequence[int]] = None
    texts: Optional[Sequence[str]] = None

    @property
    def dense(self) -> bool:
        return isinstance(self.activations, Tensor)

    @property
    def padded(self) -> bool:
        """Whether ids go on behind the last position: in a dense pack, and where only the ids are of one length."""
        if self.dense or self.ids is None:
            return self.dense
        return len({len(x) for x in self.ids}) == 1 < len({len(h) for h in self.activations})


def read_released(folder: Path, backbone: Backbone, n: int) -> dict[str, np.ndarray]:
    """The first ``n`` released targets: ids (n, T) int32 of generated tokens, lengths (n,), v (n, d) float32.

    Raises ``ArtefactError`` that names the file where there is none, where its parts cannot be told apart, where it
    holds fewer than ``n``, or where its texts do not re-encode to its activations on this backbone and layer.
    """
    ours, packs = folder / "targets.safetensors", sorted(folder.glob("*.pt"))
    if ours.exists():
        tensors, path, kind = _read_own(ours, n), ours, "ids"
    elif len(packs) == 1:
        path = packs[0]
        tensors, kind = _read_pack(path, backbone, n)
    else:
        names = [p.name for p in packs]
        raise ArtefactError(f"{folder} holds the packs {names}; targets are targets.safetensors or exactly one .pt")
    _check(tensors, path, backbone, NEEDED_AGREEMENT[kind])
    return tensors


def _read_own(path: Path, n: int) -> dict[str, np.ndarray]:
    with safe_open(path, "np") as f:
        missing = {"ids", "lengths", "v"} - set(f.keys())
        if missing:
            raise ArtefactError(f"{path} lacks {sorted(missing)}")
        _check_count(path, f.get_slice("v").get_shape()[0], n)
        return {k: f.get_slice(k)[:n] for k in ("ids", "lengths", "v")}


def _check_count(path: Path, held: int, n: int) -> None:
    if held < n:
        raise ArtefactError(f"{path} holds {held} targets, the run needs {n}; add --set n_targets={held}")


def _read_pack(path: Path, backbone: Backbone, n: int) -> tuple[dict[str, np.ndarray], str]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # The loader has an error of its own for each way in which a file can be broken or unsafe.
    except Exception as error:
        raise ArtefactError(
            f"{path} was not read: it is broken, or holds more than tensors and plain values ({error})"
        ) from None
    pack = find_columns(content, backbone.d, str(path))
    _check_count(path, len(pack.activations), n)
    # A text may itself begin with the start token: only where all of them do, it is the prompt.
    prompted = pack.ids is not None and all(int(ids[0]) == backbone.start_id for ids in pack.ids)
    padded, v_nd, sequences = pack.padded, np.empty((n, backbone.d), dtype=np.float32), []
    for i in Progress(range(n), desc="reading the pack", unit="target"):
        own = backbone.tokenize_text(pack.texts[i]) if pack.ids is None else [int(x) for x in pack.ids[i]]
        ids = own if prompted else [backbone.start_id, *own]
        last = _last_position(pack, i, ids, backbone)
        v_nd[i] = pack.activations[i][last].float().numpy()
        sequences.append((ids[: last + 1] if padded else ids)[1:])
    lengths = np.array([len(s) for s in sequences], dtype=np.int32)
    if lengths.min() == 0:
        raise ArtefactError(f"{path}: sample {int(lengths.argmin())} has no token behind its start token")
    ids_nT = np.full((n, lengths.max()), backbone.pad_id, dtype=np.int32)
    for row, sequence in zip(ids_nT, sequences):
        row[: len(sequence)] = sequence
    return {"ids": ids_nT, "lengths": lengths, "v": v_nd}, "texts" if pack.ids is None else "ids"


def find_columns(content: Any, d: int, source: str) -> Pack:
    """The columns of a pack, whatever they are called; raises ``ArtefactError`` that says what is there instead."""
    if isinstance(content, dict):
        nested = [v for v in content.values() if isinstance(v, dict) or _is_records(v)]
        if len(nested) == 1 and not _activations(content, d):
            return find_columns(nested[0], d, source)
    if _is_records(content):
        content = {key: [record[key] for record in content] for key in content[0]}
    if not isinstance(content, dict):
        raise ArtefactError(f"{source}: expected a mapping or a list of mappings, found {type(content).__name__}")
    found = _activations(content, d)
    if len(found) != 1:
        raise ArtefactError(f"{source}: {len(found)} of its fields look like activations of width {d}: {_say(content)}")
    pack = Pack(content[found[0]])
    for value in (v for k, v in content.items() if k != found[0] and _is_column(v, len(pack.activations))):
        _assign(pack, value)
    if pack.ids is None and pack.texts is None:
        raise ArtefactError(f"{source}: neither token ids nor texts were found beside the activations: {_say(content)}")
    return pack


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _is_column(value: Any, n: int) -> bool:
    return isinstance(value, (list, tuple, Tensor)) and len(value) == n


def _activations(content: dict, d: int) -> list[str]:
    def fits(value: Any) -> bool:
        if not isinstance(value, (list, tuple, Tensor)) or len(value) == 0 or not isinstance(value[0], Tensor):
            return False
        return value[0].ndim == 2 and value[0].shape[1] == d and value[0].is_floating_point()

    return [key for key, value in content.items() if fits(value)]


def _assign(pack: Pack, column: Sequence[Any]) -> None:
    """Put a column where its type says that it belongs."""
    if isinstance(column[0], str):
        pack.texts = column
        return
    first = torch.as_tensor(column[0])
    if first.is_floating_point() or first.is_complex():
        return
    if first.ndim == 0:
        counts = [int(x) for x in column]
        if min(counts) >= 1 and max(counts) <= max(len(h) for h in pack.activations):
            pack.lengths = counts
    elif first.ndim == 1 and int(first.max()) <= 1:
        pack.mask = column
    elif first.ndim == 1:
        pack.ids = column


def _say(content: dict) -> str:
    def shape(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__

    return ", ".join(f"{key!r}: {shape(value)}" for key, value in content.items())


def _last_position(pack: Pack, i: int, ids: list[int], backbone: Backbone) -> int:
    """Index of the last valid activation of sample i, ``ids`` with the start token; only a dense row may be padded.

    Without a mask or lengths a dense row ends at its first generated EOS: the prompt's own start token, which may
    be one too, is not looked at.
    """
    if not pack.dense:
        return len(pack.activations[i]) - 1
    if pack.mask is not None:
        return int(np.flatnonzero(np.asarray(pack.mask[i]))[-1])
    if pack.lengths is not None:
        return pack.lengths[i] - 1
    ends = [t for t, x in enumerate(ids) if t > 0 and x in backbone.eos_ids]
    return ends[0] if ends else len(pack.activations[i]) - 1


def _check(tensors: dict[str, np.ndarray], path: Path, backbone: Backbone, needed: float) -> None:
    """Texts of some targets must re-encode to their v, behind the start token."""
    n = len(tensors["v"])
    if tensors["v"].shape[1] != backbone.d:
        raise ArtefactError(f"{path}: activations have width {tensors['v'].shape[1]}, the backbone has {backbone.d}")
    rows = np.linspace(0, n - 1, min(CHECKED_ROWS, n)).astype(int)
    sequences = [tensors["ids"][i, : tensors["lengths"][i]].tolist() for i in rows]
    score = fve(backbone.encode(sequences, start=True), tensors["v"][rows], tensors["v"].mean(axis=0))
    agree = float((score > 0.98).mean())
    if agree < needed:
        raise ArtefactError(
            f"{path}: the texts of only {agree:.0%} of {len(rows)} samples re-encode to their activations at layer "
            f"{backbone.layer} of {backbone.name}; the pack is of another backbone or layer, or is not laid out as read"
        )
