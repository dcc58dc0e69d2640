"""The chain on architectures beyond the registry's, on both file layouts, tied and untied heads, odd tokenizers."""

import numpy as np
import pytest
import torch
from conftest import SHAPE, build_tokenizer, save_tiny, tiny_config
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    xLSTMConfig,
)

from nla_extensions.tail_reader.reader import fit_reader, read_greedy
from nla_utils import rows
from nla_utils.baselines import make_ceilings
from nla_utils.errors import BackboneError, ConfigError
from nla_utils.evidence import of_ceilings
from nla_utils.lm.loading import load_backbone
from nla_utils.protocol import CORRECTED
from nla_utils.run import open_run
from nla_utils.scores import score
from nla_utils.targets import make_targets
from nla_utils.training import train_av
from nla_utils.verbalizer import make_rollouts

PLAIN = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"}
ARCHITECTURES = {
    "mistral": lambda ids: MistralConfig(**SHAPE, **ids, head_dim=8, sliding_window=64),
    "olmo": lambda ids: OlmoConfig(**PLAIN, **ids),
    "gpt2": lambda ids: GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=512, initializer_range=0.3, **ids),
    "gpt-neox": lambda ids: GPTNeoXConfig(**PLAIN, **ids, rotary_pct=0.5),
    "llama-tied": lambda ids: LlamaConfig(**SHAPE, **ids, tie_word_embeddings=True),
    "qwen2-untied": lambda ids: Qwen2Config(**SHAPE, **ids, tie_word_embeddings=False),
}
HYBRID = ["linear_attention", "full_attention"] * 2
RECURRENT = {
    "lfm2": lambda ids: Lfm2Config(**SHAPE, **ids, layer_types=["conv", "full_attention"] * 2),
    "qwen3-next": lambda ids: Qwen3NextConfig(
        **SHAPE,
        **ids,
        layer_types=HYBRID,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "xlstm": lambda ids: xLSTMConfig(hidden_size=32, num_heads=4, num_hidden_layers=4, **ids),
    "mamba": lambda ids: MambaConfig(hidden_size=32, num_hidden_layers=4, state_size=4, **ids),
    "recurrent-gemma": lambda ids: RecurrentGemmaConfig(**PLAIN, **ids, lru_width=32, attention_window_size=16),
}


@pytest.mark.parametrize("shard", ["5GB", "30KB"], ids=["one-file", "sharded"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_chain_runs(name, shard, tmp_path):
    folder = save_tiny(tmp_path / name, ARCHITECTURES[name], build_tokenizer("right", False, True), shard)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard == "30KB")
    config = tiny_config(folder, tmp_path, n_targets=40, n_eval=4, pool_size=24, n_rollouts=2)
    run = open_run(config)
    targets = make_targets(run)
    train_av(run, targets)
    reader = fit_reader(run, targets)
    assert read_greedy(reader, torch.from_numpy(targets.v[:2])).shape == (2, 8)
    ceilings = make_ceilings(run, targets)
    scored = score(of_ceilings(targets, ceilings, run.sizes.n_rollouts), CORRECTED, rows.OF_CEILINGS)
    assert scored.values[rows.REPLAY.cen] == pytest.approx(1.0, abs=1e-4)
    rollouts = make_rollouts(run, targets)
    assert np.isfinite(rollouts.h["corrected"]).all()


@pytest.mark.parametrize("name", RECURRENT)
def test_hybrid_and_recurrent_models_are_refused_at_load_by_name(name, tmp_path):
    """Their states are no key-value cache: cut short, padded or cached, they give other numbers, or none."""
    folder = save_tiny(tmp_path / name, RECURRENT[name], build_tokenizer("right", False, True))
    with pytest.raises(BackboneError, match=rf"^{name}: .*ForCausalLM\)? is not supported$"):
        load_backbone(tiny_config(folder, tmp_path))


def test_a_tokenizer_without_pad_is_padded_by_its_eos(tmp_path):
    tokenizer = build_tokenizer("right", False, True)
    tokenizer.pad_token = None
    run = open_run(tiny_config(save_tiny(tmp_path / "m", ARCHITECTURES["mistral"], tokenizer), tmp_path))
    assert run.backbone.pad_id == run.backbone.eos_ids[0]


def test_a_tokenizer_without_bos_is_refused_by_name(tmp_path):
    folder = save_tiny(tmp_path / "bare", ARCHITECTURES["mistral"], build_tokenizer("right", False, False, bos=False))
    with pytest.raises(ConfigError, match="bare: its tokenizer has no BOS token"):
        open_run(tiny_config(folder, tmp_path))
