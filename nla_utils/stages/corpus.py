"""Targets from texts of the user's own, in place of the model's samples: ``texts.jsonl`` with a field ``text``, or a folder
of ``.txt`` files, one text each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone

# A text of fewer tokens is left out: its activation is mostly that of the start.
LEAST_TOKENS = 8


def read_texts(path: Path) -> list[str]:
    """The texts of a corpus in their order, files by name; raises ``ArtefactError`` that names the file and the line."""
    if path.is_dir():
        files = sorted(path.glob("*.txt"))
        if not files:
            raise ArtefactError(f"{path} holds no .txt file; a corpus is a folder of them, or a .jsonl with a field 'text'")
        return [_decoded(file) for file in files]
    if path.suffix != ".jsonl" or not path.is_file():
        raise ArtefactError(f"{path} is neither a .jsonl file nor a folder of .txt files")
    return [_text_of(line, f"{path}, line {i}") for i, line in enumerate(_decoded(path).splitlines(), 1) if line.strip()]


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path} is not UTF-8 ({error})") from None


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ArtefactError(f"{where} is no JSON ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ArtefactError(f"{where}: it needs a field 'text' that holds a string, not {row!r:.80}")
    return text


def corpus_hash(path: Path) -> str:
    """Hex sha256 over the texts of a corpus."""
    return hashlib.sha256(json.dumps(read_texts(path)).encode()).hexdigest()


def corpus_targets(path: Path, backbone: Backbone, n: int, longest: int) -> dict[str, np.ndarray]:
    """The first n texts of a corpus that have 8 tokens or more, as targets: ids (n, T) int32 cut at ``longest`` tokens,
    lengths (n,), and v (n, d) at the last of them, behind BOS.

    Raises ``ArtefactError`` where there are fewer.
    """
    texts = read_texts(path)
    tokenized = [backbone.tokenize_text(text)[:longest] for text in texts]
    rows = [ids for ids in tokenized if len(ids) >= LEAST_TOKENS]
    if len(rows) < n:
        raise ArtefactError(
            f"{path} holds {len(texts)} texts, {len(texts) - len(rows)} of them shorter than {LEAST_TOKENS} tokens; the run "
            f"needs {n}: give more texts, or add --set n_targets={len(rows)}"
        )
    rows = rows[:n]
    ids_NT = np.full((n, max(map(len, rows))), backbone.pad_id, dtype=np.int32)
    for filled, row in zip(ids_NT, rows):
        filled[: len(row)] = row
    lengths = np.array([len(row) for row in rows], dtype=np.int32)
    return {"ids": ids_NT, "lengths": lengths, "v": backbone.encode(rows, start=True)}
