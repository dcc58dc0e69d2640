"""Whether a model, or activations from elsewhere, can be trusted: every fault is planted, and named."""

import dataclasses
import json

import naive
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_config
from safetensors.torch import save_file

from nla_extensions import activations
from nla_extensions.activations import FAULTS, check_activations, read_activations
from nla_extensions.cli import app
from nla_utils.errors import ArtefactError, BackboneError, ConfigError
from nla_utils.lm import checks, cpu
from nla_utils.lm.checks import CHECKS, Finding, run_checks
from nla_utils.lm.loading import load_backbone


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(checks, "N_SAMPLES", 12)
    monkeypatch.setattr(checks, "MAX_TOKENS", 12)


@pytest.fixture
def llama(tiny_folders, tmp_path):
    return load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path))


@pytest.fixture
def gemma(tiny_folders, tmp_path):
    return load_backbone(tiny_config(tiny_folders["tiny-gemma2"], tmp_path))


def failed(findings):
    return {finding.name for finding in findings if finding.passed is False}


# The model


@pytest.mark.parametrize("name", ["tiny-gemma2", "tiny-qwen2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_fails_on_a_model_that_is_sound(name, dtype, tiny_folders, tmp_path):
    backbone = load_backbone(tiny_config(tiny_folders[name], tmp_path, dtype=dtype))
    found = list(run_checks(backbone))
    assert [finding.name for finding in found] == [check.name for check in CHECKS] and not failed(found)
    assert {finding.name for finding in found if finding.passed is None} == {"along μ", "massive coordinates"}
    replay = next(finding for finding in found if finding.name == "replay")
    assert replay.value > 0.999 and replay.limit == checks.SAME_TEXT


def test_shares_are_those_of_the_activations(llama):
    material = checks.Material(llama, [[2, *range(5, 5 + n)] for n in range(3, 12)])
    h = np.array([naive.hidden(llama.model, llama.layer, row) for row in material.rows])
    along = h @ h.mean(axis=0) / np.linalg.norm(h.mean(axis=0))
    assert checks._shares(material)[0] == pytest.approx((along**2).sum() / (h**2).sum(), rel=1e-4)
    power = np.sort((h**2).sum(axis=0))[::-1]
    assert checks._massive(material)[0] == pytest.approx(power[:3].sum() / power.sum(), rel=1e-4)


def leaks(block, _given, out):
    """Rows of a batch see each other."""
    return out + 0.5 * out.mean(dim=0, keepdim=True) if len(out) > 1 else out


def coarse(block, _given, out):
    """Exact in float32 alone."""
    return out if out.dtype == torch.float32 else (out / 4).round() * 4


def nothing(block, _given, out):
    return out * torch.nan


def sees_padding(block, given, out):
    """Every token sees what stands first in its row."""
    return out + given[0][:, :1]


@pytest.mark.parametrize(
    "fault, expected",
    [
        (leaks, {"replay", "batch", "padding"}),
        (sees_padding, {"padding"}),
        (nothing, {"replay", "batch", "stopping at the layer", "head", "own samples"}),
    ],
)
def test_a_fault_of_a_block_is_found(fault, expected, llama):
    llama.blocks[0].register_forward_hook(fault)
    assert expected <= failed(run_checks(llama))


def test_rounding_that_moves_activations_is_found(tiny_folders, tmp_path):
    backbone = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path, dtype="bfloat16"))
    backbone.blocks[0].register_forward_hook(coarse)
    assert failed(run_checks(backbone)) == {"dtype against float32", "attention against float32"}


def test_attention_that_is_not_the_librarys_is_found(llama, monkeypatch):
    right = cpu.short_attention
    wrong = lambda module, *given, scaling=None, **more: right(module, *given, scaling=2 * scaling, **more)  # noqa: E731
    monkeypatch.setitem(cpu.AttentionInterface._global_mapping, cpu.ATTENTION, wrong)
    assert {"attention against float32", "dtype against float32"} <= failed(run_checks(llama))
    assert llama.model.config._attn_implementation == cpu.ATTENTION


def test_a_layer_that_is_off_by_one_is_found(llama, monkeypatch):
    blocks = list(llama.blocks)
    monkeypatch.setattr(type(llama), "blocks", property(lambda self: blocks[1:] + blocks[:1]))
    assert {"stopping at the layer", "replay"} <= failed(run_checks(llama))


def test_an_embedding_scale_outside_the_module_is_found(gemma, monkeypatch):
    table = gemma.model.get_input_embeddings().weight
    monkeypatch.setattr(type(gemma), "embed", lambda self, ids: table[ids])
    assert "inputs_embeds" in failed(run_checks(gemma))


