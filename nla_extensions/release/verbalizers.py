"""Verbalizers: what writes texts for activations. A further one is one class here, and one entry of ``VERBALIZERS``."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, ClassVar, Iterator, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from nla_extensions.release.bundle import Bundle
from nla_extensions.scoring.files import ids_of, read_texts, read_vectors
from nla_extensions.tail_reader.reader import read_tails
from nla_utils.config import RunConfig
from nla_utils.encoding import Texts
from nla_utils.errors import ConfigError, nearest
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.sampling import SamplingSettings, sample


@contextlib.contextmanager
def placed(module: nn.Module, positions: Sequence[int], change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The module's output at some positions (B, n, d) is changed while a prompt longer than that is read."""

    def put(_module, _given, output):
        h_BTd = output[0] if isinstance(output, tuple) else output
        if h_BTd.shape[1] <= max(positions):
            return output  # a later step of decoding, one token a time
        h_BTd = h_BTd.clone()
        h_BTd[:, positions] = change(h_BTd[:, positions]).to(h_BTd)
        return (h_BTd, *output[1:]) if isinstance(output, tuple) else h_BTd

    handle = module.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def lens_tokens(backbone: Backbone, v_Bd: Tensor, k: int) -> Tensor:
    """The k likeliest next tokens (B, k), best first, if v were what the last block leaves: the logit lens."""
    start_B1 = torch.full((len(v_Bd), 1), backbone.start_id, device=backbone.device)
    with placed(backbone.blocks[-1], [0], lambda _: v_Bd[:, None]):
        hidden_Bd = backbone.last_hidden(input_ids=start_B1)[:, -1]
    return backbone.logits(hidden_Bd).topk(k).indices


@dataclass(frozen=True)
class Verbalizer:
    """Writes texts for activations of a backbone, with what a bundle holds; one's own may do without it."""

    backbone: Backbone
    bundle: Optional[Bundle]

    @property
    def cost(self) -> int:
        """Forward tokens of one text, written and read again behind BOS; of a class that does not say, as the AV's."""
        return 2 * self.bundle.av.config.max_new_tokens + 1

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


