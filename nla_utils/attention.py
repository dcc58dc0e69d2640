"""Attention for short sequences on a CPU.

The library's fused kernel is made for long sequences. At 64 tokens with grouped heads it costs several
times what the two matrix products cost, both in decoding and in encoding, forward and backward.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from nla_utils.products import product_dtype

NAME = "short_sequences"


def short_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    attention_mask: Optional[Tensor],
    scaling: Optional[float] = None,
    softcap: Optional[float] = None,
    **_,
) -> tuple[Tensor, None]:
    """Two plain products; the query heads that share a key-value head are rows of the same one.

    ``attention_mask`` is additive, (B, 1, T, S). Returns (B, T, H, D) as the library expects.
    """
    B, H, T, D = query_BHTD.shape
    G, S = key_BGSD.shape[1:3]
    given, wide = query_BHTD.dtype, product_dtype(query_BHTD)
    query_BHTD, key_BGSD, value_BGSD = (x.to(wide) for x in (query_BHTD, key_BGSD, value_BGSD))
    rows_BGRD = query_BHTD.reshape(B, G, (H // G) * T, D)
    scores_BGRS = (rows_BGRD @ key_BGSD.transpose(2, 3)).float() * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores_BGRS = softcap * torch.tanh(scores_BGRS / softcap)
    if attention_mask is not None:
        scores_BGRS = (scores_BGRS.view(B, G, -1, T, S) + attention_mask[:, :, None, :, :S]).view(B, G, -1, S)
    weights_BGRS = torch.softmax(scores_BGRS, dim=-1).to(given).to(wide)
    out_BHTD = (weights_BGRS @ value_BGSD).to(given).view(B, H, T, D)
    return out_BHTD.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, short_attention)
AttentionMaskInterface.register(NAME, eager_mask)
