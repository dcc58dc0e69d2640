"""Re-encoding under a protocol: the one place that says how a text becomes an activation again (PROTOCOL.md §5, §7)."""

from __future__ import annotations

from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.lm.backbone import Backbone, check_finite
from nla_utils.lm.sampling import pad
from nla_utils.protocol import Protocol

TEXT_BATCH = 16
# Texts whose own likelihood is taken together.
LIKELIHOOD_BATCH = 256


def re_encode(backbone: Backbone, sequences: Sequence[Sequence[int]], protocol: Protocol) -> np.ndarray:
    """Activations h (N, d) float32 of N sampled id sequences, start token aside, as the protocol re-encodes them.

    ``eos_kept``: the ids themselves; else their decoded text, tokenized again, which has lost its special tokens.
    ``bos``: behind the start token. ``last_index``: read at the last token, or where the authors look for it.
    A sequence of no ids is a text that is not known (of a released target): its activation is NaN.
    """
    known = [i for i, s in enumerate(sequences) if len(s)]
    if len(known) < len(sequences):
        h_Nd = np.full((len(sequences), backbone.d), np.nan, dtype=np.float32)
        if known:
            h_Nd[known] = re_encode(backbone, [sequences[i] for i in known], protocol)
        return h_Nd
    ids = [list(s) for s in sequences]
    if "eos_text" in protocol.slips:
        ids = [backbone.tokenize_text(backbone.decode_text(s)) for s in ids]
    if "left_pad" not in protocol.slips:
        # A text can be empty (a lone EOS was sampled); the start token alone stands for it.
        return backbone.encode([row or [backbone.start_id] for row in ids], start="bos" not in protocol.slips)
    head = [backbone.start_id] if "bos" not in protocol.slips else []
    return encode_padded(backbone, [head + row for row in ids])


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
    check_finite(h_Nd, "texts encoded as the authors do")
    return h_Nd


def nats_per_token(backbone: Backbone, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Mean cross-entropy (N,) of a text's tokens behind the start token, no v in sight: its fluency; e to it is its
    perplexity; NaN for a text of no tokens. ``texts`` are ids, an EOS among them counted."""
    start_11d = backbone.embed(torch.tensor([[backbone.start_id]]))
    nats_N = np.full(len(texts), np.nan)
    # Of similar length together; a stable order, so that equal texts make equal batches.
    order = sorted((i for i in range(len(texts)) if len(texts[i])), key=lambda i: len(texts[i]))
    for first in range(0, len(order), LIKELIHOOD_BATCH):
        batch = order[first : first + LIKELIHOOD_BATCH]
        ids_BT, valid_BT = (
            x.to(backbone.device) for x in pad([list(texts[i]) for i in batch], backbone.pad_id, "right")
        )
        valid_BT = valid_BT.bool()
        logp_BT = text_logprobs(
            backbone, start_11d.expand(len(batch), -1, -1), ids_BT, backbone.embed(ids_BT), valid_BT
        )
        nats_N[batch] = (-logp_BT.sum(dim=1) / valid_BT.sum(dim=1)).cpu().numpy()
    return nats_N


def text_hidden(backbone: Backbone, prefix_BPd: Tensor, text_BTd: Tensor) -> Tensor:
    """Final hidden states (B, T, d) from which the tokens of texts behind a prefix are predicted."""
    hidden_BSd = backbone.last_hidden(inputs_embeds=torch.cat([prefix_BPd, text_BTd], dim=1))
    # The last prefix position predicts the first token.
    return hidden_BSd[:, prefix_BPd.shape[1] - 1 : -1]


@torch.inference_mode()
def text_logprobs(backbone: Backbone, prefix_BPd: Tensor, ids_BT: Tensor, text_BTd: Tensor, valid_BT: Tensor) -> Tensor:
    """log p of each valid token of texts behind a prefix (B, T), 0 elsewhere; ``text_BTd`` are their embeddings."""
    hidden_nd = text_hidden(backbone, prefix_BPd, text_BTd)[valid_BT]
    logp_BT = torch.zeros(ids_BT.shape, device=backbone.device)
    logp_BT[valid_BT] = backbone.logprobs(hidden_nd, ids_BT[valid_BT])
    return logp_BT
