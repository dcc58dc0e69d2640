"""Models that a user may bring: what is told of them, and which are refused, by name."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import SHAPE, build_tokenizer, save_tiny, tiny_config
from transformers import Gemma3Config, LlamaConfig, OPTConfig

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
    from transformers import AutoTokenizer, Gemma4ForConditionalGeneration
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