class PromptVerbalizer(Verbalizer):
    """Puts v into a prompt and lets a model go on: Patchscopes, SelfIE, autoencoders' verbalizers, activation oracles.

    A subclass says how. ``prompt``: the text behind the start token, with v at each ``placeholder``, a string that is
    one token there. ``layer``: whose output v enters, 0 for the embeddings, else a block's; ``None`` is v's own layer.
    ``add``: v is added to what is there, else it takes its place. ``norm``: what v is brought to before, a number or
    ``match``, the norm of what is there; ``scale``: what it is multiplied by then. ``model``: who writes, if not the
    backbone: a registry name, a hub id or a folder, of the same width; ``adapter``: a folder of a LoRA in safetensors
    for it, which needs peft. ``start``: whether the start token stands before the prompt; a prompt may spell the
    special tokens of a chat. ``tokens``: how many a text has at most.
    """

    prompt: ClassVar[str] = ""
    placeholder: ClassVar[str] = "?"
    layer: ClassVar[Optional[int]] = None
    add: ClassVar[bool] = False
    norm: ClassVar[float | str | None] = None
    scale: ClassVar[float] = 1.0
    start: ClassVar[bool] = True
    model: ClassVar[Optional[str]] = None
    adapter: ClassVar[Optional[str]] = None
    tokens: ClassVar[int] = 64

    @functools.cached_property
    def writer(self) -> Backbone:
        """The model that writes; raises ``ConfigError`` where it has another width, or peft is missing."""
        writer, own = self.backbone, self.backbone.spec
        if self.model is not None or self.adapter is not None:
            # An adapter changes the model in place, so it has one of its own.
            source = self.model or (own.source if isinstance(own.source, str) else own.name)
            writer = load_backbone(RunConfig(backbone=source, dtype=self.backbone.identity()["dtype"]))
        if writer.d != self.backbone.d:
            raise ConfigError(
                f"{writer.name} has width {writer.d}, the vectors of {self.backbone.name} {self.backbone.d}"
            )
        if self.at > len(writer.blocks):
            raise ConfigError(f"v is to enter at layer {self.at}, and {writer.name} has {len(writer.blocks)}")
        if self.adapter is not None:
            with_adapter(writer.model, Path(self.adapter))
        return writer

    @property
    def at(self) -> int:
        """The layer that v enters behind."""
        return self.backbone.layer if self.layer is None else self.layer

    @functools.cached_property
    def ids(self) -> tuple[list[int], list[int]]:
        """Token ids of the prompt and the positions of the placeholders; raises ``ConfigError`` where there is none."""
        parts = self.prompt.split(self.placeholder)
        (token, *more) = self.writer.tokenize_text(self.placeholder)
        if len(parts) < 2 or more:
            raise ConfigError(f"{self.placeholder!r} must be one token of {self.writer.name}, and in {self.prompt!r}")
        ids, places = [self.writer.start_id] if self.start else [], []
        for i, part in enumerate(parts):
            places += [len(ids)] if i else []
            ids += ([token] if i else []) + (self.writer.tokenize_text(part) if part else [])
        return ids, places

    @property
    def cost(self) -> int:
        return len(self.ids[0]) + 2 * self.tokens

    @torch.inference_mode()
    def write(self, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> Texts:
        writer, (ids, places) = self.writer, self.ids
        v_B1d = torch.from_numpy(v_Md).to(writer.device).repeat_interleave(k + 1, dim=0)[:, None]
        greedy_B = torch.arange(len(v_B1d), device=writer.device) % (k + 1) == 0

        def entered(there_Bnd: Tensor) -> Tensor:
            norm_Bn1 = there_Bnd.float().norm(dim=-1, keepdim=True) if self.norm == "match" else self.norm
            unit_B1d = v_B1d if self.norm is None else norm_Bn1 * v_B1d / v_B1d.norm(dim=-1, keepdim=True)
            return self.scale * unit_B1d + (there_Bnd.float() if self.add else 0)

        embeds_BPd = writer.embed(torch.tensor([ids])).expand(len(v_B1d), -1, -1).clone()
        within = contextlib.nullcontext()
        if self.at:
            within = placed(writer.blocks[self.at - 1], places, entered)
        else:
            embeds_BPd[:, places] = entered(embeds_BPd[:, places]).to(embeds_BPd)
        with within:
            found = sample(
                writer, embeds_BPd, SamplingSettings(max_new_tokens=self.tokens), streams_B, greedy_B=greedy_B
            )
        return _texts(v_Md, [found.sequence(i) for i in range(len(v_B1d))])


def with_adapter(model: nn.Module, folder: Path) -> None:
    """Merge a LoRA into a model's weights, in place; raises ``ConfigError`` where peft or the adapter's safetensors are
    missing."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{folder} holds no adapter_model.safetensors; no other format of adapters is read")
    try:
        from peft import PeftModel
    except ImportError:
        raise ConfigError("an adapter needs the package peft: pip install peft") from None
    PeftModel.from_pretrained(model, folder).merge_and_unload()
    model.requires_grad_(False)


class Patchscope(PromptVerbalizer):
    """v in an identity prompt (Ghandeharioun et al. 2024); texts are as long as the reader's."""

    prompt = "cat->cat; 135->135; hello->hello; ?->"

    @property
    def tokens(self) -> int:
        return self.bundle.reader.n


class JsonlVerbalizer(Verbalizer):
    """Texts that are in a file, for vectors that are in another; a subclass names both (``nla score`` has their
    formats)."""

    vectors: ClassVar[str]
    texts: ClassVar[str]
    cost = 1

    def write(self, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> list[list[list[int]]]:
        names, held_Nd = read_vectors(Path(self.vectors))
        ids, _ = read_texts(Path(self.texts), names, self.backbone)
        found = []
        for m, v_d in enumerate(v_Md):
            same = np.flatnonzero((held_Nd == v_d).all(axis=1))
            own = ids[same[0]] if len(same) else []
            if len(own) < 1 + k:
                raise ConfigError(f"{self.texts} has {len(own)} texts for vector {m}, not {1 + k}, the likeliest first")
            found.append(own[: 1 + k])
        return found


VERBALIZERS: dict[str, type[Verbalizer]] = {
    "reader": Reader,
    "av": PaperAV,
    "lens": LogitLens,
    "patchscope": Patchscope,
}
# The guided search starts from the reader's texts.
METHODS = (*VERBALIZERS, "guided")
# The group of entry points that other packages name theirs in.
GROUP = "nla.verbalizers"


def find_verbalizer(method: str) -> type[Verbalizer]:
    """One of :data:`VERBALIZERS`, ``module:Class`` of one's own, or an entry point of another package; raises
    ``ConfigError`` for what is none of them."""
    if method in VERBALIZERS:
        return VERBALIZERS[method]
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if method in entries:
        method = entries[method].value
    if ":" not in method:
        raise ConfigError(f"unknown method {method!r}: {nearest(method, [*METHODS, *entries, 'module:Class'])}")
    found = load_class(method)
    if not callable(getattr(found, "write", None)):
        raise ConfigError(f"{method} has no method write(v_Md, k, streams_B)")
    return found


def load_class(name: str) -> type:
    """``module:Class``, the module from where Python finds it or from the folder that one is in; raises ``ConfigError``
    where there is none."""
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    # A module of one's own may fail in any way as it is imported.
    except Exception as error:
        raise ConfigError(f"{name} was not found: {type(error).__name__}: {error}; write module:Class") from None


def write(verbalizer: Verbalizer, backbone: Backbone, v_Md: np.ndarray, k: int, streams_B: np.ndarray) -> Texts:
    """1 + k texts for each vector; one's own may write ``Texts``, or for each vector a list of strings or of ids.

    Raises ``ConfigError`` that names the class where there are not so many."""
    made, who = verbalizer.write(v_Md, k, streams_B), type(verbalizer).__name__
    if not isinstance(made, Texts):
        made = _texts(v_Md, [text for own in ids_of(made, range(len(v_Md)), backbone) for text in own])
    if made.lengths.shape != (len(v_Md), 1 + k):
        said = f"{made.lengths.size} texts for {len(v_Md)} vectors"
        raise ConfigError(f"{who}.write gave {said}; it must give 1 + {k} for each, the likeliest first")
    return made