def test_a_head_that_is_not_the_models_is_found(llama):
    llama.head_weight = llama.head_weight.roll(1, dims=0)
    assert failed(run_checks(llama)) == {"head"}


def test_a_model_without_a_cache_and_a_parameter_that_is_not_frozen_are_found(llama, monkeypatch):
    llama.model.get_output_embeddings().weight.requires_grad_(True)
    monkeypatch.setattr(checks, "Decoder", lambda *_: 1 / 0)
    found = list(run_checks(llama))
    assert failed(found) == {"frozen", "cached decoding"}
    assert "division by zero" in next(str(f) for f in found if f.name == "cached decoding")


def test_samples_that_end_where_they_begin_are_found(llama):
    ended = dataclasses.replace(llama, eos_ids=tuple(range(len(llama.head_weight))))
    ended.model.get_output_embeddings().weight.data *= 100
    assert "own samples" in failed(run_checks(dataclasses.replace(ended, head_weight=100 * llama.head_weight)))


def test_a_tokenizer_that_ends_texts_is_found(llama, monkeypatch):
    monkeypatch.setattr(type(llama), "tokenize_text", lambda self, text: self.tokenizer(text).input_ids[1:])
    before = type(llama.tokenizer).__call__
    ends = lambda self, *a, **k: (found := before(self, *a, **k), found.input_ids.append(1))[0]  # noqa: E731
    plain = llama.tokenizer("a").input_ids
    monkeypatch.setattr(type(llama), "tokenize_text", lambda self, text: plain[1:])
    monkeypatch.setattr(type(llama.tokenizer), "__call__", ends)
    assert failed(run_checks(llama)) == {"start and end tokens"}


def test_a_value_that_is_no_number_is_none_in_json():
    assert json.dumps(Finding("a", "b", "c", False, float("nan"), 0.1).record(), allow_nan=False)


# Activations from elsewhere


def texts(backbone, n=9):
    rng = np.random.default_rng(0)
    return [rng.integers(3, len(backbone.head_weight), size=rng.integers(3, 12)).tolist() for _ in range(n)]


def by_embeds(backbone, rows, scale):
    found = []
    for row in rows:
        embeds = backbone.embed(torch.tensor([[backbone.start_id, *row]])) * scale
        with torch.no_grad():
            out = backbone.model(inputs_embeds=embeds, output_hidden_states=True)
        found.append(out.hidden_states[backbone.layer][0, -1].numpy())
    return np.stack(found)


def normed(backbone, h):
    with torch.no_grad():
        return backbone.model.model.norm(torch.from_numpy(h)).numpy()


PLANTED = {
    "wrong row": lambda b, rows, h: np.roll(h, 1, axis=0),
    "off by one": lambda b, rows, h: b.encode([row[:-1] for row in rows], start=True),
    "missing BOS": lambda b, rows, h: b.encode(rows, start=False),
    "BOS twice": lambda b, rows, h: b.encode([[b.start_id, *row] for row in rows], start=True),
    "scaled embedding": lambda b, rows, h: by_embeds(b, rows, b.d**0.5),
    "wrong layer": lambda b, rows, h: b.encode_layers(rows, True, (b.layer - 1,))[0],
    "final norm applied": lambda b, rows, h: normed(b, h),
    "norm 1": lambda b, rows, h: h / np.linalg.norm(h, axis=1, keepdims=True),
    "other dtype": lambda b, rows, h: torch.from_numpy(h).bfloat16().float().numpy(),
    "unknown": lambda b, rows, h: np.random.default_rng(1).standard_normal(h.shape),
}


def test_every_fault_is_planted():
    assert set(PLANTED) == set(FAULTS)


@pytest.mark.parametrize("fault", PLANTED)
@pytest.mark.parametrize("model", ["llama", "gemma"])
def test_a_fault_of_another_engine_is_named(fault, model, request):
    backbone = request.getfixturevalue(model)
    rows = texts(backbone)
    right = backbone.encode(rows, start=True)
    found = check_activations(rows, PLANTED[fault](backbone, rows, right), backbone)
    assert failed(found) - {"agreement"} == {fault}
    assert found[0].name == "agreement" and found[0].passed is (fault == "other dtype")


def test_an_unscaled_embedding_is_named(gemma):
    rows = texts(gemma)
    found = check_activations(rows, by_embeds(gemma, rows, gemma.d**-0.5), gemma)
    assert found[1].name == "scaled embedding" and "divided by √d" in found[1].measured


@pytest.mark.parametrize("behind", [True, False])
def test_right_activations_have_no_fault(gemma, behind):
    rows = texts(gemma)
    h = gemma.encode(rows, start=True)
    (found,) = check_activations([[gemma.start_id, *row] for row in rows] if behind else rows, h, gemma)
    assert found.passed and found.value == 1 and "9 of 9" in found.measured
    (alone,) = check_activations(rows[:1], h[:1], gemma)
    assert alone.passed


