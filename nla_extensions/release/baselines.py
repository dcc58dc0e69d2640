"""Two ways of reading a state that are known without an AV, as texts to score beside it: logit lens and Patchscope."""

from __future__ import annotations

import contextlib
from typing import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import SamplingSettings, sample

# Ghandeharioun et al. 2024: a prompt that repeats whatever stands last, and the token that v takes the place of.
IDENTITY_PROMPT, PLACE, ASK = "cat->cat; 135->135; hello->hello; ", "?", "->"


@contextlib.contextmanager
def replaced(block: nn.Module, v_Bd: Tensor, position: int) -> Iterator[None]:
    """The block's output at one position is v while a prompt longer than that is read, in every row of the batch."""

    def put(_module, _given, output):
        h_BTd = output[0] if isinstance(output, tuple) else output
        if h_BTd.shape[1] <= position:
            return output  # a later step of decoding, one token a time
        h_BTd = h_BTd.clone()
        h_BTd[:, position] = v_Bd.to(h_BTd)
        return (h_BTd, *output[1:]) if isinstance(output, tuple) else h_BTd

    handle = block.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def lens_tokens(backbone: Backbone, v_Bd: Tensor, k: int) -> Tensor:
    """The k likeliest next tokens (B, k), best first, if v were what the last block leaves: the logit lens."""
    start_B1 = torch.full((len(v_Bd), 1), backbone.start_id, device=backbone.device)
    with replaced(backbone.blocks[-1], v_Bd, 0):
        hidden_Bd = backbone.last_hidden(input_ids=start_B1)[:, -1]
    return backbone.logits(hidden_Bd).topk(k).indices


@torch.inference_mode()
def patchscope(
    backbone: Backbone, v_Bd: Tensor, n_tokens: int, streams_B: np.ndarray, greedy_B: Tensor
) -> list[list[int]]:
    """What the backbone writes after an identity prompt in which v stands at its own layer, ``n_tokens`` for each row."""
    before, place, after = (backbone.tokenize_text(text) for text in (IDENTITY_PROMPT, PLACE, ASK))
    ids = [backbone.start_id, *before, *place, *after]
    embeds_BPd = backbone.embed(torch.tensor([ids])).expand(len(v_Bd), -1, -1)
    with replaced(backbone.blocks[backbone.layer - 1], v_Bd, len(before) + len(place)):
        found = sample(backbone, embeds_BPd, SamplingSettings(max_new_tokens=n_tokens), streams_B, greedy_B=greedy_B)
    return [found.sequence(i) for i in range(len(v_Bd))]
