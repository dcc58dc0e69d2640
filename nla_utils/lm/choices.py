"""Where a backbone is computed our way and where the library's: attention and head, each compared when it is loaded.

Our ways are faster on a CPU, and they do not know everything that a model may do (attention sinks, a bias in the head,
scaled logits). Where one does not serve a model, the library's own is used, and that is said.
"""

from __future__ import annotations

import contextlib
from typing import Iterator, Sequence

import numpy as np
import torch
from torch import nn

from nla_utils.lm.backbone import Backbone
from nla_utils.lm.checks import TOLERANCE, differ, probe_ids
from nla_utils.lm.cpu import ATTENTION

# What rounding to bfloat16 once can move a product by, and more than enough for other dtypes.
HEAD_TOLERANCE = 2.0**-7


def choose_attention(backbone: Backbone) -> None:
    """Take the attention for short sequences where its activations are as close to float32 as rounding allows, or as
    the library's are."""
    model, ids = backbone.model, probe_ids(backbone)
    library = model.config._attn_implementation
    why = _against_ours(backbone, ids)
    if why is not None:
        model.set_attn_implementation(library)
        print(f"{backbone.name}: attention is the library's ({library}); {why}")


def _against_ours(backbone: Backbone, ids: list[list[int]]) -> str | None:
    """Why our attention does not serve, ``None`` if it does; ours is left in use."""
    # Each architecture fails in a way of its own where it is given what it does not expect.
    try:
        exact = float32_activations(backbone, ids)
    except Exception as error:
        return f"its activations could not be computed in float32 to compare with ({error})"
    theirs = differ(backbone.encode(ids, start=False), exact)
    backbone.model.set_attn_implementation(ATTENTION)
    if backbone.model.config._attn_implementation != ATTENTION:
        return "this model does not let it be replaced"
    try:
        ours = differ(backbone.encode(ids, start=False), exact)
    except Exception as error:
        return f"ours fails ({error})"
    if ours <= max(TOLERANCE[backbone.dtype], theirs):
        return None
    return f"against float32, ours has a relative difference of {ours:.2g} and the library's one of {theirs:.2g}"


@torch.inference_mode()
def float32_activations(backbone: Backbone, ids: Sequence[list[int]]) -> np.ndarray:
    """Activations (N, d) at the last token of each row, computed in float32 from the same weights with the attention
    in use. One block at a time is widened, so a large model needs little memory more."""
    with _float32_blocks(backbone.blocks):
        embeds = (backbone.embed(torch.tensor([row])).float() for row in ids)
        return np.stack([backbone.hidden_at_layer(inputs_embeds=e)[0, -1].cpu().numpy() for e in embeds])


@contextlib.contextmanager
def _float32_blocks(blocks: nn.ModuleList) -> Iterator[None]:
    """Each block computes in float32; its weights are widened before it runs and are what they were after it."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def widen(block: nn.Module, *_) -> None:
        own = [x for x in (*block.parameters(), *block.buffers()) if x.is_floating_point()]
        given.extend((x, x.data) for x in own)
        for x in own:
            x.data = x.data.float()

    def restore(*_) -> None:
        while given:
            x, data = given.pop()
            x.data = data

    handles = [h for b in blocks for h in (b.register_forward_pre_hook(widen), b.register_forward_hook(restore))]
    try:
        yield
    finally:
        restore()
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def choose_head(backbone: Backbone) -> None:
    """Take the product with the head's weight where it gives the model's own logits."""
    ids_1T = torch.tensor(probe_ids(backbone)[:1], device=backbone.device)
    ours, theirs = backbone.logits(backbone.last_hidden(input_ids=ids_1T)[0]), backbone.model(ids_1T, use_cache=False).logits[0]
    difference = differ(ours.float().cpu().numpy(), theirs.float().cpu().numpy())
    has_bias = getattr(backbone.model.get_output_embeddings(), "bias", None) is not None
    backbone.own_head = has_bias or not difference <= HEAD_TOLERANCE
    if backbone.own_head:
        print(f"{backbone.name}: logits are made by the model's own code; they are more than one product with its head")
