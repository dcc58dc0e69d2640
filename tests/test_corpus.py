"""Targets from texts of one's own: read as they are, cut, encoded behind BOS, refused with a reason."""

import json

import golden
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import CORPUS, tiny_config

from nla_extensions.cli import app
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.run import open_run
from nla_utils.store import json_hash
from nla_utils.targets import LEAST_TOKENS, describe, load_targets, make_targets, read_texts

WORDS = CORPUS.read_text(encoding="ascii").split()
TEXTS = [" ".join(WORDS[i : i + 20]) for i in range(0, 120)]


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate(TEXTS)) + "\n\n")
    return path


@pytest.fixture
def run(tiny_folders, tmp_path, texts):
    return open_run(tiny_config(tiny_folders["tiny-gemma2"], tmp_path / "runs", corpus=str(texts)))


def test_targets_are_the_texts_cut_and_encoded_behind_bos(run):
    targets = make_targets(run)
    assert len(targets.v) == run.sizes.n_targets and run.folder.path.name == "smoke-corpus-texts"
    for i in (0, 40, 95):
        ids = run.backbone.tokenize_text(TEXTS[i])[: run.sizes.max_new_tokens]
        assert targets.sequence(i) == ids
        np.testing.assert_allclose(targets.v[i], run.backbone.encode([ids], start=True)[0], atol=1e-4)
    assert load_targets(run).sha256 == targets.sha256
    facts = describe(run, targets)
    assert (facts["corpus"], facts["corpus_sha256"]) == ("texts", json_hash(TEXTS))


def test_a_folder_of_files_is_the_same_corpus(tmp_path, texts):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:04d}.txt").write_text(text)
    assert read_texts(folder) == read_texts(texts) == TEXTS


def test_short_texts_are_left_out_and_counted(run, texts):
    texts.write_text("\n".join(json.dumps({"text": t}) for t in ["a", *TEXTS]))
    assert make_targets(run).sequence(0) == run.backbone.tokenize_text(TEXTS[0])[: run.sizes.max_new_tokens]


def test_too_few_texts_say_how_many_there_are(run, texts):
    texts.write_text("\n".join(json.dumps({"text": t}) for t in ["a", "b", *TEXTS[:90], TEXTS[0]]))
    message = (
        f"holds 93 texts, 2 of them shorter than {LEAST_TOKENS} tokens and 1 equal to another in their first "
        "24 tokens; 96 are needed"
    )
    with pytest.raises(ArtefactError, match=message):
        make_targets(run)


def test_another_text_in_the_file_is_noticed(run, texts):
    make_targets(run)
    texts.write_text("\n".join(json.dumps({"text": t}) for t in reversed(TEXTS)))
    with pytest.raises(
        ArtefactError, match="made with corpus_sha256 = .*, this run has .*choose another --out, or delete"
    ):
        make_targets(run)
    texts.unlink()
    with pytest.raises(ArtefactError, match="neither a .jsonl file"):
        make_targets(run)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"text": "x"}\nno json', "line 2 is not valid JSON"),
        ("a.jsonl", '{"txt": "x"}', "line 1: it needs a field 'text'"),
        ("a.jsonl", '{"text": 7}', "needs a field 'text'"),
        ("a.jsonl", b"\xff\xfe", "is not UTF-8"),
        ("a.csv", "text", "neither a .jsonl file nor a folder"),
        ("empty", None, "holds no .txt file"),
    ],
)
def test_what_is_no_corpus_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArtefactError, match=message):
        read_texts(path)


def test_two_sources_of_targets_are_refused(tiny_folders, tmp_path):
    with pytest.raises(ConfigError, match="not from both"):
        tiny_config(tiny_folders["tiny-gemma2"], tmp_path, corpus="a.jsonl", released_targets="b")


def test_the_command_takes_a_corpus_and_refuses_a_bad_one_before_work(tiny_folders, tmp_path, texts):
    backbone, out = str(tiny_folders["tiny-llama"]), str(tmp_path / "out")
    options = ["reproduce", "--backbone", backbone, *golden.OPTIONS, "--until", "1", "--out", out]
    refused = CliRunner().invoke(app, [*options, "--corpus", str(tmp_path / "none.jsonl")])
    assert refused.exit_code == 2 and "neither a .jsonl file" in refused.output
    done = CliRunner().invoke(app, [*options, "--corpus", str(texts)])
    assert done.exit_code == 0, done.output
    folder = tmp_path / "out" / "tiny-llama" / "smoke-corpus-texts"
    assert json.loads((folder / "targets.safetensors.json").read_text())["corpus"] == "texts.jsonl"
