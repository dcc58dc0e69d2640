"""What users of comparable software reported, each as one small input: the right value, or one clear error.

A row is (what was reported, what to do, what to expect). To add one, write a function that gives the outcome, and a row.
"""

import dataclasses
import json
import os

import pytest
from conftest import CORPUS, tiny_config

from nla_utils import NLA
from nla_utils.artefacts import write_json
from nla_utils.config import cache_dir
from nla_utils.errors import ArtefactError, ConfigError, NLAError
from nla_utils.extensions.release.explore import explore
from nla_utils.run import open_run
from nla_utils.stages.corpus import corpus_rows, read_texts
from nla_utils.stages.targets import make_targets

WORDS = CORPUS.read_text(encoding="ascii").split()
TEXTS = [" ".join(WORDS[i : i + 20]) for i in range(120)]


def jsonl(folder, *lines: bytes):
    path = folder / "texts.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize("given, texts", [
    ("\u2028 inside", ["\u2028 inside"]), ("\u2029 inside", ["\u2029 inside"]), ("\x85 inside", ["\x85 inside"]),
])  # fmt: skip
def test_a_line_ends_at_a_newline_alone(tmp_path, given, texts):
    path = jsonl(tmp_path, json.dumps({"text": given}, ensure_ascii=False).encode(), b'{"text": "next"}\r', b"")
    assert read_texts(path) == [*texts, "next"]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    assert read_texts(jsonl(tmp_path, b'\xef\xbb\xbf{"text": "a"}')) == ["a"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read_texts(tmp_path / "folder") == ["a"]


@pytest.mark.parametrize("line, message", [
    (b'{"text": ' + b"[" * 100_000, "line 1 is not valid JSON"),
    (b'{"text": "\xe9"}', "is not UTF-8"),
    (b"[1, 2]", "line 1: it needs a field 'text'"),
])  # fmt: skip
def test_a_broken_line_is_one_error(tmp_path, line, message):
    with pytest.raises(ArtefactError, match=message):
        read_texts(jsonl(tmp_path, line))


def test_a_folder_called_as_a_file_is_no_text(tmp_path):
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(ArtefactError, match="holds no .txt file"):
        read_texts(tmp_path)


@pytest.mark.parametrize("text, message", [
    ("<bos>a text", "spells the special token '<bos>'"),
    ("a text <eos> that goes on", "spells the special token '<eos>'"),
    ("a \ud800 text", "character 3 is not valid Unicode"),
    ("a \udce9 text", "character 3 is not valid Unicode"),
])  # fmt: skip
def test_every_door_refuses_what_is_not_text(gemma_run, tmp_path, text, message):
    backbone, path = gemma_run[0].backbone, tmp_path / "texts.jsonl"
    with pytest.raises(ConfigError, match=f"texts.jsonl, text 2: .*{message}"):
        corpus_rows([TEXTS[0], text], path, backbone.tokenizer, 1, 24)
    nla = NLA(backbone, None)
    for door in (nla.activation, nla.trace, nla.token_ids):
        with pytest.raises(ConfigError, match=message):
            door(text)


def test_a_held_out_text_is_never_in_the_pool(tiny_folders, tmp_path):
    """40 % of the texts share their first tokens: they are one target, and the run says what it lacks."""
    header = " ".join(WORDS[:40])
    shared = [f"{header} {i}" for i in range(64)]
    path = jsonl(tmp_path, *(json.dumps({"text": t}).encode() for t in [*shared, *TEXTS]))
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path / "runs", corpus=str(path)))
    targets = make_targets(run)
    held_out = {tuple(targets.sequence(i)) for i in targets.held_out}
    assert len(held_out) == len(targets.held_out)
    assert not held_out & {tuple(targets.sequence(i)) for i in targets.pool}
    with pytest.raises(ArtefactError, match="63 equal to another in their first 24 tokens"):
        corpus_rows([*shared, *TEXTS[1:9]], path, run.backbone.tokenizer, 96, 24)


@pytest.mark.parametrize("k", [0, -1, 49])
def test_a_page_has_as_many_readings_as_there_are_stored_texts(nla, k):
    assert len(nla.bundle.pool_texts) == 48
    with pytest.raises(ConfigError, match=f"k is {k}; choose 1 to 48"):
        explore(nla, "the clock", [1], k)


def test_no_file_holds_a_number_that_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_character_of_several_tokens_is_shown_whole(gemma_run):
    class Bytes:
        """A tokenizer of single bytes."""

        @staticmethod
        def decode(ids):
            return bytes(ids).decode(errors="replace")

    backbone, text = dataclasses.replace(gemma_run[0].backbone, tokenizer=Bytes), "a 日\u200d"
    labels = backbone.label_tokens(list(text.encode()))
    assert labels == ["a", " ", "[230]", "[151]", "日", "[226]", "[128]", "[141]"]


def test_the_cache_needs_no_home(monkeypatch, tmp_path):
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("NLA_CACHE")
    with pytest.raises(NLAError, match="set NLA_CACHE"):
        cache_dir()
    assert "NLA_CACHE" not in os.environ
