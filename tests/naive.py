"""An independent, slow reading of PROTOCOL.md: one sequence and one pair at a time, no shared code."""

from __future__ import annotations

import math
from itertools import combinations

import torch


def hidden(model, layer: int, ids: list[int], position: int = -1, mask: list[int] | None = None) -> list[float]:
    with torch.no_grad():
        out = model(
            torch.tensor([ids]),
            attention_mask=None if mask is None else torch.tensor([mask]),
            output_hidden_states=True,
        )
    return out.hidden_states[layer][0, position].float().tolist()


def cosine(a, b) -> float:
    dot = sum(x * y for x, y in zip(a, b))
    size = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / size if size else 0.0


def fve(h, v, mu=None) -> float:
    if mu is not None:
        h, v = [x - m for x, m in zip(h, mu)], [x - m for x, m in zip(v, mu)]
    return 0.5 * (1 + cosine(h, v))


def mean_vector(rows) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows)]


def expected_max(scores, k: int) -> float:
    subsets = list(combinations(scores, k))
    return sum(max(s) for s in subsets) / len(subsets)


def left_padded_count_minus_one(model, layer: int, batch: list[list[int]], pad_id: int) -> list[list[float]]:
    """h of each row of a left-padded batch, read at index count − 1."""
    width = max(len(r) for r in batch)
    rows = torch.tensor([[pad_id] * (width - len(r)) + r for r in batch])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in batch])
    with torch.no_grad():
        states = model(rows, attention_mask=mask, output_hidden_states=True).hidden_states[layer]
    return [states[i, len(r) - 1].float().tolist() for i, r in enumerate(batch)]


def token_logprobs(model, embeds, ids: list[int], top_k: int | None) -> list[float]:
    """log p of each id after the prompt ``embeds`` (1, P, d): whole vocabulary, or renormalised over the top k."""
    scale = model.get_input_embeddings()
    total = torch.cat([embeds, scale(torch.tensor([ids]))], dim=1)
    with torch.no_grad():
        logits = model(inputs_embeds=total).logits[0].float()
    found = []
    for t, token in enumerate(ids):
        row = logits[embeds.shape[1] - 1 + t]
        if top_k is not None:
            kept = row.topk(min(top_k, len(row))).values
            found.append(float(row[token] - torch.logsumexp(kept, 0)))
        else:
            found.append(float(torch.log_softmax(row, 0)[token]))
    return found
