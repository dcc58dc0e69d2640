"""Verbalizers from outside: one class with ``write``, from a file or another package, and those that prompts make."""

import importlib.metadata
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from nla_extensions.cli import app
from nla_extensions.comparison.measure import compare
from nla_extensions.release import verbalizers as of
from nla_extensions.release.verbalizers import JsonlVerbalizer, PromptVerbalizer, find_verbalizer, write
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.sampling import row_streams

MODULE = '''
from nla_extensions.release.verbalizers import Verbalizer

class Parrot:
    """Says the same of everything."""

    def __init__(self, backbone, bundle):
        pass

    def write(self, v_Md, k, streams_B):
        return [["a text", *(f"text {i}" for i in range(k))] for _ in v_Md]

class Short(Verbalizer):
    def write(self, v_Md, k, streams_B):
        return [[[5, 6]] for _ in v_Md]

class Mute:
    pass
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "somebodys.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "somebodys"


def test_a_class_of_ones_own_is_read_like_ours(nla, module):
    v = nla.activation("the keeper wound the clock")
    found = nla.verbalize(v, k=3, method=f"{module}:Parrot")
    assert found.text in ("text 0", "text 1", "text 2") and found.greedy == "a text"
    with pytest.raises(ConfigError, match="Short.write gave 1 texts for 1 vectors; it must give 1 . 3"):
        nla.verbalize(v, k=3, method=f"{module}:Short")
    for method, message in (
        (f"{module}:Mute", "has no method write"),
        (f"{module}:Absent", "Absent was not found"),
        ("nowhere:Parrot", "nowhere:Parrot was not found"),
        ("lense", "did you mean 'lens'"),
    ):
        with pytest.raises(ConfigError, match=message):
            nla.verbalize(v, k=3, method=method)


def test_another_packages_entry_point_is_found_when_asked_for(nla, module, monkeypatch):
    entry = importlib.metadata.EntryPoint("parrot", f"{module}:Parrot", of.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == of.GROUP else [])
    assert find_verbalizer("parrot").__name__ == "Parrot"
    assert nla.verbalize(nla.activation("a"), k=1, method="parrot").greedy == "a text"


def test_it_stands_in_the_comparison(nla, module, tmp_path):
    record = compare(nla, 2, 1, 2, 1, tmp_path / "unfinished.json", (f"{module}:Parrot",))
    rows = {row["method"]: row for row in record["rows"]}
    assert rows[f"{module}:Parrot"]["best_cen"] and {row["method"] for row in record["directions"]} >= {
        f"{module}:Parrot"
    }


# v in a prompt: a model whose prompt holds v of "x" must say what it says of "x".


class Replaced(PromptVerbalizer):
    prompt, placeholder, layer, tokens = "say ? now", "?", 2, 5


class Added(Replaced):
    add, scale = True, 0.5


class Embedded(Replaced):
    layer = 0


class Twice(Replaced):
    prompt = "say ? and ? now"


class AtNorm(Replaced):
    norm, start = 2.5, False


class Matched(Added):
    norm = "match"


def read_by_hand(backbone, scope, v_d):
    """The next token with v put in by a hook of its own."""
    ids, places = scope.ids
    embeds = backbone.embed(torch.tensor([ids])).clone()
    unit = torch.from_numpy(v_d / np.linalg.norm(v_d))

    def put(_module, _given, out):
        h = out[0] if isinstance(out, tuple) else out
        for place in places:
            norm = {None: float(np.linalg.norm(v_d)), "match": h[0, place].norm()}.get(scope.norm, scope.norm)
            v = scope.scale * norm * unit
            h[0, place] = h[0, place] + v if scope.add else v
        return out

    if scope.layer:
        handle = backbone.blocks[scope.layer - 1].register_forward_hook(put)
    else:
        put(None, None, embeds)
    with torch.inference_mode():
        found = int(backbone.logits(backbone.last_hidden(inputs_embeds=embeds)[:, -1]).argmax())
    if scope.layer:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", [Replaced, Added, Embedded, Twice, AtNorm, Matched])
def test_v_stands_where_the_class_says(nla, scored_run, kind):
    backbone, targets = nla.backbone, scored_run[1]
    scope, v_Md = kind(backbone, nla.bundle), 3 * targets.v[:3]
    texts = write(scope, backbone, v_Md, 2, row_streams(0, "x", range(3), 3))
    assert texts.lengths.shape == (3, 3) and texts.lengths.max() <= 5
    assert [texts.sequence(m)[0] for m in range(3)] == [read_by_hand(backbone, scope, v_d) for v_d in v_Md]
    alone = write(scope, backbone, v_Md[1:2], 2, row_streams(0, "x", [1], 3))
    assert alone.sequences == texts.take(np.array([1])).sequences


def test_another_model_may_write(nla, scored_run):
    class Other(Replaced):
        model = scored_run[0].config.backbone

    v_Md, streams_B = 3 * scored_run[1].v[:2], row_streams(0, "x", range(2), 2)
    own, other = (kind(nla.backbone, nla.bundle).write(v_Md, 1, streams_B) for kind in (Replaced, Other))
    # Its own checkpoint at its own layer: the same texts but for the dtype that it is loaded in.
    assert other.lengths.shape == own.lengths.shape and own.sequence(0) == other.sequence(0)


def test_a_bad_prompt_or_adapter_is_named(nla, tmp_path):
    class NoPlace(Replaced):
        prompt = "say it"

    class Long(Replaced):
        placeholder = "the lighthouse"
        prompt = "say the lighthouse"

    class Lora(Replaced):
        adapter = str(tmp_path)

    for kind, message in ((NoPlace, "must be one token"), (Long, "must be one token"), (Lora, "no adapter_model")):
        with pytest.raises(ConfigError, match=message):
            kind(nla.backbone, nla.bundle).write(
                np.ones((1, nla.backbone.d), np.float32), 1, row_streams(0, "x", [0], 2)
            )


def test_an_adapter_changes_its_own_model_alone(nla, scored_run, tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(nla.backbone.folder)
    tuned = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "lora")

    class Oracle(Replaced):
        add, adapter = True, str(tmp_path / "lora")

    before = nla.backbone.encode([[5, 6]], start=True)
    oracle = Oracle(nla.backbone, nla.bundle)
    oracle.write(3 * scored_run[1].v[:1], 1, row_streams(0, "x", [0], 2))
    assert not np.allclose(oracle.writer.encode([[5, 6]], start=True), before)
    np.testing.assert_array_equal(nla.backbone.encode([[5, 6]], start=True), before)


def test_texts_of_a_file_are_a_verbalizer(nla, scored_run, tmp_path):
    v_Md = scored_run[1].v[:3]
    np.save(tmp_path / "v.npy", v_Md)
    lines = [{"id": i, "ids": [[7 + i], [8 + i], [9 + i]]} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))

    class Mine(JsonlVerbalizer):
        vectors, texts = str(tmp_path / "v.npy"), str(tmp_path / "t.jsonl")

    made = write(Mine(nla.backbone, nla.bundle), nla.backbone, v_Md[[2, 0]], 2, np.zeros(6))
    assert made.sequences == [[9], [10], [11], [7], [8], [9]]
    with pytest.raises(ConfigError, match="has 0 texts for vector 0"):
        write(Mine(nla.backbone, nla.bundle), nla.backbone, v_Md[:1] + 1, 2, np.zeros(3))
    with pytest.raises(ConfigError, match="has 3 texts for vector 0, not 4"):
        write(Mine(nla.backbone, nla.bundle), nla.backbone, v_Md[:1], 3, np.zeros(4))


# Many vectors


@pytest.mark.parametrize("method", ["reader", "av"])
def test_many_vectors_are_read_as_each_alone_and_what_was_cut_resumes(nla, scored_run, tmp_path, monkeypatch, method):
    v_Md, names = scored_run[1].v[:5], list("abcde")
    nla.verbalize_many(names, v_Md, tmp_path / "all.jsonl", 2, method, 0)
    whole = (tmp_path / "all.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in whole] == names
    alone = nla.write(v_Md[3:4], 2, method, 0, first=3)
    assert json.loads(whole[3])["ids"] == [alone.sequence(0, 1), alone.sequence(0, 2)]
    monkeypatch.setattr(type(nla.backbone), "sample_batch", 3)
    write_all, calls = type(nla).write, []

    def cut(self, part, *given):
        calls.append(len(part))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return write_all(self, part, *given)

    monkeypatch.setattr(type(nla), "write", cut)
    with pytest.raises(KeyboardInterrupt):
        nla.verbalize_many(names, v_Md, tmp_path / "cut.jsonl", 2, method, 0)
    with open(tmp_path / "cut.jsonl.partial", "a") as file:
        file.write('{"id": "c", "tex')
    nla.verbalize_many(names, v_Md, tmp_path / "cut.jsonl", 2, method, 0)
    assert (tmp_path / "cut.jsonl").read_text().splitlines() == whole and len(calls) == 6
    assert not (tmp_path / "cut.jsonl.partial").exists()


def test_an_unfinished_file_of_other_vectors_is_refused(nla, scored_run, tmp_path):
    (tmp_path / "t.jsonl.partial").write_text('{"plan": {}}\n')
    with pytest.raises(ArtefactError, match="left from other vectors"):
        nla.verbalize_many(["a"], scored_run[1].v[:1], tmp_path / "t.jsonl", 2, "reader", 0)
    with pytest.raises(ConfigError, match="choose a verbalizer that draws"):
        nla.verbalize_many(["a"], scored_run[1].v[:1], tmp_path / "u.jsonl", 2, "guided", 0)


def test_the_commands_go_together(nla, scored_run, tmp_path, monkeypatch):
    """Texts of many vectors from one command, scored by the other."""
    run, targets, *_ = scored_run
    monkeypatch.chdir(tmp_path)
    save_file({"v": torch.from_numpy(targets.v[targets.held_out])}, tmp_path / "v.safetensors")
    words = f"verbalize --vectors v.safetensors --to reader.jsonl --k 3 --backbone {run.config.backbone}"
    found = CliRunner().invoke(app, [*words.split(), "--run", str(run.folder.path)])
    assert found.exit_code == 0, found.output
    words = (
        f"score --vectors v.safetensors --texts reader.jsonl --backbone {run.config.backbone} --pool {run.folder.path}"
    )
    found = CliRunner().invoke(app, [*words.split(), "--dtype", "float32", "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout.splitlines()[-1])["methods"][0]["K"] == 3
    for words, message in (
        ("verbalize --vectors v.safetensors", "--vectors and --to go together"),
        ("verbalize --text a --to x.jsonl", "--vectors and --to go together"),
    ):
        refused = CliRunner().invoke(app, words.split())
        assert refused.exit_code == 2 and message in refused.output


# The writer's own null


def test_the_texts_of_others_are_a_null(nla):
    v = nla.activation("the keeper wound the clock")
    found = nla.verbalize(v, k=3, method="reader", others=9)
    texts = [nla.write(nla.bundle.pool_v[j : j + 1], 3, "reader", 0, first=1 + j) for j in range(9)]
    best = [nla.backbone.encode([t.sequence(0, 1 + i) for i in range(3)], start=True) for t in texts]
    from nla_utils.metrics import fve

    closer = sum(fve(h, v, nla.bundle.mu).max() >= found.score for h in best)
    assert found.p_writer == pytest.approx((1 + closer) / 10)
    assert "among the texts of 9 other activations" in str(found)
    assert nla.verbalize(v, k=3).p_writer is None
    for asked in ({"others": -1}, {"others": 10**6}, {"others": 3, "method": "guided"}):
        with pytest.raises(ConfigError, match="others is"):
            nla.verbalize(v, k=3, **asked)
