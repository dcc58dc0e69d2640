"""What a CPU needs to be fast: attention for short sequences, and bfloat16 products without instructions for them.

The library's fused attention is made for long sequences. At 64 tokens with grouped heads it costs several times what
the two matrix products cost, both in decoding and in encoding, forward and backward.

A CPU without bfloat16 instructions takes several times as long for a bfloat16 product as for a float32 one, so such
products are taken in float32 and rounded once. The product of two bfloat16 numbers is exact in float32, and the
instructions sum in float32 as well, so the two ways differ in the order of those sums alone.
"""

from __future__ import annotations

import functools
import platform
from typing import Optional

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.pytorch_utils import Conv1D

ATTENTION = "short_sequences"
# Columns of a head taken at once: their part of the result is still in cache when it is rounded.
COLUMNS = 2048


@functools.cache
def has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; of one that is not x86 that is assumed."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which products of ``x`` are taken where it lies."""
    widened = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not has_bfloat16()
    return torch.float32 if widened else x.dtype


def widen_linear_maps(blocks: nn.Module) -> None:
    """Let every linear map inside compute in :func:`product_dtype`; inputs and results keep their dtype."""
    for module in blocks.modules():
        if isinstance(module, (nn.Linear, Conv1D)) and product_dtype(module.weight) != module.weight.dtype:
            module.to(product_dtype(module.weight))
            module.register_forward_pre_hook(_widen)
            # float32 where a check computes its block in float32.
            module.register_forward_hook(lambda linear, _args, out: out.to(linear.given))


def _widen(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
    linear.given = args[0].dtype
    return (args[0].to(linear.weight.dtype),)


def head_product(hidden_nd: Tensor, weight_Vd: Tensor, out_nV: Tensor) -> Tensor:
    """hidden · weightᵀ (n, V), taken in the weight's dtype and written to ``out_nV`` in its own."""
    if weight_Vd.device.type != "cpu" or weight_Vd.dtype != torch.float32:
        return torch.mm(hidden_nd, weight_Vd.T, out=out_nV)
    n, hidden_nd = len(hidden_nd), hidden_nd.float()
    part = hidden_nd.new_empty(n * COLUMNS)
    for some_Cd, out_nC in zip(weight_Vd.split(COLUMNS), out_nV.split(COLUMNS, dim=1)):
        out_nC.copy_(torch.mm(hidden_nd, some_Cd.T, out=part[: n * len(some_Cd)].view(n, -1)))
    return out_nV


def short_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSE: Tensor,
    attention_mask: Optional[Tensor],
    scaling: Optional[float] = None,
    softcap: Optional[float] = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention as two matrix products; the query heads that share a key-value head are rows of the same one.

    ``attention_mask`` is additive, (B, 1, T, S). Returns (B, T, H, value width) as the library expects.

    Scores and weights are float32. Rounded to bfloat16 before the softmax, as in the library's ``eager``, scores of
    Qwen2.5 double the median error of an activation against float32, and the check at load fails.
    """
    B, H, T, D = query_BHTD.shape
    G, S = key_BGSD.shape[1:3]
    given = query_BHTD.dtype
    query_BHTD, key_BGSD, value_BGSE = (x.float() for x in (query_BHTD, key_BGSD, value_BGSE))
    rows_BGRD = query_BHTD.reshape(B, G, (H // G) * T, D)
    scores_BGRS = (rows_BGRD @ key_BGSD.transpose(2, 3)) * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_BGRS = softcap * torch.tanh(scores_BGRS / softcap)
    if attention_mask is not None:
        scores_BGRS = (scores_BGRS.view(B, G, -1, T, S) + attention_mask[:, :, None, :, :S]).view(B, G, -1, S)
    out_BHTE = (torch.softmax(scores_BGRS, dim=-1) @ value_BGSE).to(given).view(B, H, T, -1)
    return out_BHTE.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, short_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)
