"""Whether activations that another engine gave are this model's; each fault that engines have been seen to make is
named."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.checks import Finding, Material
from nla_utils.lm.loading import pick_layer
from nla_utils.metrics import fve

# Distance from an activation over its distance from μ: what rounding explains in float32, and in 16 bits, where .12 is
# the largest seen against float32.
ROUNDED = {True: 0.01, False: 0.25}
# Rows from elsewhere whose fault is looked for, and rows that are looked at where all agree.
DIAGNOSED, AGREEING = 64, 16
# What is said of a row whose activation is nearest to another reading of its text.
FAULTS = {
    "wrong row": "the state of another row: give the engine one text at a time, or look for how it orders a batch",
    "off by one": "the state of the token before: read at the last token",
    "missing BOS": "the text was read without the start token",
    "BOS twice": "the text was read behind two start tokens: the tokenizer adds one too",
    "scaled embedding": "embeddings were multiplied by √d once too often, or once too seldom",
    "wrong layer": "hidden_states[0] is the embeddings, hidden_states[layer] the output of block number layer",
    "final norm applied": "read before the model's final norm",
    "norm 1": "every vector was divided by its norm",
    "other dtype": "computed or stored in another dtype: load the backbone with that --dtype",
    "unknown": "near no reading of its text: other weights (quantized, fine-tuned), or another tokenizer",
}


@torch.inference_mode()
def check_activations(
    ids: Sequence[Sequence[int]], h_Nd: np.ndarray, backbone: Backbone, layer: Optional[int] = None
) -> list[Finding]:
    """Whether activations h (N, d) that another engine gave at the last tokens of N texts are this model's.

    ``ids``: token ids of each, with or without the start token, which may be all that differs. The first finding says
    how many are; each further one names a fault. Raises ``ConfigError`` for a layer that is out of range or shapes that
    do not fit, ``BackboneError`` for an id without an embedding.
    """
    if layer is not None:
        backbone = dataclasses.replace(backbone, layer=pick_layer(layer, backbone.spec, backbone.n_layers))
    h_Nd = np.asarray(h_Nd, dtype=np.float32)
    if not len(ids) or h_Nd.shape != (len(ids), backbone.d):
        raise ConfigError(
            f"activations have shape {h_Nd.shape}; for {len(ids)} texts it must be (N, d) = ({len(ids)}, {backbone.d})"
        )
    rows = [[int(i) for i in row] for row in ids]
    if not all(row[:1] == [backbone.start_id] for row in rows):
        rows = [[backbone.start_id, *row] for row in rows]
    own_Nd = backbone.encode(rows, start=False)
    mu_d = own_Nd.mean(axis=0) if len(rows) > 1 else np.zeros(backbone.d, dtype=np.float32)
    spread_N = np.maximum(np.linalg.norm(own_Nd - mu_d, axis=1), 1e-12)
    rounded = ROUNDED[_stored_as(h_Nd) == backbone.dtype == torch.float32]
    # Of what is not finite nothing is near.
    h_Nd = np.where(np.isfinite(h_Nd), h_Nd, np.float32(1e15))
    agree_N = np.linalg.norm(h_Nd - own_Nd, axis=1) <= rounded * spread_N
    looked_at = np.flatnonzero(~agree_N)
    if not len(looked_at):
        looked_at = np.linspace(0, len(rows) - 1, min(AGREEING, len(rows))).astype(int)
    faults: dict[str, list[int]] = {}
    for i in looked_at[:DIAGNOSED]:
        read = {"": own_Nd[i]} | _other_readings(backbone, rows[i])
        nearest = int(np.linalg.norm(own_Nd - h_Nd[i], axis=1).argmin())
        read |= {f"wrong row: that of row {nearest}": own_Nd[nearest]} if nearest != i else {}
        distance, name = min((float(np.linalg.norm(h_Nd[i] - x)), name) for name, x in read.items())
        if distance > rounded * spread_N[i]:
            name = "unknown"
        elif agree_N[i] and distance > np.linalg.norm(h_Nd[i] - own_Nd[i]) / 2:
            # Not clearly nearer: where a reading hardly differs from the right one, rounding decides which is nearest.
            name = ""
        if name:
            faults.setdefault(name, []).append(i)
            agree_N[i] = False
    score = float(fve(h_Nd, own_Nd, mu_d if len(rows) > 1 else None).mean())
    said = f"{agree_N.sum()} of {len(agree_N)} rows are this model's; centred score {score:.4f}"
    share = float(agree_N.mean())
    found = [Finding("agreement", said, FAULTS["unknown"], share == 1, share, 1.0)]
    for fault in FAULTS:
        named = {name: at for name, at in faults.items() if name.partition(":")[0] == fault}
        if named:
            at = sorted(i for some in named.values() for i in some)
            detail = Counter({name.partition(": ")[2]: len(some) for name, some in named.items()}).most_common(1)[0][0]
            said = f"{len(at)} of {min(len(looked_at), DIAGNOSED)} rows looked at, the first is row {at[0]}"
            found.append(Finding(fault, f"{said}{detail and f' ({detail})'}", FAULTS[fault], False, float(len(at))))
    if agree_N.any() and (stored := _stored_as(h_Nd[agree_N])) != backbone.dtype:
        said = f"numbers of {stored}, the backbone's are {backbone.dtype}".replace("torch.", "")
        found.append(Finding("other dtype", said, FAULTS["other dtype"], False))
    return found


def _stored_as(h_Nd: np.ndarray) -> torch.dtype:
    """The narrowest dtype that holds these numbers exactly."""
    h = torch.from_numpy(np.ascontiguousarray(h_Nd))
    return next((x for x in (torch.bfloat16, torch.float16) if torch.equal(h.to(x).float(), h)), torch.float32)


def _other_readings(backbone: Backbone, row: list[int]) -> dict[str, np.ndarray]:
    """Activations (d,) of a text, read as engines have been seen to read it wrongly, by the name of the fault."""
    one, base = Material(backbone, [row]), backbone.model.base_model
    states = base(one.tensor(row), output_hidden_states=True, use_cache=False).hidden_states
    # The last module of the width's shape beside the blocks; where a model has none, the fault is not looked for.
    norms = [m for m in base.children() if getattr(getattr(m, "weight", None), "shape", None) == (backbone.d,)]
    read = {
        "scaled embedding: multiplied by √d": one.by_embeds(backbone.d**0.5)[0],
        "scaled embedding: divided by √d": one.by_embeds(backbone.d**-0.5)[0],
        "norm 1": states[backbone.layer][0, -1] / states[backbone.layer][0, -1].norm(),
        **{f"wrong layer: that of {k}": x[0, -1] for k, x in enumerate(states) if k != backbone.layer},
    }
    read |= {"final norm applied": norms[-1](states[backbone.layer][0, -1])} if norms else {}
    if len(row) > 1:
        read["off by one"] = states[backbone.layer][0, -2]
        read["missing BOS"] = torch.from_numpy(backbone.encode([row[1:]], start=False)[0])
    read["BOS twice"] = torch.from_numpy(backbone.encode([[backbone.start_id, *row]], start=False)[0])
    return {name: x.float().cpu().numpy() for name, x in read.items()}


def read_activations(path: Path) -> tuple[list[list[int]], np.ndarray]:
    """Texts and activations of a safetensors file: ``ids`` (N, T), ``lengths`` (N,) where rows are padded on the right
    (else ids below 0 are padding), ``h`` (N, d). Raises ``ArtefactError`` for anything else."""
    try:
        held = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtefactError(f"{path} was not read ({error}); give a .safetensors file with ids and h") from None
    ids, h = held.get("ids"), held.get("h", held.get("v"))
    if ids is None or h is None or ids.ndim != 2 or ids.is_floating_point() or h.ndim != 2 or len(ids) != len(h):
        shapes = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in sorted(held.items()))
        raise ArtefactError(f"{path} holds {shapes}; it needs ids (N, T) of whole numbers and h (N, d)")
    lengths = held.get("lengths", (ids >= 0).sum(dim=1))
    return [row[: int(n)].tolist() for row, n in zip(ids, lengths)], h.float().numpy()
