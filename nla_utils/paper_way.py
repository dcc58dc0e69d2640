"""The authors' own encodings, slips included (PROTOCOL.md §7), kept apart from the right ones.

Nothing here is used by the ``corrected`` protocol.
"""

from __future__ import annotations

import numpy as np
import torch

from nla_utils.backbone import Backbone, check_finite
from nla_utils.head_loss import head_logprobs
from nla_utils.verbalizer import ActivationVerbalizer

TEXT_BATCH = 16


def encode_texts(backbone: Backbone, texts: list[str]) -> np.ndarray:
    """h (N, d) float32 of texts as the ceilings script reads it: slips ``bos``, ``left_pad``, ``eos_text``."""
    return encode_padded(backbone, [backbone.tokenize_text(t) for t in texts])


@torch.inference_mode()
def encode_padded(backbone: Backbone, rows: list[list[int]]) -> np.ndarray:
    """h (N, d) float32 of token ids, read at index count − 1 (slip ``left_pad``).

    Padded on the tokenizer's own side, in batches of 16; on a left-padded row index count − 1 is not the
    last token. A row of no tokens is read at index −1.
    """
    h_Nd = np.empty((len(rows), backbone.d), dtype=np.float32)
    for first in range(0, len(rows), TEXT_BATCH):
        batch = rows[first : first + TEXT_BATCH]
        ids_BT, mask_BT = pad(batch, backbone.pad_id, backbone.padding_side)
        h_BTd = backbone.hidden_at_layer(
            input_ids=ids_BT.to(backbone.device), attention_mask=mask_BT.to(backbone.device)
        )
        index_B = mask_BT.sum(dim=1) - 1
        h_Nd[first : first + len(batch)] = h_BTd[torch.arange(len(batch)), index_B].float().cpu().numpy()
    check_finite(h_Nd, "texts encoded the paper's way")
    return h_Nd


def pad(rows: list[list[int]], pad_id: int, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask (B, T), padded on ``side``; T is at least 1."""
    width = max(1, max(len(r) for r in rows))
    ids_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        if not row:
            continue
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids_BT[i, at] = torch.tensor(row)
        mask_BT[i, at] = 1
    return ids_BT, mask_BT


@torch.inference_mode()
def rollout_logprobs(
    backbone: Backbone, av: ActivationVerbalizer, v_Bd: torch.Tensor, rollouts: list[list[int]]
) -> np.ndarray:
    """Mean token log-probability (B,) as the rerank script computes it: slips ``logp_embeds``, ``top_k``.

    Token embeddings are rows of the raw table, so Gemma's √d scale is missing, and the
    normaliser is the whole vocabulary's although the sampling was truncated to 50.
    """
    ids_BT, mask_BT = pad(rollouts, backbone.pad_id, "right")
    ids_BT, valid_BT = ids_BT.to(backbone.device), mask_BT.bool().to(backbone.device)
    prefix_BPd = av(v_Bd.to(backbone.device), backbone.dtype)
    table_Vd = backbone.model.get_input_embeddings().weight
    inputs_BSd = torch.cat([prefix_BPd, table_Vd[ids_BT]], dim=1)
    hidden_BSd = backbone.last_hidden(inputs_embeds=inputs_BSd)
    hidden_nd = hidden_BSd[:, prefix_BPd.shape[1] - 1 : -1][valid_BT]
    logp_BT = torch.zeros(ids_BT.shape, device=backbone.device)
    logp_BT[valid_BT] = head_logprobs(hidden_nd, backbone.head_weight, ids_BT[valid_BT], backbone.softcap)
    return (logp_BT.sum(1) / valid_BT.sum(1)).cpu().numpy()
