"""bfloat16 products taken in float32: the same numbers as the native ones, whatever the CPU of the test."""

import platform

import numpy as np
import pytest
import torch
from conftest import build_tokenizer, save_tiny, tiny_config
from torch import nn
from transformers import GPT2Config
from transformers.pytorch_utils import Conv1D

from nla_utils.lm import cpu as products
from nla_utils.lm.backbone import head_cross_entropy, head_logprobs
from nla_utils.lm.checks import float32_activations
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.sampling import SamplingSettings, row_streams, sample
from nla_utils.training import pair_loss
from nla_utils.verbalizer import ActivationVerbalizer

# The most that one rounding to the 8 bits of bfloat16 moves a number by.
ROUNDING = 2.0**-8


@pytest.fixture(params=["tiny-gemma2", "tiny-gemma3", "tiny-llama", "tiny-qwen2"])
def both_ways(request, tiny_folders, tmp_path, monkeypatch):
    """The same bfloat16 backbone on a CPU that has such products, and on one that has not."""
    return load_both(tiny_folders[request.param], tmp_path, monkeypatch)


def load_both(folder, tmp_path, monkeypatch):
    config = tiny_config(folder, tmp_path, dtype="bfloat16")
    pair = []
    for native in (True, False):
        monkeypatch.setattr(products, "has_bfloat16", lambda native=native: native)
        pair.append(load_backbone(config))
    return pair


def differ(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_only_the_wide_one_is_widened(both_ways):
    native, wide = both_ways
    kinds = [{m.weight.dtype for m in b.blocks.modules() if isinstance(m, nn.Linear)} for b in both_ways]
    assert kinds == [{torch.bfloat16}, {torch.float32}]
    assert native.head_weight.dtype == torch.bfloat16 and wide.head_weight.dtype == torch.float32
    assert native.dtype == wide.dtype == torch.bfloat16 and native.identity() == wide.identity()
    # Gemma's embedding scale is rounded to the table's dtype: widening the table would change it.
    assert wide.model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_float32_activations_do_not_know_of_it(both_ways):
    native, wide = (float32_activations(b, [[2, 5, 6, 7], [2, 9]]) for b in both_ways)
    assert differ(wide, native) < 1e-5


def test_activations_and_samples_agree(both_ways):
    rows = [torch.randint(3, 200, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 5, 17, 30)]
    native, wide = (b.encode(rows, start=True) for b in both_ways)
    assert differ(wide, native) < 4 * ROUNDING
    first = [
        sample(
            b, b.embed(torch.full((64, 1), b.start_id)), SamplingSettings(1), row_streams(0, "t", range(64))
        ).logprobs
        for b in both_ways
    ]
    assert differ(*first[::-1]) < 0.1


def test_a_training_step_agrees(both_ways):
    grads, losses = [], []
    v = torch.randn(3, both_ways[0].d, generator=torch.Generator().manual_seed(1))
    for b in both_ways:
        av = ActivationVerbalizer.fresh(b)
        loss = pair_loss(b, av, v, [[5, 6, 7], [8, 9], [10, 11, 12, 13]])
        loss.backward()
        losses.append(loss.item())
        grads.append(av.proj.weight.grad.numpy())
        assert all(p.grad is None for p in b.model.parameters())
    assert losses[1] == pytest.approx(losses[0], rel=ROUNDING)
    assert differ(grads[1], grads[0]) < 16 * ROUNDING


def test_a_linear_map_is_rounded_once(monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    generator = torch.Generator().manual_seed(3)
    for linear in (nn.Linear(48, 20), Conv1D(20, 48)):
        x = torch.randn(7, 48, generator=generator).bfloat16()
        exact = linear.to(torch.bfloat16).double()(x.double())
        products.widen_linear_maps(linear.to(torch.bfloat16))
        out = linear(x)
        assert out.dtype == torch.bfloat16
        assert ((out.double() - exact).abs() <= exact.abs() * ROUNDING + 1e-6).all()


def test_a_head_of_any_width(monkeypatch):
    monkeypatch.setattr(products, "COLUMNS", 7)
    hidden, weight = torch.randn(5, 16).bfloat16(), torch.randn(40, 16).bfloat16().float()
    out = torch.empty(5, 40, dtype=torch.bfloat16)
    assert products.head_product(hidden, weight, out) is out
    torch.testing.assert_close(out, (hidden.float() @ weight.T).bfloat16())
    loss = head_cross_entropy(hidden.requires_grad_(), weight, torch.arange(5), cap=3.0)
    loss.backward()
    z = 3.0 * torch.tanh(hidden.detach().float().requires_grad_() @ weight.T / 3.0)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(z, torch.arange(5)))
    logp = head_logprobs(hidden.detach(), weight, torch.arange(5), cap=3.0)
    torch.testing.assert_close(-logp.mean(), loss.detach())
    assert hidden.grad.dtype == torch.bfloat16


def test_gpt2s_maps_are_widened_too(tmp_path, monkeypatch, tiny_folders):
    shape = dict(n_embd=32, n_layer=4, n_head=4, n_positions=128, initializer_range=0.3)
    folder = save_tiny(tmp_path / "gpt2", lambda ids: GPT2Config(**shape, **ids), build_tokenizer("right", False, True))
    native, wide = load_both(folder, tmp_path, monkeypatch)
    assert wide.blocks[0].attn.c_attn.weight.dtype == torch.float32
    assert differ(wide.encode([[5, 6, 7]], start=True), native.encode([[5, 6, 7]], start=True)) < 4 * ROUNDING


def test_float32_is_left_alone(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    backbone = load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    assert not any(m._forward_hooks for m in backbone.blocks.modules() if isinstance(m, nn.Linear))
    assert backbone.head_weight is backbone.model.get_output_embeddings().weight


def test_only_x86_is_asked(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    products.has_bfloat16.cache_clear()
    assert products.has_bfloat16()
    monkeypatch.undo()
    products.has_bfloat16.cache_clear()
    assert isinstance(products.has_bfloat16(), bool)
