"""Put an activation into words, in a few lines of Python.

nla = NLA.load("gemma3-270m")
v = nla.activation("The lighthouse keeper wound the clock and")
print(nla.verbalize(v, k=64).text)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nla_extensions.release.bundle import Bundle, load_bundle
from nla_extensions.release.verbalizers import VERBALIZERS, Verbalizer, find_verbalizer, write
from nla_extensions.scoring.files import check_vectors, resumed
from nla_extensions.tail_reader.rollouts import FLUENCY, guided_search
from nla_utils.config import RunConfig
from nla_utils.encoding import Texts, nats_per_token, read
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.backbone import Backbone, outside_ids
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.sampling import row_streams
from nla_utils.metrics import chance_of_rank, fve, mean_direction, p_of_null, variance_explained
from nla_utils.protocol import CORRECTED
from nla_utils.store import Progress, arrays_hash, atomic_write, json_hash

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
    more often than k times. ``p_writer``: the same selection among the texts of ``others`` stored activations.
    ``percentile``: the share of stored texts that score less to the power of k, an estimate of 1 − p that is 1 where
    none is closer. ``nats``: what a token of the text costs the language model, behind BOS and without v. ``greedy``:
    the text chosen without looking at v again. ``retrieved``: the stored text nearest to v.
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
    p_writer: Optional[float]
    others: int
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
        if self.p_writer is not None:
            chance += f"; p = {self.p_writer:.3f} among the texts of {self.others} other activations"
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
    """A backbone with its verbalizers: the tail reader and the paper's AV; without a bundle, with one's own alone."""

    def __init__(self, backbone: Backbone, bundle: Optional[Bundle]):
        self.backbone, self._bundle = backbone, bundle
        self._verbalizers: dict[str, Verbalizer] = {}

    @property
    def bundle(self) -> Bundle:
        """The bundle; raises ``ArtefactError`` where there is none."""
        if self._bundle is None:
            raise _lacks_bundle(self.backbone.name, self.backbone.layer)
        return self._bundle

    @classmethod
    def load(
        cls,
        backbone: str = "gemma3-270m",
        run: Optional[str | Path] = None,
        device: str = "auto",
        layer: Optional[int] = None,
        bundled: bool = True,
    ) -> NLA:
        """Verbalizers that ship with the package, or those of a finished run folder (``run``).

        Raises ``ConfigError`` for an unknown backbone; ``ArtefactError``, before anything is fetched, where there are
        none or of another ``layer``, and where they fit other weights. Unless they need to be there (``bundled``):
        verbalizers of one's own can write without.
        """
        folder = None if run is None else Path(run)
        has = Bundle.layer_of(backbone, folder)
        if bundled and (has is None or layer not in (None, has)):
            raise _lacks_bundle(backbone, layer)
        loaded = load_backbone(RunConfig(backbone=backbone, device=device, layer=has if layer is None else layer))
        return cls(loaded, load_bundle(loaded, folder) if loaded.layer == has else None)

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
        """A verbalizer by its name, or ``module:Class``, with this backbone and bundle; raises as
        :func:`~nla_extensions.release.verbalizers.find_verbalizer` does."""
        if method not in self._verbalizers:
            bundle = self.bundle if method in VERBALIZERS else self._bundle
            self._verbalizers[method] = find_verbalizer(method)(self.backbone, bundle)
        return self._verbalizers[method]

    def write(self, v_Md: np.ndarray, k: int, method: str, seed: int, first: int = 0) -> Texts:
        """1 + k texts for each of M activations, the likeliest first. Vector m draws from the stream of number
        ``first`` + m, whatever is beside it."""
        streams_B = row_streams(seed, method, range(first, first + len(v_Md)), k + 1)
        return write(self.verbalizer(method), self.backbone, v_Md, k, streams_B)

    def verbalize(
        self,
        v: np.ndarray | Tensor,
        k: int = 64,
        method: str = "reader",
        seed: int = 0,
        fluency: Optional[float] = None,
        others: int = 0,
    ) -> Verbalization:
        """The best of k texts for v (d,), chosen by re-encoding.

        Args:
            method: ``reader`` (closed form, writes the last tokens), ``guided`` (the reader's texts improved by
                search), ``av`` (the paper's adapter, writes from the beginning), ``lens`` (the k likeliest tokens of
                the logit lens, one token a text), ``patchscope`` (v in an identity prompt), or ``module:Class`` of
                one's own (docs/score.md).
            fluency: taken off a text's score, when the best is chosen, for every nat a token that its words cost the
                language model. Not given, ``guided`` takes 0.02, about where more fluent words begin to cost it much of
                its score (paper/comparison.md), and the others nothing.
            others: J stored activations, whose texts are written and chosen from in the same way for a further
                p-value, (1 + how many score at least as much) / (J + 1); it takes J times as long.

        Raises ``ConfigError`` if v has the wrong shape or holds NaN, or the method, k, fluency or others is out of
        range, ``ArtefactError`` without a bundle, whose texts are what the best is set against.
        """
        v, backbone, mu = self._checked(v), self.backbone, self.bundle.mu
        drawing = "reader" if method == "guided" else method
        self.verbalizer(drawing)
        if k < 1:
            raise ConfigError(f"k is {k}; at least one text is needed")
        fluency = (FLUENCY if method == "guided" else 0.0) if fluency is None else fluency
        if not 0 <= others <= len(self.bundle.pool_v) or (others and method == "guided"):
            said = "the guided search looks at v, so that no texts of others are its null" if others else ""
            raise ConfigError(
                f"others is {others}; {said or f'choose 0 to {len(self.bundle.pool_v)} stored activations'}"
            )
        if not 0 <= fluency < np.inf:
            raise ConfigError(f"fluency is {fluency}; it must be a number of at least 0")
        texts = read(backbone, self.write(v[None], k, drawing, seed), CORRECTED)
        if method == "guided":
            found = guided_search(self.bundle.reader, backbone, v[None], mu, texts, GUIDED_TOKENS, fluency)
            text = found.ids[0].tolist()
        else:
            text = texts.sequence(0, self._chosen(texts, v, fluency)[0][0])
        greedy, h = texts.sequence(0), self._as_read(text)
        value, null = float(fve(h, v, mu)), fve(self.bundle.pool_v, v, mu)
        near = self.bundle.pool_texts[int(null.argmax())]
        closer, stored = int((null >= value).sum()), len(null)
        p_writer = None
        if others:
            texts = read(backbone, self.write(self.bundle.pool_v[:others], k, drawing, seed, first=1), CORRECTED)
            p_writer = float(p_of_null(value, self._chosen(texts, v, fluency)[1]))
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
            p_writer=p_writer,
            others=others,
            percentile=float((null < value).mean() ** k),
            nats=float(nats),
            greedy=backbone.decode_text(greedy),
            greedy_score=float(fve(self._as_read(greedy), v, mu)),
            retrieved=backbone.decode_text(near),
            retrieved_score=float(null.max()),
            retrieved_nats=float(near_nats),
        )

    def verbalize_many(self, names: Sequence[str], v_Md: np.ndarray, to: Path, k: int, method: str, seed: int) -> None:
        """Write k texts of each of M vectors to JSON Lines, as ``nla score`` reads them, the likeliest text beside
        them; what was interrupted resumes.

        Raises ``ConfigError`` for vectors that do not fit or for ``guided``, which reads one vector at a time,
        ``ArtefactError`` where the unfinished file is of other vectors or options.
        """
        v_Md = check_vectors(v_Md, names, self.backbone.d, self.backbone.name)
        if method == "guided" or k < 1:
            raise ConfigError(f"method {method!r}, k {k}: choose a verbalizer that draws, and at least one text")
        self.verbalizer(method)
        bundle = self._bundle and self._bundle.made_from
        of = {"vectors": arrays_hash({"v": v_Md}), "names": json_hash(list(names)), "bundle": bundle}
        plan = {**self.backbone.identity(), **of, "k": k, "method": method, "seed": seed}
        partial, done = resumed(to, plan)
        together, decode = max(1, self.backbone.sample_batch // (k + 1)), self.backbone.decode_text
        left = [i for i, name in enumerate(names) if name not in done]
        with open(partial, "a", encoding="utf-8") as file, Progress(total=len(left), desc=method, unit="vector") as bar:
            # Successive ones, so that each block is one call.
            for i in range(left[0] if left else len(names), len(names), together):
                texts = self.write(v_Md[i : i + together], k, method, seed, i)
                for m in range(len(texts.lengths)):
                    (likeliest, *ids) = [texts.sequence(m, j) for j in range(k + 1)]
                    row = {"id": names[i + m], "texts": list(map(decode, ids)), "ids": ids, "likeliest": likeliest}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(texts.lengths))
        lines = partial.read_bytes()
        atomic_write(to, lines[lines.index(b"\n") + 1 :])
        partial.unlink()

    def _chosen(self, texts: Texts, v: np.ndarray, fluency: float) -> tuple[np.ndarray, np.ndarray]:
        """Of each vector's draws (M, 1 + k) the one that is chosen for v, and its score (M,), (M,)."""
        score_MK = fve(texts.read_as(CORRECTED), v, self.bundle.mu)[:, 1:]
        nats_MK = nats_per_token(self.backbone, texts.sequences).reshape(texts.lengths.shape)[:, 1:] if fluency else 0
        at_M = (score_MK - fluency * nats_MK).argmax(axis=1)
        return 1 + at_M, score_MK[np.arange(len(at_M)), at_M]

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


def _lacks_bundle(name: str, layer: Optional[int]) -> ArtefactError:
    at, options = ("", "") if layer is None else (f" at layer {layer}", f" --layer {layer}")
    return ArtefactError(
        f"no verbalizers ship for {name}{at}; make them with `nla reproduce --backbone {name}{options} --with "
        "tail-reader` and give the run folder (run=, --run), or write for --vectors with --method module:Class and set "
        "the texts beside unrelated ones with `nla score`"
    )


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
