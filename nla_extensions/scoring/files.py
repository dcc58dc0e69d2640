"""Vectors and texts from files: what every command that takes somebody's own reads them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Iterator, Optional, Sequence

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nla_utils.errors import ArtefactError, ConfigError, nearest
from nla_utils.lm.backbone import Backbone, outside_ids
from nla_utils.targets import json_lines

# What a file may call its rows, beside one tensor (M, d).
NAMES = "names"


def _npy(path: Path) -> dict:
    return {"": torch.from_numpy(np.load(path, allow_pickle=False))}


def _safetensors(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        given = (file.metadata() or {}).get(NAMES)
        return {name: file.get_tensor(name) for name in file.keys()} | ({NAMES: json.loads(given)} if given else {})


def _pt(path: Path) -> dict:
    found = torch.load(path, map_location="cpu", weights_only=True)
    return found if isinstance(found, dict) else {"": found}


READERS = {".npy": _npy, ".safetensors": _safetensors, ".pt": _pt}


def _read(path: Path) -> dict:
    """Tensors by name, and ``names`` if there are any; raises ``ConfigError`` for a file that cannot be read."""
    if path.suffix not in READERS:
        raise ConfigError(f"{path}: vectors are read from {', '.join(READERS)}, not {path.suffix or 'a bare name'}")
    try:
        return READERS[path.suffix](path)
    # Each format has errors of its own for a file that is empty, cut, or of another kind.
    except Exception as error:
        raise ConfigError(f"{path} was not read: {error or type(error).__name__}; it must hold tensors") from None


def read_vector(path: Path) -> Tensor:
    """The one tensor in a ``.npy``, ``.safetensors`` or ``.pt`` file; raises ``ConfigError`` where it holds another."""
    content = _read(path)
    tensors = list(content.values())
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or not tensors[0].is_floating_point():
        held = sorted(map(str, content)) if len(content) != 1 else "no floating-point tensor"
        raise ConfigError(f"{path} holds {held}; exactly one tensor of floats is read")
    return tensors[0]


def read_vectors(path: Path) -> tuple[list[str], np.ndarray]:
    """Names of M vectors and the vectors (M, d) float32.

    The file holds one tensor (M, d), named by ``names`` if it has them (a list in a ``.pt``, JSON in the metadata of a
    ``.safetensors``), else by their number from 0; or several (d,), each of which has a name. Raises ``ConfigError``
    for anything else.
    """
    content = _read(path)
    names = content.pop(NAMES, None)
    wrong = [name for name, x in content.items() if not isinstance(x, Tensor) or not x.is_floating_point()]
    shapes = {tuple(x.shape) for x in content.values() if isinstance(x, Tensor)}
    if (
        wrong
        or len(shapes) != 1
        or len(shape := shapes.pop()) not in (1, 2)
        or (len(shape) == 2) != (len(content) == 1)
    ):
        held = ", ".join(f"{name or 'a tensor'} {tuple(getattr(x, 'shape', ()))}" for name, x in content.items())
        raise ConfigError(
            f"{path} holds {held or 'nothing'}; it must hold one tensor of floats (M, d), or several (d,)"
        )
    if len(shape) == 1:
        names, rows = list(map(str, content)), torch.stack(list(content.values()))
    else:
        (rows,) = content.values()
        names = list(map(str, range(len(rows)) if names is None else names))
    if len(names) != len(rows):
        raise ConfigError(f"{path} holds {len(rows)} vectors and {len(names)} names; each has one")
    return names, rows.float().numpy()


def check_vectors(v_Md: np.ndarray, names: Sequence[str], d: int, what: str) -> np.ndarray:
    """The vectors as float32; raises ``ConfigError`` that names the first one that is zero or not finite, and for
    another width, or names that are not each one's own."""
    v_Md = np.asarray(v_Md, dtype=np.float32)
    if v_Md.ndim != 2 or not len(v_Md) or v_Md.shape[1] != d:
        raise ConfigError(f"vectors have shape {v_Md.shape}; those of {what} have (M, {d})")
    if len(set(names)) != len(v_Md):
        raise ConfigError(f"{len(v_Md)} vectors have {len(set(names))} different names; each has one")
    for said, bad_M in (
        ("holds NaN or infinity", ~np.isfinite(v_Md).all(axis=1)),
        ("is zero, and has no direction", ~v_Md.any(axis=1)),
    ):
        if bad_M.any():
            raise ConfigError(f"vector {names[int(bad_M.argmax())]!r} {said}; leave it out")
    return v_Md


