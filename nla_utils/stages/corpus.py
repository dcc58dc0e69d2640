"""Targets from texts of the user's own, in place of the model's samples: ``texts.jsonl`` with a field ``text``, or a folder
of ``.txt`` files, one text each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import pad

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


def corpus_hash(texts: list[str]) -> str:
    """Hex sha256 over the texts of a corpus."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def corpus_targets(texts: list[str], path: Path, backbone: Backbone, n: int, longest: int) -> dict[str, np.ndarray]:
    """The first n texts of the corpus at ``path`` that have 8 tokens or more, as targets: ids (n, T) int32 cut at
    ``longest`` tokens, lengths (n,), and v (n, d) at the last of them, behind BOS.

    Raises ``ArtefactError`` where there are fewer.
    """
    tokenized = [backbone.tokenize_text(text)[:longest] for text in texts]
    rows = [ids for ids in tokenized if len(ids) >= LEAST_TOKENS]
    if len(rows) < n:
        raise ArtefactError(
            f"{path} holds {len(texts)} texts, {len(texts) - len(rows)} of them shorter than {LEAST_TOKENS} tokens; the run "
            f"needs {n}: give more texts, or add --set n_targets={len(rows)}"
        )
    rows = rows[:n]
    ids_NT, valid_NT = pad(rows, backbone.pad_id, "right")
    lengths = valid_NT.sum(dim=1).int().numpy()
    return {"ids": ids_NT.int().numpy(), "lengths": lengths, "v": backbone.encode(rows, start=True)}
