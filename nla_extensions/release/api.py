"""Put an activation into words, in a few lines of Python.

nla = NLA.load("gemma3-270m")
v = nla.activation("The lighthouse keeper wound the clock and")
print(nla.verbalize(v, k=64).text)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla_extensions.release.bundle import Bundle, load_bundle
from nla_extensions.release.verbalizers import VERBALIZERS, Verbalizer
from nla_extensions.tail_reader.rollouts import FLUENCY, guided_search
from nla_utils.config import RunConfig
from nla_utils.encoding import nats_per_token, read
from nla_utils.errors import ConfigError, nearest
from nla_utils.lm.backbone import Backbone, outside_ids
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.sampling import row_streams
from nla_utils.metrics import chance_of_rank, fve, mean_direction, variance_explained
from nla_utils.protocol import CORRECTED

# The guided search starts from the reader's texts.
METHODS = (*VERBALIZERS, "guided")
# What the guided search may spend: the forward tokens of 64 AV rollouts of 64 tokens, written and read.
GUIDED_TOKENS = 64 * 129
# Characters of a text that are printed.
SHOWN = 90


@dataclass(frozen=True)
class Verbalization:
    """A text for an activation and how much it is worth.

    ``score``: ½(1 + ``cosine``) of the re-encoded text, ``cosine`` the centred cosine; the paper calls it fve_nrm.
    ``variance_explained``: what other work calls so, of activations at norm 1, against the pool's mean as the guess to
    beat. ``closer`` of ``stored`` texts score at least as much. ``p_value``: the chance of so few if the k texts were
    unrelated to v, too (:func:`~nla_utils.metrics.chance_of_rank`); ``None`` for ``guided``, whose search looks at v
    more often than k times. ``percentile``: the share of stored texts that score less to the power of k, an estimate of
    1 − p that is 1 where none is closer. ``nats``: what a token of the text costs the language model, behind BOS and
    without v. ``greedy``: the text chosen without looking at v again. ``retrieved``: the stored text nearest to v.
    """

    method: str
    k: int
    text: str
    score: float
    cosine: float
    variance_explained: float
    closer: int
    stored: int
    p_value: Optional[float]
    percentile: float
    nats: float
    greedy: str
    greedy_score: float
    retrieved: str
    retrieved_score: float
    retrieved_nats: float

    def __str__(self) -> str:
        chance = "no p-value: the search looked at v"
        if self.p_value is not None:
            least = "" if self.closer else ", the smallest that so many can give"
            chance = f"p = {self.p_value:.3f} for the best of {self.k}{least}"
        lines = (
            repr(_end_of(self.text)),
            f"  score      {self.score:.3f}  ½(1 + cosine), centred; the best of {self.k} by {self.method}",
            f"  cosine     {self.cosine:.3f}  variance explained {self.variance_explained:.2f}",
            f"  chance     {self.closer} of {self.stored} stored texts are as close; {chance}",
            f"  fluency    {self.nats:.1f} nats a token without v; the retrieved text has {self.retrieved_nats:.1f}",
            f"  greedy     {self.greedy_score:.3f}  {_end_of(self.greedy)!r}",
            f"  retrieved  {self.retrieved_score:.3f}  {_end_of(self.retrieved)!r}",
        )
        return "\n".join(lines)


def _end_of(text: str) -> str:
    """The end of a text, which is where v was taken."""
    return text if len(text) <= SHOWN else "…" + text[-SHOWN:]


class NLA:
    """A backbone with its verbalizers: the tail reader and the paper's AV."""

    def __init__(self, backbone: Backbone, bundle: Bundle):
        self.backbone, self.bundle = backbone, bundle

    @classmethod
    def load(cls, backbone: str = "gemma3-270m", run: Optional[str | Path] = None, device: str = "auto") -> NLA:
        """Verbalizers that ship with the package, or those of a finished run folder (``run``). Raises ``ConfigError``
        for an unknown backbone, ``ArtefactError`` where it has no verbalizers or they fit other weights or layers."""
        folder = None if run is None else Path(run)
        loaded = load_backbone(RunConfig(backbone=backbone, device=device, layer=Bundle.layer_of(backbone, folder)))
        return cls(loaded, load_bundle(loaded, folder))

    def without_last(self, n: int) -> NLA:
        """The same with the last n stored texts forgotten: for reading what was made from them."""
        bundle = replace(self.bundle, pool_v=self.bundle.pool_v[:-n], pool_texts=self.bundle.pool_texts[:-n])
        return NLA(self.backbone, bundle)

    def activation(self, text: str, token: int = -1) -> np.ndarray:
        """v (d,) float32 at a token of ``text`` behind BOS: ``hidden_states[ℓ]``. ``token`` counts from 0, or from the
        end if negative. Raises ``ConfigError`` if there is no such token."""
        ids = self.token_ids(text)
        if not -len(ids) <= token < len(ids):
            raise ConfigError(f"token {token} is out of range: the text has {len(ids)} tokens")
        return self.backbone.encode([ids[: token % len(ids) + 1]], start=True)[0]

    def trace(self, text: str) -> list[tuple[str, np.ndarray]]:
        """Each token of a text and the activation there: (token as text, v (d,))."""
        ids = self.token_ids(text)
        h_nd = self.backbone.encode([ids[: i + 1] for i in range(len(ids))], start=True)
        return list(zip(label_tokens(self.backbone.tokenizer, ids), h_nd))

    def token_ids(self, text: str) -> list[int]:
        """Ids of a text without BOS; raises ``ConfigError`` where it has none, and as :func:`outside_ids` does."""
        ids = outside_ids(self.backbone.tokenizer, text, "the text")
        if not ids:
            raise ConfigError(f"the text {text!r} has no tokens")
        return ids

    def verbalizer(self, method: str) -> Verbalizer:
        """One of :data:`VERBALIZERS`, with this backbone and bundle."""
        return VERBALIZERS[method](self.backbone, self.bundle)

    def verbalize(
        self,
        v: np.ndarray | Tensor,
        k: int = 64,
        method: str = "reader",
        seed: int = 0,
        fluency: Optional[float] = None,
    ) -> Verbalization:
        """The best of k texts for v (d,), chosen by re-encoding.

        Args:
            method: ``reader`` (closed form, writes the last tokens), ``guided`` (the reader's texts improved by
                search), ``av`` (the paper's adapter, writes from the beginning), ``lens`` (the k likeliest tokens of
                the logit lens, one token a text) or ``patchscope`` (v in an identity prompt).
            fluency: taken off a text's score, when the best is chosen, for every nat a token that its words cost the
                language model. Not given, ``guided`` takes 0.02, about where more fluent words begin to cost it much of
                its score (paper/comparison.md), and the others nothing.

        Raises ``ConfigError`` if v has the wrong shape or holds NaN, or the method, k or fluency is out of range.
        """
        v, backbone, mu = self._checked(v), self.backbone, self.bundle.mu
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}: {nearest(method, METHODS)}")
        if k < 1:
            raise ConfigError(f"k is {k}; at least one text is needed")
        fluency = (FLUENCY if method == "guided" else 0.0) if fluency is None else fluency
        if not 0 <= fluency < np.inf:
            raise ConfigError(f"fluency is {fluency}; it must be a number of at least 0")
        drawing = "reader" if method == "guided" else method
        texts = read(
            backbone, self.verbalizer(drawing).write(v[None], k, row_streams(seed, drawing, [0], k + 1)), CORRECTED
        )
        if method == "guided":
            found = guided_search(self.bundle.reader, backbone, v[None], mu, texts, GUIDED_TOKENS, fluency)
            text = found.ids[0].tolist()
        else:
            paid = fluency * nats_per_token(backbone, texts.sequences) if fluency else 0
            worth = fve(texts.read_as(CORRECTED)[0], v, mu) - paid
            text = texts.sequence(0, 1 + int(worth[1:].argmax()))
        greedy, h = texts.sequence(0), self._as_read(text)
        value, null = float(fve(h, v, mu)), fve(self.bundle.pool_v, v, mu)
        near = self.bundle.pool_texts[int(null.argmax())]
        closer, stored = int((null >= value).sum()), len(null)
        nats, near_nats = nats_per_token(backbone, [self._read_again(text), near])
        return Verbalization(
            method=method,
            k=k,
            text=backbone.decode_text(text),
            score=value,
            cosine=2 * value - 1,
            variance_explained=float(variance_explained(h, v, mean_direction(self.bundle.pool_v))),
            closer=closer,
            stored=stored,
            p_value=None if method == "guided" else chance_of_rank(closer, stored, k),
            percentile=float((null < value).mean() ** k),
            nats=float(nats),
            greedy=backbone.decode_text(greedy),
            greedy_score=float(fve(self._as_read(greedy), v, mu)),
            retrieved=backbone.decode_text(near),
            retrieved_score=float(null.max()),
            retrieved_nats=float(near_nats),
        )

    def _checked(self, v: np.ndarray | Tensor) -> np.ndarray:
        # A hidden state as a model gives it: any float dtype, on any device, (d,), (1, d) or (1, 1, d).
        v = torch.as_tensor(v).detach().float().cpu().numpy()
        v = v.reshape(-1) if v.ndim > 1 and v.size == v.shape[-1] else v
        if v.shape != (self.backbone.d,):
            raise ConfigError(f"an activation of {self.backbone.name} has shape ({self.backbone.d},), not {v.shape}")
        if not np.isfinite(v).all():
            raise ConfigError("the activation holds NaN or infinity")
        return v

    def _as_read(self, ids: Sequence[int]) -> np.ndarray:
        """h (d,) that anyone gets who reads the text again, alone."""
        return self.backbone.encode([self._read_again(ids)], start=True)[0]

    def _read_again(self, ids: Sequence[int]) -> list[int]:
        """Ids of the text as they are tokenized from its letters."""
        return self.backbone.tokenize_text(self.backbone.decode_text(ids)) or list(ids)


