"""Encoding, load-time checks, and refusals."""

import naive
import numpy as np
import pytest
import torch
from conftest import build_backbone, build_tokenizer, tiny_config

from nla_utils.errors import BackboneError, ConfigError
from nla_utils.lm.backbone import check_finite
from nla_utils.lm.checks import check_backbone, check_frozen
from nla_utils.lm.loading import load_backbone
from nla_utils.run import open_run


def sequences(backbone, n=9, seed=0):
    rng = np.random.default_rng(seed)
    vocab = backbone.model.config.vocab_size
    return [rng.integers(3, vocab, size=rng.integers(1, 30)).tolist() for _ in range(n)]


@pytest.mark.parametrize("start", [True, False])
def test_encode_is_hidden_states_at_the_layer(tiny_run, start):
    backbone = tiny_run[0].backbone
    rows = sequences(backbone)
    ours = backbone.encode(rows, start=start)
    for row, h in zip(rows, ours):
        ids = [backbone.start_id, *row] if start else row
        np.testing.assert_allclose(h, naive.hidden(backbone.model, backbone.layer, ids), rtol=1e-4, atol=1e-4)


def test_encode_ignores_batch_and_order(tiny_run, monkeypatch):
    backbone = tiny_run[0].backbone
    rows = sequences(backbone, 12)
    whole = backbone.encode(rows, start=True)
    monkeypatch.setitem(__import__("nla_utils.lm.backbone", fromlist=["x"]).ENCODE_TOKENS, "cpu", 1)
    np.testing.assert_allclose(backbone.encode(rows[::-1], start=True)[::-1], whole, rtol=1e-4, atol=1e-4)


def test_encode_runs_no_block_beyond_the_layer(tiny_run):
    backbone = tiny_run[0].backbone
    ran = []
    hooks = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(backbone.blocks, 1)]
    backbone.encode([[5, 6]], start=True)
    for hook in hooks:
        hook.remove()
    assert max(ran) == backbone.layer < backbone.n_layers


def test_bf16_encode_is_close_to_float32(tiny_folders, tmp_path):
    folder = tiny_folders["tiny-llama"]
    exact = load_backbone(tiny_config(folder, tmp_path))
    rounded = load_backbone(tiny_config(folder, tmp_path, dtype="bfloat16"))
    rows = sequences(exact)
    a, b = exact.encode(rows, start=True), rounded.encode(rows, start=True)
    assert b.dtype == np.float32
    assert np.linalg.norm(a - b) / np.linalg.norm(a) < 0.05


def test_encode_refuses_an_empty_sequence_without_start(tiny_run):
    with pytest.raises(BackboneError, match="no tokens"):
        tiny_run[0].backbone.encode([[]], start=False)


def test_load_checks_pass_and_nothing_is_trainable(tiny_run):
    check_backbone(tiny_run[0].backbone)
    assert not any(p.requires_grad for p in tiny_run[0].backbone.model.parameters())


def test_thawed_parameter_is_found(tiny_folders, tmp_path):
    backbone = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    next(backbone.model.parameters()).requires_grad_(True)
    with pytest.raises(BackboneError, match="not frozen"):
        check_frozen(backbone)


def test_layer_off_by_one_is_found(tiny_folders, tmp_path, monkeypatch):
    backbone = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    true_blocks = list(backbone.blocks)
    monkeypatch.setattr(type(backbone), "blocks", property(lambda self: true_blocks[1:] + true_blocks[:1]))
    with pytest.raises(BackboneError, match="hidden_states"):
        check_backbone(backbone)


def test_embedding_scale_outside_the_module_is_found(tiny_folders, tmp_path, monkeypatch):
    backbone = load_backbone(tiny_config(tiny_folders["tiny-gemma2"], tmp_path))
    table = backbone.model.get_input_embeddings().weight
    monkeypatch.setattr(type(backbone), "embed", lambda self, ids: table[ids])
    with pytest.raises(BackboneError, match="embedding scale"):
        check_backbone(backbone)


def test_the_identity_is_the_same_with_and_without_the_model(tiny_folders, tmp_path):
    config = tiny_config(tiny_folders["tiny-gemma2"], tmp_path)
    assert open_run(config, weights=False).folder == open_run(config).folder


@pytest.mark.parametrize("layer", [0, 4, -1, 99])
def test_layer_out_of_range(tiny_folders, tmp_path, layer):
    with pytest.raises(ConfigError, match="choose 1 to 3"):
        open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path, layer=layer), weights=False)


def test_default_layer_and_start_token_are_said_aloud(tiny_folders, tmp_path, capsys):
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    said = capsys.readouterr().out
    assert "round(0.73 · 4) = 3" in said and f"BOS, id {run.backbone.start_id}" in said
    assert run.backbone.layer == 3


def test_tokenizer_without_bos_is_refused(tmp_path):
    folder = build_backbone(tmp_path / "no-bos", "llama", "right", False, False)
    build_tokenizer("right", False, False, bos=False).save_pretrained(folder)
    with pytest.raises(ConfigError, match="no BOS token"):
        load_backbone(tiny_config(folder, tmp_path))


def test_nan_activations_are_refused(tiny_folders, tmp_path):
    backbone = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    with torch.no_grad():
        backbone.blocks[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(BackboneError, match="not finite"):
        backbone.encode([[5, 6, 7]], start=True)


def test_check_finite_names_the_row():
    h = np.zeros((4, 2), dtype=np.float32)
    h[2, 1] = np.inf
    with pytest.raises(BackboneError, match="row 2"):
        check_finite(h, "test")
