"""The machine's own limit: time of the backbone's matrix products alone, at the shapes a stage has."""

from __future__ import annotations

import statistics

import torch
from clock import now
from torch import nn

from nla_utils.lm.backbone import CHUNK_ROWS, Backbone
from nla_utils.lm.cpu import head_product


@torch.inference_mode()
def linear_seconds(weight: torch.Tensor, rows: int, repeats: int = 5) -> float:
    """Median seconds of one product of (rows, in) with a weight (out, in), into memory that is there already."""
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    out, times = x.new_empty(rows, len(weight)), []
    head_product(x, weight, out)
    for _ in range(repeats):
        started = now(weight.device)
        head_product(x, weight, out)
        times.append(now(weight.device) - started)
    return statistics.median(times)


def blocks_seconds(backbone: Backbone, rows: int) -> float:
    """Seconds of the products of one block for ``rows`` tokens."""
    linears = [m.weight for m in backbone.blocks[0].modules() if isinstance(m, nn.Linear)]
    return sum(linear_seconds(w, rows) for w in linears)


def limits(backbone: Backbone, sample_rows: int, train_rows: int) -> dict[str, float]:
    """Tokens/s that the products alone would allow.

    Sampling with extraction: every block and the head once a token, and the first ℓ blocks again.
    Encoding to layer: the first ℓ blocks. Training step: every block and the head, twice (activations
    forward and their gradients backward; the weights are frozen and have none).
    """
    head = backbone.head_weight
    wide = 4096
    block_sample, block_wide = blocks_seconds(backbone, sample_rows), blocks_seconds(backbone, wide)
    head_sample = linear_seconds(head, sample_rows)
    extract = backbone.layer * block_wide / wide
    decode = (backbone.n_layers * block_sample + head_sample) / sample_rows
    block_train = blocks_seconds(backbone, train_rows)
    head_train = linear_seconds(head, CHUNK_ROWS) * train_rows / CHUNK_ROWS
    return {
        "sampling with extraction": 1 / (decode + extract),
        "encoding to layer": 1 / extract,
        "training step": train_rows / (2 * (backbone.n_layers * block_train + head_train)),
        "head_gflops": 2 * head.numel() * sample_rows / head_sample / 1e9,
    }
