"""Models that a user may bring: what is told of them, and which are refused, by name."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import SHAPE, build_tokenizer, save_tiny, tiny_config
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma3Config, GptOssConfig, LlamaConfig, OPTConfig

from nla_utils.errors import BackboneError, ConfigError, SourceError
from nla_utils.lm import loading
from nla_utils.lm.checks import check_backbone
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.weights import REGISTRY


def saved(folder, config, **tokenizer):
    return save_tiny(folder, config, build_tokenizer("right", False, True, **tokenizer))


def test_every_id_that_the_generation_configuration_calls_eos_ends_a_sequence(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["tiny-llama"], tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 50]}))
    assert load_backbone(tiny_config(folder, tmp_path)).eos_ids == (1, 50)


def test_a_multimodal_model_is_refused_by_name_before_weights_load(tmp_path):
    (tmp_path / "model").mkdir()
    Gemma3Config().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="is multimodal .Gemma3Config.*kind gemma3_text"):
        load_backbone(tiny_config(tmp_path / "model", tmp_path))


def test_the_text_part_of_gemma_4_is_loaded_as_it_is_in_the_whole(tmp_path, monkeypatch, capsys):
    """Its registry entry is unverified: whatever is wrong with a real one, no weight of the text part is left out."""
    from transformers import Gemma4ForConditionalGeneration
    from transformers.models.gemma4 import Gemma4Config, Gemma4TextConfig, Gemma4VisionConfig

    tokenizer, heads = (
        build_tokenizer("left", False, True),
        dict(num_attention_heads=4, num_key_value_heads=4, head_dim=8),
    )
    text = Gemma4TextConfig(
        **SHAPE,
        head_dim=8,
        global_head_dim=8,
        sliding_window=64,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        vocab_size=len(tokenizer),
        vocab_size_per_layer_input=len(tokenizer),
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    vision = Gemma4VisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, **heads)
    whole = Gemma4ForConditionalGeneration(
        Gemma4Config(text_config=text, vision_config=vision, audio_config=None)
    ).eval()
    for saved_part in (whole, tokenizer):
        saved_part.save_pretrained(tmp_path / "model")
    spec = dataclasses.replace(REGISTRY["gemma4-31b"], source=str(tmp_path / "model"), layer=2)
    monkeypatch.setattr(loading, "resolve", lambda _: spec)
    backbone = load_backbone(tiny_config(tmp_path / "model", tmp_path))
    assert "has not been run with this code" in capsys.readouterr().out and backbone.start_id == 2
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("It was a day", return_tensors="pt").input_ids
    with torch.inference_mode():
        theirs = whole(input_ids=ids, output_hidden_states=True).hidden_states[2][0, -1]
    ours = backbone.encode([ids[0, 1:].tolist()], start=True)[0]
    torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "text", ['{"model_type": "nosuch"}', "{}", '{"a": ', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(SourceError, match="config.json is no configuration of a model known here"):
        load_backbone(tiny_config(tmp_path / "model", tmp_path))


def test_embeddings_of_another_width_are_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    OPTConfig(hidden_size=32, word_embed_proj_dim=16).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="embeddings have width 16, its layers 32"):
        load_backbone(tiny_config(tmp_path / "model", tmp_path))


def test_an_id_without_an_embedding_is_refused_by_name(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    folder = saved(tmp_path / "model", lambda ids: LlamaConfig(**shape, **(ids | {"vocab_size": 300})))
    backbone = load_backbone(tiny_config(folder, tmp_path))
    with pytest.raises(BackboneError, match="token id 350 has no embedding, there are 300"):
        backbone.encode([[5, 350]], start=True)


def test_a_model_that_sees_one_token_a_step_is_refused(gemma_run, monkeypatch):
    backbone = gemma_run[0].backbone
    forward = type(backbone.model.base_model).forward

    def forgetful(self, *args, past_key_values=None, use_cache=None, **inputs):
        return forward(self, *args, use_cache=False, **inputs)

    monkeypatch.setattr(type(backbone.model.base_model), "forward", forgetful)
    with pytest.raises(BackboneError, match="key-value cache and one forward pass disagree"):
        check_backbone(backbone)


def test_a_model_without_such_a_cache_is_refused(gemma_run, monkeypatch):
    backbone = gemma_run[0].backbone
    forward = type(backbone.model.base_model).forward

    def picky(self, *args, past_key_values=None, **inputs):
        if past_key_values is not None:
            raise AttributeError("no conv_states")
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(backbone.model.base_model), "forward", picky)
    with pytest.raises(BackboneError, match="key-value cache fails .no conv_states"):
        check_backbone(backbone)


# Quantized and odd checkpoints


def changed(folder, where, name="config.json", **changes):
    """A copy of a model's folder with another configuration."""
    shutil.copytree(folder, where)
    path = where / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return where


