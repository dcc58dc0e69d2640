"""The short-sequence attention against the library's eager one and torch's fused kernel."""

import pytest
import torch
import torch.nn.functional as F

from nla_utils.lm.cpu import short_attention


def inputs(heads=4, groups=2, rows=5, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, heads, rows, 8), (3, groups, length, 8), (3, groups, length, 8)]
    return [torch.randn(*s, generator=generator, requires_grad=True) for s in shapes]


def causal(rows):
    return torch.full((1, 1, rows, rows), float("-inf")).triu(1).expand(3, 1, rows, rows)


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1), (9, 3)])
def test_causal_output_and_gradients_equal_the_fused_kernel(heads, groups):
    ours, theirs = inputs(heads, groups), inputs(heads, groups)
    out, _ = short_attention(None, *ours, causal(5), scaling=0.3)
    q, k, v = theirs
    repeat = heads // groups
    wide_k, wide_v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    expected = F.scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_one_new_position_sees_the_whole_cache():
    q, k, v = inputs(rows=1, length=7)
    out, _ = short_attention(None, q, k, v, None)
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_masked_positions_do_not_count():
    q, k, v = inputs()
    mask = causal(5).clone()
    mask[:, :, :, 0] = torch.finfo(torch.float32).min
    before = short_attention(None, q, k, v, mask)[0]
    with torch.no_grad():
        k[:, :, 0] += 5
        v[:, :, 0] += 5
    after = short_attention(None, q, k, v, mask)[0]
    torch.testing.assert_close(before[:, 1:], after[:, 1:])


def test_soft_cap():
    q, k, v = inputs(2, 2)
    out, _ = short_attention(None, q, k, v, None, scaling=3.0, softcap=1.5)
    scores = 1.5 * torch.tanh(q @ k.transpose(2, 3) * 3.0 / 1.5)
    torch.testing.assert_close(out, (torch.softmax(scores, -1) @ v).transpose(1, 2))


def test_values_may_be_of_another_width_than_keys():
    q, k, v = inputs()
    out, _ = short_attention(None, q, k, v[..., :5], causal(5), scaling=0.3)
    whole, _ = short_attention(None, q, k, v, causal(5), scaling=0.3)
    torch.testing.assert_close(out, whole[..., :5])


def test_scores_are_not_rounded_before_the_softmax():
    """Scores of a few hundred that are nearly alike, as Qwen2.5 has them: in bfloat16 their last bit is worth one."""
    q, k, v = (x.detach() for x in inputs(length=40))
    q, k, v = (x.bfloat16() for x in (10 + q, 10 + 0.3 * k, v))
    wide_k, wide_v = (x.double().repeat_interleave(2, 1) for x in (k, v))
    scores = q.double() @ wide_k.transpose(2, 3) * 0.3
    exact = (torch.softmax(scores, -1) @ wide_v).transpose(1, 2)
    assert scores.mean() > 200
    ours, _ = short_attention(None, q, k, v, None, scaling=0.3)
    rounded = (torch.softmax(scores.bfloat16().double(), -1) @ wide_v).transpose(1, 2)
    error = [(x.double() - exact).norm() / exact.norm() for x in (ours, rounded)]
    assert ours.dtype == torch.bfloat16 and error[0] < 2.0**-8 < error[1]
