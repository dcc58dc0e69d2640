"""Models that a user may bring: what is told of them, and which are refused, by name."""

import json
import shutil

import pytest
from conftest import build_tokenizer, save_tiny, tiny_config
from transformers import Gemma3Config, LlamaConfig, OPTConfig

from nla_utils.errors import BackboneError, ConfigError, SourceError
from nla_utils.lm.checks import check_backbone
from nla_utils.lm.loading import load_backbone


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


@pytest.mark.parametrize("text", ['{"model_type": "nosuch"}', "{}", '{"a": ', '{"model_type": "llama", "hidden_size": "x"}'])
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
