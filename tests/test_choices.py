"""Where our attention or head does not serve a model, the library's does, and that is said."""

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPE, build_tokenizer, save_tiny, tiny_config
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    GPTJConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
)

from nla_utils.encoding import text_logprobs
from nla_utils.lm import loading as choices
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.checks import float32_activations
from nla_utils.lm.cpu import ATTENTION
from nla_utils.lm.loading import choose_attention, load_backbone
from nla_utils.lm.sampling import SamplingSettings, row_streams, sample
from nla_utils.training import pair_loss
from nla_utils.verbalizer import ActivationVerbalizer

GPT = dict(n_embd=32, n_layer=4, n_head=4, n_positions=512, rotary_dim=4, initializer_range=0.3)
HEADS = {
    "granite": lambda ids: GraniteConfig(**SHAPE, **ids, logits_scaling=6.0),
    "cohere": lambda ids: CohereConfig(**SHAPE, **ids, logit_scale=0.0625),
    "cohere2": lambda ids: Cohere2Config(**SHAPE, **ids, logit_scale=0.3, head_dim=8),
    "gptj": lambda ids: GPTJConfig(**GPT, **ids),
    "codegen": lambda ids: CodeGenConfig(**GPT, n_ctx=512, **ids),
}
ATTENTIONS = {
    "gpt-oss": lambda ids: GptOssConfig(**SHAPE, **ids, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "bloom": lambda ids: BloomConfig(hidden_size=32, n_layer=4, n_head=4, initializer_range=0.3, **ids),
}
DEEPSEEK = dict(
    q_lora_rank=16,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=4,
    n_group=1,
    num_experts_per_tok=2,
    topk_group=1,
    first_k_dense_replace=2,
    moe_intermediate_size=32,
    n_shared_experts=1,
)


def tiny(folder, config, **changes) -> Backbone:
    saved = save_tiny(folder / "model", config, build_tokenizer("right", False, True))
    return load_backbone(tiny_config(saved, folder, **changes))


def with_bias(folder):
    """A tiny model of a kind whose head has a bias, which is not zero as in a fresh one."""
    path = folder / "model"
    model = AutoModelForCausalLM.from_pretrained(path)
    model.get_output_embeddings().bias.data.normal_(generator=torch.Generator().manual_seed(3))
    model.save_pretrained(path)


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_the_models_own_where_they_are_more_than_a_product(name, tmp_path, capsys):
    backbone = tiny(tmp_path, HEADS[name])
    if backbone.model.get_output_embeddings().bias is not None:
        with_bias(tmp_path)
        backbone = load_backbone(tiny_config(tmp_path / "model", tmp_path))
    assert backbone.own_head and "logits are made by the model's own code" in capsys.readouterr().out
    start, texts = backbone.embed(torch.full((3, 1), backbone.start_id)), [[5, 6, 7, 8], [9, 10]]
    drawn = sample(backbone, start, SamplingSettings(6), row_streams(0, "t", range(3)))
    expected = naive.token_logprobs(backbone.model, start[:1], drawn.sequence(0), top_k=50)
    np.testing.assert_allclose(drawn.logprobs[0, : drawn.lengths[0]], expected, atol=2e-3)
    ids = torch.tensor([texts[0]])
    logp = text_logprobs(backbone, start[:1], ids.tolist())
    np.testing.assert_allclose(
        logp[0], naive.token_logprobs(backbone.model, start[:1], texts[0], top_k=None), atol=1e-4
    )
    av, v = ActivationVerbalizer.fresh(backbone), torch.randn(1, backbone.d, generator=torch.Generator().manual_seed(1))
    loss = pair_loss(backbone, av, v, texts[:1])
    logits = backbone.model(inputs_embeds=torch.cat([av(v, backbone.dtype), backbone.embed(ids)], 1)).logits[0, 1:-1]
    reference = F.cross_entropy(logits, ids[0])
    assert loss.item() == pytest.approx(reference.item(), rel=1e-5)
    slopes = [torch.autograd.grad(x, av.proj.weight)[0] for x in (loss, reference)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-6)


def test_a_plain_head_is_ours(gemma_run):
    assert not gemma_run[0].backbone.own_head


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_that_ours_is_not_is_the_librarys_and_that_is_said(name, dtype, tmp_path, capsys):
    backbone = tiny(tmp_path, ATTENTIONS[name], dtype=dtype)
    used = backbone.model.config._attn_implementation
    assert used == backbone.library_attention != ATTENTION
    assert f"model: attention is the library's ({used}); " in capsys.readouterr().out
    found = sample(
        backbone,
        backbone.embed(torch.full((4, 1), backbone.start_id)),
        SamplingSettings(5),
        row_streams(0, "t", range(4)),
    )
    assert found.ids.shape == (4, 5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_another_width_than_keys(tmp_path, dtype):
    shape = SHAPE | {"num_key_value_heads": 4}
    backbone = tiny(tmp_path, lambda ids: DeepseekV3Config(**shape, **ids, **DEEPSEEK), dtype=dtype)
    assert backbone.model.config._attn_implementation == ATTENTION


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_activations_are_those_of_the_model_in_float32_and_no_weight_moves(tiny_folders, tmp_path, dtype):
    folder, ids = tiny_folders["tiny-gemma2"], [[2, 5, 6, 7], [2, 9]]
    exact = load_backbone(tiny_config(folder, tmp_path)).encode(ids, start=False)
    backbone = load_backbone(tiny_config(folder, tmp_path, dtype=dtype))
    # The saved weights are float32: those of bfloat16 are rounded, so a model of the rounded ones is the reference.
    before = {name: x.clone() for name, x in backbone.model.state_dict().items()}
    found = float32_activations(backbone, ids)
    for name, x in backbone.model.state_dict().items():
        assert x.dtype == before[name].dtype and torch.equal(x, before[name])
    if dtype == "float32":
        np.testing.assert_allclose(found, exact, rtol=1e-4, atol=1e-5)
    else:
        embed = backbone.embed
        wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
        for row, h in zip(ids, found):
            with torch.no_grad():
                out = wide(inputs_embeds=embed(torch.tensor([row])).float(), output_hidden_states=True)
            np.testing.assert_allclose(h, out.hidden_states[backbone.layer][0, -1], rtol=1e-4, atol=1e-4)


def test_a_block_that_fails_leaves_its_weights_as_they_were(tiny_folders, tmp_path, monkeypatch, capsys):
    backbone = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path, dtype="bfloat16"))
    backbone.blocks[1].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        float32_activations(backbone, [[2, 5]])
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}


def test_ours_is_taken_only_where_it_is_close_to_float32(tiny_folders, tmp_path, monkeypatch, capsys):
    backbone = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    assert backbone.model.config._attn_implementation == ATTENTION
    backbone.model.set_attn_implementation(backbone.library_attention)
    attention, calls = choices.differ, []
    # The library's difference is asked for first, then ours.
    monkeypatch.setattr(choices, "differ", lambda a, b: calls.append(attention(a, b)) or (0.0, 0.5)[len(calls) - 1])
    choose_attention(backbone)
    assert backbone.model.config._attn_implementation == backbone.library_attention
    assert "ours has a relative difference of 0.5 and the library's one of 0" in capsys.readouterr().out
    assert max(calls) < 1e-5


def test_llama_with_a_bias_in_the_head_is_served(tmp_path):
    backbone = tiny(tmp_path, lambda ids: LlamaConfig(**SHAPE, **ids))
    backbone.model.lm_head = torch.nn.Linear(32, backbone.model.config.vocab_size, bias=True).requires_grad_(False)
    choices.choose_head(backbone)
    assert backbone.own_head
