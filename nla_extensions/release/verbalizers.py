"""Verbalizers: what writes texts for activations. A further one is one class here, and one entry of ``VERBALIZERS``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from nla_extensions.release.bundle import Bundle
from nla_extensions.tail_reader.reader import read_tails
from nla_utils.encoding import Texts
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
    """What the backbone writes after an identity prompt with v at its own layer: ``n_tokens`` for each row."""
    before, place, after = (backbone.tokenize_text(text) for text in (IDENTITY_PROMPT, PLACE, ASK))
    ids = [backbone.start_id, *before, *place, *after]
    embeds_BPd = backbone.embed(torch.tensor([ids])).expand(len(v_Bd), -1, -1)
    with replaced(backbone.blocks[backbone.layer - 1], v_Bd, len(before) + len(place)):
        found = sample(backbone, embeds_BPd, SamplingSettings(max_new_tokens=n_tokens), streams_B, greedy_B=greedy_B)
    return [found.sequence(i) for i in range(len(v_Bd))]


@dataclass(frozen=True)
class Verbalizer:
    """Writes texts for activations of a backbone, with what a bundle holds."""

    backbone: Backbone
    bundle: Bundle

    @property
    def cost(self) -> int:
        """Forward tokens of one text, written and read again behind BOS."""
        raise NotImplementedError

    def write(self, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> Texts:
        """1 + k texts for each of M activations in one batch, the likeliest first; each of the M (1 + k) texts has a
        random stream."""
        raise NotImplementedError


def _texts(v_Md: np.ndarray, ids: list[list[int]]) -> Texts:
    return Texts.of("rollout", range(len(v_Md)), ids)


class Reader(Verbalizer):
    """The tail reader, which writes without the model."""

    @property
    def cost(self) -> int:
        return self.bundle.reader.n + 1

    @torch.inference_mode()
    def write(self, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> Texts:
        v_Bd = torch.from_numpy(v_Md).to(self.backbone.device)
        return _texts(v_Md, read_tails(self.bundle.reader, v_Bd, k, streams_B)[0].flatten(0, 1).tolist())


class PaperAV(Verbalizer):
    """The paper's activation verbalizer."""

    @property
    def cost(self) -> int:
        return 2 * self.bundle.av.config.max_new_tokens + 1

    @torch.inference_mode()
    def write(self, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> Texts:
        av = self.bundle.av
        return av.write(self.backbone, v_Md, k, av.sampling(av.config.max_new_tokens), streams_B)


class LogitLens(Verbalizer):
    """One token a text: the likeliest, and then it and the k − 1 next to it. Nothing is drawn."""

    cost = 2

    def write(self, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> Texts:
        tokens_MK = lens_tokens(self.backbone, torch.from_numpy(v_Md).to(self.backbone.device), k).tolist()
        return _texts(v_Md, [[i] for row in tokens_MK for i in (row[0], *row)])


class Patchscope(Verbalizer):
    """v in an identity prompt; texts are as long as the reader's."""

    @property
    def cost(self) -> int:
        prompt = 1 + sum(len(self.backbone.tokenize_text(part)) for part in (IDENTITY_PROMPT, PLACE, ASK))
        return prompt + 2 * self.bundle.reader.n + 1

    def write(self, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> Texts:
        v_Bd = torch.from_numpy(v_Md).to(self.backbone.device).repeat_interleave(k + 1, dim=0)
        greedy_B = torch.arange(len(v_Bd), device=self.backbone.device) % (k + 1) == 0
        return _texts(v_Md, patchscope(self.backbone, v_Bd, self.bundle.reader.n, streams_B, greedy_B))


VERBALIZERS: dict[str, type[Verbalizer]] = {
    "reader": Reader,
    "av": PaperAV,
    "lens": LogitLens,
    "patchscope": Patchscope,
}
