"""Targets from texts of the user's own, in place of the model's samples: ``texts.jsonl`` with a field ``text``, or a folder
of ``.txt`` files, one text each."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone, outside_ids
from nla_utils.lm.sampling import pad

# A text of fewer tokens is left out: its activation is mostly that of the start.
LEAST_TOKENS = 8


def read_texts(path: Path) -> list[str]:
    """The texts of a corpus in their order, files by name; raises ``ArtefactError`` that names the file and the line."""
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
        if not files:
            raise ArtefactError(f"{path} holds no .txt file; a corpus is a folder of them, or a .jsonl with a field 'text'")
        return [_decoded(file) for file in files]
    if path.suffix != ".jsonl" or not path.is_file():
        raise ArtefactError(f"{path} is neither a .jsonl file nor a folder of .txt files")
    # JSON Lines ends a line at \n alone: U+2028 and the like are part of a text.
    return [_text_of(line, f"{path}, line {i}") for i, line in enumerate(_decoded(path).split("\n"), 1) if line.strip()]


def _decoded(path: Path) -> str:
    try:
        # A byte order mark is no part of the text.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path} is not UTF-8 ({error})") from None
    except OSError as error:
        raise ArtefactError(f"{path} could not be read ({error.strerror})") from None


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{where} is not valid JSON ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ArtefactError(f"{where}: it needs a field 'text' that holds a string, not {row!r:.80}")
    return text


def corpus_hash(texts: list[str]) -> str:
    """Hex sha256 over the texts of a corpus."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def corpus_rows(texts: list[str], path: Path, tokenizer, n: int, longest: int) -> list[list[int]]:
    """Token ids of the first n different texts of the corpus at ``path`` that have 8 tokens or more, cut at ``longest``.

    Texts that are alike in those tokens have the same activation, so only the first of them is taken: else a held-out
    target could be in the pool. Raises ``ConfigError`` for a text that spells a special token, ``ArtefactError`` where
    there are fewer than n.
    """
    rows = [outside_ids(tokenizer, text, f"{path}, text {i}")[:longest] for i, text in enumerate(texts, 1)]
    long_enough = [tuple(ids) for ids in rows if len(ids) >= LEAST_TOKENS]
    different = list(dict.fromkeys(long_enough))
    if len(different) < n:
        raise ArtefactError(
            f"{path} holds {len(texts)} texts, {len(rows) - len(long_enough)} of them shorter than {LEAST_TOKENS} tokens and "
            f"{len(long_enough) - len(different)} equal to another in their first {longest} tokens; the run needs {n}: "
            f"give more texts, or add --set n_targets={len(different)}"
        )
    return [list(ids) for ids in different[:n]]


def corpus_targets(texts: list[str], path: Path, backbone: Backbone, n: int, longest: int) -> dict[str, np.ndarray]:
    """The texts of :func:`corpus_rows` as targets: ids (n, T) int32, lengths (n,), and v (n, d) at the last token of each,
    behind BOS."""
    rows = corpus_rows(texts, path, backbone.tokenizer, n, longest)
    ids_NT, valid_NT = pad(rows, backbone.pad_id, "right")
    lengths = valid_NT.sum(dim=1).int().numpy()
    return {"ids": ids_NT.int().numpy(), "lengths": lengths, "v": backbone.encode(rows, start=True)}