@pytest.mark.parametrize(
    "said, name",
    [
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm_fp8"),
    ],
)
def test_quantized_weights_that_are_not_served_are_refused_before_they_load(tiny_folders, tmp_path, said, name):
    folder = changed(tiny_folders["tiny-llama"], tmp_path / "model", quantization_config=said)
    (folder / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigError, match=f"model is quantized with {name}, which is not served: give the checkpoint"):
        load_backbone(tiny_config(folder, tmp_path))


def test_fp8_weights_are_dequantized_and_that_is_said(tiny_folders, tmp_path, capsys):
    said = {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}
    said["modules_to_not_convert"] = ["lm_head"]
    folder = changed(tiny_folders["tiny-llama"], tmp_path / "model", quantization_config=said)
    wide = changed(tiny_folders["tiny-llama"], tmp_path / "wide")
    held = load_file(folder / "model.safetensors")
    for key in [key for key in held if "proj" in key]:
        rows, columns = held[key].shape
        blocks = held[key].reshape(-(-rows // 32), min(rows, 32), -(-columns // 32), min(columns, 32))
        scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
        small = (blocks / scale).to(torch.float8_e4m3fn)
        held[key], held[f"{key}_scale_inv"] = small.reshape(rows, columns), scale[:, 0, :, 0].contiguous()
        held[f"wide {key}"] = (small.float() * scale).reshape(rows, columns)
    save_file({k: x for k, x in held.items() if not k.startswith("wide ")}, folder / "model.safetensors")
    exact = {k: held.get(f"wide {k}", x) for k, x in held.items() if "wide" not in k and "scale_inv" not in k}
    save_file(exact, wide / "model.safetensors", {"format": "pt"})
    h = load_backbone(tiny_config(folder, tmp_path)).encode([[5, 6, 7]], start=True)
    assert "model: its fp8 weights are dequantized to float32" in capsys.readouterr().out
    expected = load_backbone(tiny_config(wide, tmp_path)).encode([[5, 6, 7]], start=True)
    assert abs(h - expected).max() < 1e-2 * abs(expected).max()


def test_mxfp4_weights_are_dequantized_and_that_is_said(tmp_path, capsys):
    experts = dict(head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    folder = saved(tmp_path / "model", lambda ids: GptOssConfig(**SHAPE, **ids, **experts))
    path = folder / "config.json"
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": said}))
    held, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for key in [key for key in held if key.endswith("experts.gate_up_proj") or key.endswith("experts.down_proj")]:
        n, columns, rows = held.pop(key).shape
        blocks = torch.randint(0, 256, (n, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        held[f"{key}_blocks"], held[f"{key}_scales"] = blocks, torch.full(blocks.shape[:3], 124, dtype=torch.uint8)
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    backbone = load_backbone(tiny_config(folder, tmp_path))
    assert "model: its mxfp4 weights are dequantized to float32" in capsys.readouterr().out
    assert len(backbone.blocks[0].mlp.experts.down_proj.unique()) <= 16


def test_a_pad_id_without_an_embedding_is_replaced_and_that_is_said(tiny_folders, tmp_path, capsys):
    vocabulary = json.loads((tiny_folders["tiny-llama"] / "config.json").read_text())["vocab_size"]
    folder = changed(tiny_folders["tiny-llama"], tmp_path / "model", pad_token_id=vocabulary)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    backbone = load_backbone(tiny_config(folder, tmp_path))
    said = f"its pad id {vocabulary} has no embedding, there are {vocabulary}; padding is id 1"
    assert said in capsys.readouterr().out and backbone.pad_id == 1
    rows = [[5, 6, 7], [8, 9]]
    whole = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path)).encode(rows, start=True)
    assert abs(backbone.encode(rows, start=True) - whole).max() < 1e-5


def test_a_start_token_without_an_embedding_is_refused(tmp_path):
    folder = saved(tmp_path / "model", lambda ids: LlamaConfig(**SHAPE, **ids))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"bos_token": "[NEW]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="start token .* has no embedding, there are"):
        load_backbone(tiny_config(folder, tmp_path))


@pytest.mark.parametrize(
    "held, said",
    [
        ({}, r"holds no tokenizer \(tokenizer.json.*copy that of the model there"),
        ({"tokenizer.model": "x"}, "holds tokenizer.model and no tokenizer.json.*pip install sentencepiece"),
        ({"tokenizer.json": "{}"}, "its tokenizer was not read"),
    ],
)
def test_a_checkpoint_without_a_tokenizer_that_can_be_read_is_refused(tiny_folders, tmp_path, held, said):
    (tmp_path / "model").mkdir()
    shutil.copy(tiny_folders["tiny-llama"] / "config.json", tmp_path / "model")
    for name, text in held.items():
        (tmp_path / "model" / name).write_text(text)
    with pytest.raises(SourceError, match=said) as error:
        load_backbone(tiny_config(tmp_path / "model", tmp_path))
    assert "\n" not in str(error.value)
