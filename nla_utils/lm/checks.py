"""Checks of a backbone at load, each named after a way in which such measurements went wrong."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import torch

from nla_utils.errors import BackboneError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import Decoder

# Largest relative difference that rounding alone explains, by dtype.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.06, torch.float16: 0.03}


def check_backbone(backbone: Backbone) -> None:
    """Run every check; raises ``BackboneError`` that names the one that failed."""
    check_library(importlib.metadata.version("transformers"))
    check_frozen(backbone)
    ids = probe_ids(backbone)
    _check_truncated(backbone, ids)
    _check_batching(backbone, ids)
    _check_left_padding(backbone, ids)
    _check_inputs_embeds(backbone, ids)
    _check_cache(backbone, ids)


def check_library(version: str) -> None:
    """Before transformers 5.5 Gemma scaled ``inputs_embeds`` by √d behind its embedding module, v among them."""
    if tuple(int(x) for x in version.split(".")[:2]) < (5, 5):
        raise BackboneError(f"transformers {version} is installed; verbalizers need 5.5 or newer (pip install -e .)")


def check_frozen(backbone: Backbone) -> None:
    """No backbone parameter may ask for, or hold, a gradient."""
    for name, p in backbone.model.named_parameters():
        if p.requires_grad or p.grad is not None:
            raise BackboneError(f"{backbone.name}: parameter {name} is not frozen")


def probe_ids(backbone: Backbone) -> list[list[int]]:
    """Two short sequences of unequal length, spread over the vocabulary."""
    step = max(backbone.model.config.vocab_size // 17, 1)
    ids = [(i * step + 5) % backbone.model.config.vocab_size for i in range(1, 10)]
    return [[backbone.start_id, *ids], [backbone.start_id, *ids[:4]]]


def differ(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖ / ‖b‖."""
    with np.errstate(all="ignore"):
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _require(backbone: Backbone, difference: float, what: str) -> None:
    limit = TOLERANCE[backbone.dtype]
    if not difference <= limit:
        raise BackboneError(
            f"{backbone.name}: {what}: relative difference {difference:.2g}, allowed {limit:.2g}; "
            f"this architecture ({type(backbone.model).__name__}) is not supported"
        )


@torch.inference_mode()
def _check_truncated(backbone: Backbone, ids: list[list[int]]) -> None:
    out = backbone.model(
        torch.tensor([ids[0]], device=backbone.device), output_hidden_states=True, use_cache=False
    )
    full = out.hidden_states[backbone.layer][0, -1].float().cpu().numpy()
    short = backbone.encode([ids[0]], start=False)[0]
    _require(backbone, differ(short, full), "stopping at the layer does not give hidden_states[layer]")
    hidden_1d = backbone.last_hidden(input_ids=torch.tensor([ids[0]], device=backbone.device))[:, -1]
    ours = backbone.logits(hidden_1d)[0].float().cpu().numpy()
    theirs = out.logits[0, -1].float().cpu().numpy()
    _require(backbone, differ(ours, theirs), "the head on the last hidden state does not give the logits")


def _check_batching(backbone: Backbone, ids: list[list[int]]) -> None:
    together = backbone.encode(ids, start=False)
    alone = np.concatenate([backbone.encode([s], start=False) for s in ids])
    _require(backbone, differ(together, alone), "a batch of two and two batches of one disagree")


@torch.inference_mode()
def _check_left_padding(backbone: Backbone, ids: list[list[int]]) -> None:
    gap = len(ids[0]) - len(ids[1])
    rows = torch.tensor([ids[0], [backbone.pad_id] * gap + ids[1]], device=backbone.device)
    mask = torch.ones_like(rows)
    mask[1, :gap] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    h_BTd = backbone.hidden_at_layer(input_ids=rows, attention_mask=mask, position_ids=positions)
    left = h_BTd[:, -1].float().cpu().numpy()
    _require(backbone, differ(left, backbone.encode(ids, start=False)), "left and right padding disagree")


@torch.inference_mode()
def _check_inputs_embeds(backbone: Backbone, ids: list[list[int]]) -> None:
    embeds = backbone.embed(torch.tensor([ids[0]]))
    h_BTd = backbone.hidden_at_layer(inputs_embeds=embeds)
    by_embeds = h_BTd[0, -1].float().cpu().numpy()
    by_ids = backbone.encode([ids[0]], start=False)[0]
    _require(
        backbone, differ(by_embeds, by_ids),
        "inputs_embeds and input_ids disagree (an embedding scale outside the module)",
    )


@torch.inference_mode()
def _check_cache(backbone: Backbone, ids: list[list[int]]) -> None:
    """Some hybrid and recurrent models keep a state of another kind, or see one token a step."""
    row, prompt = torch.tensor([ids[0]], device=backbone.device), 4
    decoder = Decoder(backbone, row.shape[1], None)
    try:
        hidden_1d = decoder.step(inputs_embeds=backbone.embed(row[:, :prompt]))
        for t in range(prompt, row.shape[1]):
            hidden_1d = decoder.step(input_ids=row[:, t : t + 1])
    # Each kind of model that has no key-value cache fails in a way of its own.
    except Exception as error:
        said = f"{backbone.name}: decoding with a key-value cache fails ({error})"
        raise BackboneError(f"{said}; {type(backbone.model).__name__} is not supported") from None
    stepped, at_once = (x.float().cpu().numpy() for x in (hidden_1d, backbone.last_hidden(input_ids=row)[:, -1]))
    _require(backbone, differ(stepped, at_once), "decoding with a key-value cache and one forward pass disagree")
