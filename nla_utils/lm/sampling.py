"""KV-cached sampler from input embeddings; returns ids and the log-probabilities it sampled from.

Each row draws from its own random stream, so the rows beside it change nothing but the rounding of products.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Iterable, Optional

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from nla_utils.lm.backbone import Backbone
from nla_utils.store import Progress, derive_seed

# A batch drops its finished rows when so many of them are finished: fewer would not pay for copying the cache.
DROPPED_SHARE = 0.25


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


def row_streams(run_seed: int, stage: str, targets: Iterable[int], draws: int = 1) -> np.ndarray:
    """Keys (M · draws,) int64 of the random streams of M targets, the draws of each one after the other."""
    return np.array([derive_seed(run_seed, stage, target, draw) for target in targets for draw in range(draws)])


def uniforms(streams_B: np.ndarray, steps: int) -> Tensor:
    """The first numbers of each stream (B, steps) float32, uniform in (0, 1], on the CPU.

    The generator is counter-based (Philox) and its bits are the same on every machine and in every version of numpy.
    """
    raw_BT = np.stack([np.random.Philox(key=int(key)).random_raw(steps) for key in streams_B])
    return torch.from_numpy((((raw_BT >> np.uint64(40)) + np.uint64(1)) * 2.0**-24).astype(np.float32))


def choose(logp_Bk: Tensor, ids_Bk: Tensor, uniform_B: Tensor) -> Tensor:
    """The column (B, 1) that each row draws: the inverse of the cumulative distribution over candidates sorted by id.

    Sorted by probability, two candidates that are nearly equally likely would change places with the rounding.
    """
    ids_Bk, order_Bk = ids_Bk.sort(dim=-1)
    below_Bk = logp_Bk.exp().gather(1, order_Bk).cumsum(-1)
    # Never beyond the last: its sum is taken as one.
    place_B1 = (below_Bk < uniform_B[:, None] * below_Bk[:, -1:]).sum(-1, keepdim=True)
    return order_Bk.gather(1, place_B1)


def draw(
    logits_BV: Tensor, s: SamplingSettings, uniform_B: Optional[Tensor], greedy_B: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """One token per row and its log-probability, (B,) and (B,); the likeliest one where ``greedy_B``.

    ``uniform_B`` is each row's random number, ``None`` at temperature 0. Top-k comes before the softmax, so there is no
    sum over the whole vocabulary. Which of several equal logits is the k-th is the library's choice.
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
        choice_B1 = choose(logp_Bk, index_Bk, uniform_B)
        if greedy_B is not None:
            choice_B1[greedy_B] = 0
    return index_Bk.gather(1, choice_B1)[:, 0], logp_Bk.gather(1, choice_B1)[:, 0]


@torch.inference_mode()
def sample(
    backbone: Backbone,
    embeds_BPd: Tensor,
    settings: SamplingSettings,
    streams_B: Optional[np.ndarray],
    mask_BP: Optional[Tensor] = None,
    greedy_B: Optional[Tensor] = None,
) -> Samples:
    """Continue each row of input embeddings, e.g. BOS or ``[proj(v), prefix]``, until its first EOS (kept) or
    ``max_new_tokens``.

    ``streams_B`` has the key of each row's random stream (:func:`row_streams`), ``None`` at temperature 0. ``mask_BP``
    is 1 at real prompt positions, 0 at padding. Rows of ``greedy_B`` always take the likeliest token.
    """
    # Tokens are drawn where the logits are: only ids travel to the embeddings.
    device = backbone.head_weight.device
    n_rows, steps = len(embeds_BPd), settings.max_new_tokens
    uniform_BT = torch.zeros(n_rows, steps) if streams_B is None else uniforms(streams_B, steps)
    greedy_B = torch.zeros(n_rows, dtype=torch.bool) if greedy_B is None else greedy_B
    uniform_BT, greedy_B = uniform_BT.to(device), greedy_B.to(device)
    ids_BT = torch.full((n_rows, steps), backbone.pad_id, device=device)
    logprobs_BT = torch.zeros(n_rows, steps, device=device)
    lengths_B = torch.zeros(n_rows, dtype=torch.int32, device=device)
    eos = torch.tensor(backbone.eos_ids, device=device)
    # The R rows that are still in the batch.
    rows_R = torch.arange(n_rows, device=device)
    alive_R = torch.ones_like(rows_R, dtype=torch.bool)
    decoder = Decoder(backbone, embeds_BPd.shape[1] + steps, mask_BP)
    logits_BV = torch.empty(n_rows, len(backbone.head_weight), dtype=backbone.dtype, device=device)
    hidden_Rd = decoder.step(inputs_embeds=embeds_BPd.to(backbone.device))
    # A batch that takes minutes shows its own bar; the stage's moves once a batch.
    for t in Progress(range(steps), desc="decoding", unit="token", leave=False, delay=10):
        logits_RV = backbone.logits(hidden_Rd, logits_BV[: len(rows_R)])
        token_R, logp_R = draw(logits_RV, settings, uniform_BT[rows_R, t], greedy_B[rows_R])
        ids_BT[rows_R, t] = torch.where(alive_R, token_R, backbone.pad_id)
        logprobs_BT[rows_R, t] = torch.where(alive_R, logp_R, 0.0)
        lengths_B[rows_R] += alive_R
        alive_R &= ~torch.isin(token_R, eos)
        n_alive = int(alive_R.sum())
        if t + 1 == steps or n_alive == 0:
            break
        if n_alive <= (1 - DROPPED_SHARE) * len(rows_R):
            decoder.keep(alive_R)
            rows_R, alive_R = rows_R[alive_R], alive_R[alive_R]
        hidden_Rd = decoder.step(input_ids=ids_BT[rows_R, t : t + 1].to(backbone.device))
    return Samples(ids_BT.int().cpu().numpy(), lengths_B.cpu().numpy(), logprobs_BT.cpu().numpy())


class _PreallocatedLayer(DynamicLayer):
    """Keys and values of one block in a buffer of full length: growing them copies nothing."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.filled = length, 0

    def lazy_initialization(self, key_BGTD: Tensor, value_BGTD: Tensor) -> None:
        self.buffers = [x.new_empty(*x.shape[:2], self.length, x.shape[3]) for x in (key_BGTD, value_BGTD)]
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

    def batch_select_indices(self, kept_R: Tensor) -> None:
        self.buffers = [buffer[kept_R.to(buffer.device)] for buffer in self.buffers]
        self.keys, self.values = (b[:, :, : self.filled] for b in self.buffers)


class Decoder:
    """The backbone with its KV cache and, for padded prompts, mask and positions."""

    def __init__(self, backbone: Backbone, length: int, mask_BP: Optional[Tensor]):
        self.base = backbone.model.base_model
        self.cache = Cache(layers=[_PreallocatedLayer(length) for _ in range(backbone.n_layers)])
        self.mask_BT = None if mask_BP is None else mask_BP.to(backbone.device)

    def keep(self, kept_B: Tensor) -> None:
        """Go on with some of the rows alone."""
        kept_R = kept_B.nonzero()[:, 0]
        self.cache.batch_select_indices(kept_R)
        if self.mask_BT is not None:
            self.mask_BT = self.mask_BT[kept_R.to(self.mask_BT.device)]

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