def label_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What to call each token: its text, or ``[id]`` where it has none to show, as a part of a character has not.

    The token that completes a character is called by the whole of it.
    """
    labels, first = [], 0
    for i, token in enumerate(ids):
        text = tokenizer.decode(list(ids[first : i + 1]))
        whole = not text.endswith("\ufffd")
        labels.append(text if whole and (text.isprintable() or text.isspace()) else f"[{token}]")
        first = i + 1 if whole else first
    return labels


def read_vector(path: Path) -> Tensor:
    """The one tensor in a ``.npy``, ``.safetensors`` or ``.pt`` file; raises ``ConfigError`` where it holds another."""
    readers = {
        ".npy": lambda: {"": torch.from_numpy(np.load(path, allow_pickle=False))},
        ".safetensors": lambda: load_file(path),
        ".pt": lambda: torch.load(path, map_location="cpu", weights_only=True),
    }
    if path.suffix not in readers:
        raise ConfigError(f"{path}: a vector is read from {', '.join(readers)}, not {path.suffix or 'a bare name'}")
    try:
        content = readers[path.suffix]()
    # Each format has errors of its own for a file that is empty, cut, or of another kind.
    except Exception as error:
        raise ConfigError(f"{path} was not read: {error or type(error).__name__}; it has to hold one tensor") from None
    tensors = list(content.values()) if isinstance(content, dict) else [content]
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor) or not tensors[0].is_floating_point():
        held = sorted(content) if isinstance(content, dict) and len(content) != 1 else "no floating-point tensor"
        raise ConfigError(f"{path} holds {held}; exactly one tensor of floats is read")
    return tensors[0]