def test_one_row_of_another_layer_among_right_ones_is_named_with_its_number(llama):
    rows = texts(llama)
    h = llama.encode(rows, start=True)
    h[4] = llama.encode_layers(rows[4:5], True, (1,))[0]
    h[7] = np.nan
    agreement, layer, unknown = check_activations(rows, h, llama)
    assert "7 of 9" in agreement.measured and not agreement.passed
    assert layer.name == "wrong layer" and "row 4 (that of 1)" in layer.measured
    assert unknown.name == "unknown" and "row 7" in unknown.measured


def test_another_layer_is_checked_where_it_is_asked_for(llama):
    rows = texts(llama)
    h = llama.encode_layers(rows, True, (1,))[0]
    assert not failed(check_activations(rows, h, llama, layer=1)) and failed(check_activations(rows, h, llama))


def test_shapes_and_ids_that_do_not_fit_are_refused(llama):
    rows = texts(llama)
    for ids, shape in ((rows, (9, 31)), (rows, (8, 32)), ([], (0, 32))):
        with pytest.raises(ConfigError, match=r"must be \(N, d\)"):
            check_activations(ids, np.zeros(shape), llama)
    with pytest.raises(ConfigError, match="choose 1 to 3"):
        check_activations(rows, np.zeros((9, 32)), llama, layer=4)
    with pytest.raises(BackboneError, match="no embedding"):
        check_activations([[5, 10_000]], np.zeros((1, 32)), llama)


@pytest.mark.parametrize("share, faults", [(0.4, set()), (1.0, {"BOS twice"})])
def test_a_reading_that_rounding_cannot_tell_from_the_right_one_is_no_fault(share, faults, llama, monkeypatch):
    rows = texts(llama)
    h = llama.encode(rows, start=True)
    noise = 1e-3 * np.random.default_rng(1).standard_normal(h.shape).astype(np.float32)
    read = {tuple(row): x for row, x in zip(rows, h + share * noise)}
    monkeypatch.setattr(activations, "_other_readings", lambda _, row: {"BOS twice": read[tuple(row[1:])]})
    found = check_activations(rows, h + noise, llama)
    assert failed(found) - {"agreement"} == faults and found[0].passed is not bool(faults)


# Files and the command


def written(path, rows, held, **changes):
    width = max(map(len, rows))
    ids = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    save_file({"ids": ids, "h": torch.from_numpy(held)} | changes, path)
    return str(path)


def test_a_file_is_read_with_lengths_or_with_ids_below_zero(tmp_path):
    h = np.ones((2, 3), dtype=np.float32)
    path = written(tmp_path / "a.safetensors", [[5, 6, 7], [8]], h)
    assert read_activations(path)[0] == [[5, 6, 7], [8]]
    path = written(tmp_path / "b.safetensors", [[5, 6, 7], [8, 0, 0]], h, lengths=torch.tensor([2, 1]))
    assert read_activations(path)[0] == [[5, 6], [8]]
    path = written(tmp_path / "c.safetensors", [[5], [8]], h, h=torch.ones(2, 3, dtype=torch.bfloat16))
    assert read_activations(path)[1].dtype == np.float32


@pytest.mark.parametrize("changes", [{"h": torch.ones(3, 3)}, {"h": torch.ones(2)}, {"ids": torch.ones(2, 3)}])
def test_a_file_that_holds_something_else_is_refused(tmp_path, changes):
    path = written(tmp_path / "a.safetensors", [[5], [8]], np.ones((2, 3), dtype=np.float32), **changes)
    with pytest.raises(ArtefactError, match="needs ids"):
        read_activations(path)


def test_the_command_says_what_it_found_and_ends_with_its_status(tiny_folders, tmp_path, gemma):
    command = ["check", str(tiny_folders["tiny-gemma2"]), "--dtype", "float32", "--device", "cpu"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and done.stdout.count("  pass") == 13 and "nothing failed" in done.stdout
    rows = texts(gemma)
    path = written(tmp_path / "h.safetensors", rows, gemma.encode(rows, start=False))
    given = [*command, "--activations", path]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 1 and "FAIL  missing BOS" in done.stdout
    done = CliRunner().invoke(app, [*given, "--json"])
    said = json.loads(done.stdout)
    assert done.exit_code == 1 and not said["passed"] and said["findings"][1]["name"] == "missing BOS"
    assert said["layer"] == 3 and said["dtype"] == "float32"
    done = CliRunner().invoke(app, [*command, "--activations", str(tmp_path / "none.safetensors")])
    assert done.exit_code == 2 and "error:" in done.stderr and "Traceback" not in done.output