def read_texts(path: Path, names: Sequence[str], backbone: Backbone) -> tuple[list[list[list[int]]], list[str]]:
    """Token ids of each vector's texts, start token aside, in the order of the file, and what a reader should know.

    JSON Lines: ``{"id", "text"}`` or ``{"id", "texts": [...]}``, ``id`` a vector's name or number; ``ids`` (token ids,
    of one text or of each) instead of strings or beside them, where they are what is read. Several lines of one id are
    taken together. Raises ``ConfigError`` or ``ArtefactError`` that names the line.
    """
    found: dict[str, list[list[int]]] = {name: [] for name in names}
    notes, changed, both = [], 0, 0
    for i, row in json_lines(path):
        where = f"{path}, line {i}"
        name, strings, ids = _of_line(row, where)
        if name not in found:
            raise ConfigError(f"{where}: id {name!r} is no vector's name: {nearest(name, names)}")
        if strings is not None:
            tokenized = [outside_ids(backbone.tokenizer, text, where) for text in strings]
            if ids is not None:
                if len(ids) != len(strings):
                    raise ConfigError(f"{where}: {len(strings)} texts and the ids of {len(ids)}")
                both, changed = both + len(ids), changed + sum(a != list(b) for a, b in zip(tokenized, ids))
        found[name] += check_ids(tokenized if ids is None else ids, backbone, where)
    without = [name for name in names if not found[name]]
    if without:
        raise ConfigError(f"{path} has no text for {len(without)} of {len(names)} vectors, the first is {without[0]!r}")
    if both:
        notes.append(f"{changed:,} of {both:,} texts, tokenized here, give other ids; the given ids are read")
    return list(found.values()), notes


def _of_line(row: object, where: str) -> tuple[str, Optional[list[str]], Optional[list]]:
    """(id, strings, ids) of a line, the latter two for each text or ``None``."""
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("id"), (str, int))
        or {"text", "texts", "ids"}.isdisjoint(row)
    ):
        raise ConfigError(f"{where}: it needs an 'id', and 'text', 'texts' or 'ids', not {row!r:.80}")
    strings = [row["text"]] if "text" in row else row.get("texts")
    if strings is not None and (not isinstance(strings, list) or not all(isinstance(x, str) for x in strings)):
        raise ConfigError(f"{where}: 'text' is a string and 'texts' a list of them, not {strings!r:.80}")
    ids = row.get("ids")
    if ids is not None and not (isinstance(ids, list) and ids):
        raise ConfigError(f"{where}: 'ids' is a list of token ids, or of such lists, not {ids!r:.80}")
    if ids is not None and not isinstance(ids[0], list):
        ids = [ids]
    return str(row["id"]), strings, ids


def check_ids(texts: Sequence[Sequence[int]], backbone: Backbone, where: str) -> list[list[int]]:
    """The ids as they are; raises ``ConfigError`` for what is none of the backbone's."""
    most = len(backbone.head_weight)
    for ids in texts:
        wrong = next((i for i in ids if not isinstance(i, (int, np.integer)) or not 0 <= i < most), None)
        if wrong is not None:
            raise ConfigError(f"{where}: {wrong!r} is no token id; {backbone.name} has 0 to {most - 1}")
    return [list(map(int, ids)) for ids in texts]


def ids_of(texts: Sequence, names: Sequence[str], backbone: Backbone) -> list[list[list[int]]]:
    """The same of texts in memory: for each vector a string, token ids, or a list of either."""

    def one(text, where: str) -> list[int]:
        return outside_ids(backbone.tokenizer, text, where) if isinstance(text, str) else list(text)

    if len(texts) != len(names):
        raise ConfigError(f"there are texts for {len(texts)} vectors, and {len(names)} vectors")
    found = []
    for name, own in zip(names, texts):
        where = f"texts of vector {name!r}"
        single = isinstance(own, str) or (len(own) and not isinstance(own[0], (str, list, tuple, np.ndarray)))
        listed = [one(text, where) for text in ([own] if single else own)]
        if not listed:
            raise ConfigError(f"{where}: there is none")
        found.append(check_ids(listed, backbone, where))
    return found


def resumed(path: Path, plan: dict) -> tuple[Path, dict[str, dict]]:
    """The file that lines are kept in until all are there, and the lines that it has, by id; raises ``ArtefactError``
    where it is of another plan."""
    partial = path.with_name(f"{path.name}.partial")
    if not partial.exists():
        partial.write_text(json.dumps({"plan": plan}) + "\n", encoding="utf-8")
        return partial, {}
    kept = partial.read_bytes()
    # A line that was cut short is written again.
    kept = kept[: kept.rfind(b"\n") + 1]
    partial.write_bytes(kept)
    lines = [json.loads(line) for line in kept.decode().split("\n")[:-1]]
    if not lines or lines[0].get("plan") != json.loads(json.dumps(plan)):
        raise ArtefactError(f"{partial} is left from other vectors or options; delete it, or go back to those")
    return partial, {line["id"]: line for line in lines[1:]}


def blocks(counts: Sequence[int], most: int) -> Iterator[slice]:
    """Successive vectors that have ``most`` texts together, or one that has more."""
    first, held = 0, 0
    for i, n in enumerate(counts):
        if i > first and held + n > most:
            yield slice(first, i)
            first, held = i, 0
        held += n
    yield slice(first, len(counts))
