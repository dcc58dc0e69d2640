"""KV-cached sampler from input embeddings; returns ids and the log-probabilities it sampled from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from nla_utils.lm.backbone import Backbone
from nla_utils.lm.cpu import product_dtype
from nla_utils.progress import Progress


@dataclass(frozen=True)
class SamplingSettings:
    """How to draw. ``temperature`` 0 is greedy; ``top_k`` 50 is the default that the paper left in force."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0

    def record(self) -> dict:
        return asdict(self)


@dataclass
class Samples:
    """``ids`` (B, T) int32 right-padded, ``lengths`` (B,) int32 with the EOS counted, ``logprobs`` (B, T)
    float32 under the truncated distribution, 0 after the end."""

    ids: np.ndarray
    lengths: np.ndarray
    logprobs: np.ndarray

    def sequence(self, i: int) -> list[int]:
        return self.ids[i, : self.lengths[i]].tolist()

    @property
    def mean_logprob(self) -> np.ndarray:
        """Mean over valid tokens (B,)."""
        return (self.logprobs.sum(axis=1) / self.lengths).astype(np.float32)


def draw(
    logits_BV: Tensor, s: SamplingSettings, generator: torch.Generator, greedy_B: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, (B,) and (B,); the likeliest one where ``greedy_B``.

    Top-k comes before the softmax, so no normaliser over the whole vocabulary is ever needed.
    """
    k = min(s.top_k or logits_BV.shape[-1], logits_BV.shape[-1])
    top_Bk, index_Bk = logits_BV.topk(k)
    logp_Bk = torch.log_softmax(top_Bk.float() / (s.temperature or 1.0), dim=-1)
    if s.top_p < 1.0:
        before_Bk = logp_Bk.exp().cumsum(-1) - logp_Bk.exp()
        logp_Bk = torch.log_softmax(logp_Bk.masked_fill(before_Bk >= s.top_p, -torch.inf), dim=-1)
    if s.temperature == 0:
        choice_B1 = torch.zeros_like(index_Bk[:, :1])
    else:
        choice_B1 = torch.multinomial(logp_Bk.exp(), 1, generator=generator)
        if greedy_B is not None:
            choice_B1[greedy_B] = 0
    return index_Bk.gather(1, choice_B1)[:, 0], logp_Bk.gather(1, choice_B1)[:, 0]


@torch.inference_mode()
def sample(
    backbone: Backbone,
    embeds_BPd: Tensor,
    settings: SamplingSettings,
    seed: int,
    mask_BP: Optional[Tensor] = None,
    greedy_B: Optional[Tensor] = None,
) -> Samples:
    """Continue each row of input embeddings until its first EOS (kept) or ``max_new_tokens``.

    Args:
        embeds_BPd: prompts in the backbone's dtype, e.g. the BOS embedding or ``[proj(v), prefix]``.
        seed: of the generator for this batch alone.
        mask_BP: 1 for real prompt positions, 0 for padding; ``None`` if all are real.
        greedy_B: rows that always take the likeliest token, ``None`` for the settings' own way.
    """
    # Tokens are drawn where the logits are: only ids travel to the embeddings.
    device = backbone.head_weight.device
    generator = torch.Generator(device).manual_seed(seed)
    n_rows, steps = len(embeds_BPd), settings.max_new_tokens
    ids_BT = torch.full((n_rows, steps), backbone.pad_id, device=device)
    logprobs_BT = torch.zeros(n_rows, steps, device=device)
    lengths_B = torch.zeros(n_rows, dtype=torch.int32, device=device)
    alive_B = torch.ones(n_rows, dtype=torch.bool, device=device)
    eos = torch.tensor(backbone.eos_ids, device=device)
    greedy_B = None if greedy_B is None else greedy_B.to(device)
    decoder = Decoder(backbone, embeds_BPd.shape[1] + steps, mask_BP)
    logits_BV = torch.empty(n_rows, len(backbone.head_weight), dtype=backbone.dtype, device=device)
    hidden_Bd = decoder.step(inputs_embeds=embeds_BPd.to(backbone.device))
    # A batch that takes minutes shows its own bar; the stage's moves once a batch.
    for t in Progress(range(steps), desc="decoding", unit="token", leave=False, delay=10):
        token_B, logp_B = draw(backbone.logits(hidden_Bd, logits_BV), settings, generator, greedy_B)
        ids_BT[:, t] = torch.where(alive_B, token_B, backbone.pad_id)
        logprobs_BT[:, t] = torch.where(alive_B, logp_B, 0.0)
        lengths_B += alive_B
        alive_B &= ~torch.isin(token_B, eos)
        if t + 1 == steps or not alive_B.any():
            break
        hidden_Bd = decoder.step(input_ids=ids_BT[:, t : t + 1].to(backbone.device))
    return Samples(
        ids_BT.int().cpu().numpy(), lengths_B.cpu().numpy(), logprobs_BT.cpu().numpy()
    )


def pad(rows: list[list[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
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


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one block in a buffer of full length: growing them copies nothing."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.filled = length, 0

    def lazy_initialization(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        # In the dtype that attention multiplies in, so that a step need not convert all that came before it.
        self.buffers = [
            x.new_empty(*x.shape[:2], self.length, x.shape[3], dtype=product_dtype(x)) for x in (key_BGTD, value_BGTD)
        ]
        self.is_initialized = True

    def update(self, key_BGTD: Tensor, value_BGTD: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_BGTD, value_BGTD)
        end = self.filled + key_BGTD.shape[2]
        for buffer, new in zip(self.buffers, (key_BGTD, value_BGTD)):
            buffer[:, :, self.filled : end] = new
        self.filled = end
        self.keys, self.values = (b[:, :, :end] for b in self.buffers)
        return self.keys, self.values


class Decoder:
    """The backbone with its KV cache and, for padded prompts, mask and positions."""

    def __init__(self, backbone: Backbone, length: int, mask_BP: Optional[Tensor]):
        self.base = backbone.model.base_model
        self.cache = Cache(layers=[_PreallocatedLayer(length) for _ in range(backbone.n_layers)])
        self.mask_BT = None if mask_BP is None else mask_BP.to(backbone.device)

    def step(self, **inputs: Tensor) -> Tensor:
        """Run the new positions; returns the hidden state of the last one (B, d)."""
        if self.mask_BT is not None:
            new = next(iter(inputs.values())).shape[1]
            if self.cache.get_seq_length():
                self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.mask_BT), new)], 1)
            # Padding sits at position 1, as in the library's generate.
            positions_BT = (self.mask_BT.cumsum(-1) - 1).masked_fill(self.mask_BT == 0, 1)
            inputs |= {"attention_mask": self.mask_BT, "position_ids": positions_BT[:, -new:]}
        out = self.base(**inputs, past_key_values=self.cache, use_cache=True)
        return out.last_hidden_state[:, -1]

