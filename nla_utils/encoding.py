"""Texts, and the one door from a text to an activation: re-encoding under a protocol's slips (PROTOCOL.md §5, §7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Callable, Mapping, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.config import PROBE_LENGTHS, TAIL_LENGTHS
from nla_utils.lm.backbone import Backbone, check_finite, pad
from nla_utils.protocol import DECODED, ID_SLIPS, READING_SLIPS, Protocol
from nla_utils.store import Artefact, ChunkStore, RunFolder

# Texts that the authors pad together, in their order.
PUBLISHED_BATCH = 16
# Of the arrays that texts are kept as; part of the spec of what holds them.
TEXTS_FORMAT = {"texts_format": 1}
# Texts whose own likelihood is taken together.
LIKELIHOOD_BATCH = 256
# Where a target's texts are no draws: how many last tokens each of them has.
LENGTHS = {"tail": TAIL_LENGTHS, "probe": PROBE_LENGTHS}


@dataclass
class Texts:
    """n texts for each of M targets, and the activations that they were read as.

    ``kind`` is what they are: ``source``, ``paraphrase``, ``tail`` (the source's last tokens), ``rollout`` (text 0 is
    greedy), ``probe`` or ``pool``. ``rows`` (M,) are the targets'; ``ids`` (M, n, T) int32, right-padded; ``lengths``
    (M, n), 0 of a text that is not known. ``logp``: mean token log-probabilities (M, n) by how they are taken, NaN
    where they are not. ``h``: activations (M, n, d) float32 by reading, see :func:`read`.
    """

    kind: str
    rows: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    logp: dict[str, np.ndarray] = field(default_factory=dict)
    h: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, rows: Sequence[int], sequences: Sequence[Sequence[int]]) -> "Texts":
        """Token ids of M · n texts, target by target."""
        lengths = np.array([len(s) for s in sequences], dtype=np.int32)
        ids = np.zeros((len(sequences), lengths.max(initial=1)), dtype=np.int32)
        for row, sequence in zip(ids, sequences):
            row[: len(sequence)] = sequence
        shape = len(rows), len(sequences) // max(1, len(rows))
        rows = np.asarray(rows, dtype=np.int64)
        return cls(kind, rows, ids.reshape(*shape, ids.shape[1]), lengths.reshape(shape))

    @classmethod
    def of_arrays(cls, kind: str, arrays: Mapping[str, np.ndarray]) -> "Texts":
        """What :attr:`arrays` gave."""
        found: dict[str, dict[str, np.ndarray]] = {"own": {}, "logp": {}, "h": {}}
        for name, array in arrays.items():
            what, _, key = name.rpartition("/")
            found[what or "own"][key] = array
        return cls(kind, **found["own"], logp=found["logp"], h=found["h"])

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """Everything by the names that it is kept under; the first axis is the targets'."""
        own = {"rows": self.rows, "ids": self.ids, "lengths": self.lengths}
        own |= {f"logp/{name}": x for name, x in self.logp.items()}
        return own | {f"h/{reading}": x for reading, x in self.h.items()}

    def take(self, chosen: np.ndarray) -> "Texts":
        """The texts of some of the M targets, by index, in the order asked for."""
        return Texts.of_arrays(self.kind, {name: x[chosen] for name, x in self.arrays.items()})

    def at(self, rows: Sequence[int]) -> "Texts":
        """The texts of some of the targets, by row, in the order asked for."""
        return self.take(np.array([np.flatnonzero(self.rows == row)[0] for row in rows]))

    def sequence(self, m: int, j: int = 0) -> list[int]:
        return self.ids[m, j, : self.lengths[m, j]].tolist()

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids of all M · n texts, target by target."""
        return [self.sequence(m, j) for m, j in np.ndindex(self.lengths.shape)]

    @property
    def k(self) -> int:
        """Texts that were drawn for each target, the greedy one aside."""
        return self.lengths.shape[1] - 1

    @property
    def draws(self) -> Sequence[int]:
        """What the n texts of a target are called (n,): by draw, or by length where they are last tokens."""
        return LENGTHS.get(self.kind, range(self.k + 1))

    def reading(self, protocol: Protocol) -> str:
        """The name of how a protocol reads these texts, after the slips that act on them."""
        return protocol.corrected_of(READING_SLIPS if self.kind in DECODED else ID_SLIPS)

    def read_as(self, protocol: Protocol) -> np.ndarray:
        """h (M, n, d) as the protocol reads them; they were read before."""
        return self.h[self.reading(protocol)]


def read(backbone: Backbone, texts: Texts, *protocols: Protocol) -> Texts:
    """The same texts with their activations as each protocol reads them; a reading that is there is not made again."""
    for protocol in protocols:
        reading = texts.reading(protocol)
        if reading not in texts.h:
            acting = protocol if texts.kind in DECODED else protocol.on_ids
            texts.h[reading] = re_encode(backbone, texts.sequences, acting).reshape(*texts.lengths.shape, -1)
    return texts


def write_in_chunks(
    chunks: ChunkStore, kind: str, rows: np.ndarray, per_chunk: int, write: Callable[[np.ndarray], Texts], label: str
) -> Texts:
    """What ``write`` makes of the rows, some of them at a time, so that a killed stage resumes where it was."""
    made = chunks.fill(len(rows), per_chunk, lambda part: write(rows[part]).arrays, label, "target")
    return Texts.of_arrays(kind, made)


def save_texts(folder: RunFolder, artefact: str, texts: Mapping[str, Texts], **about) -> None:
    """Keep named texts with their readings in one artefact; a name begins with the kind."""
    arrays = {f"{name}/{key}": x for name, own in texts.items() for key, x in own.arrays.items()}
    folder.save(artefact, arrays, **about)


def texts_of(artefact: Artefact) -> dict[str, Texts]:
    """The texts of an artefact by name; its other arrays are left alone."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, array in artefact.tensors.items():
        text, separator, key = name.partition("/")
        if separator:
            found.setdefault(text, {})[key] = array
    return {name: Texts.of_arrays(name.partition(".")[0], arrays) for name, arrays in found.items()}


def re_encode(backbone: Backbone, sequences: Sequence[Sequence[int]], protocol: Protocol) -> np.ndarray:
    """Activations h (N, d) float32 of N sampled id sequences, start token aside, as the protocol re-encodes them.

    Slip ``eos_text``: not the ids, but their decoded text, tokenized again, which has lost its special tokens. ``bos``:
    without the start token. ``left_pad``: not read at the last token, but where the authors look for it. A sequence of
    no ids is a text that is not known (of a released target): its activation is NaN.
    """
    known = [i for i, s in enumerate(sequences) if len(s)]
    if len(known) < len(sequences):
        h_Nd = np.full((len(sequences), backbone.d), np.nan, dtype=np.float32)
        if known:
            h_Nd[known] = re_encode(backbone, [sequences[i] for i in known], protocol)
        return h_Nd
    ids = [list(s) for s in sequences]
    if "eos_text" in protocol.slips:
        ids = [backbone.tokenize_text(backbone.decode_text(s)) for s in ids]
    if "left_pad" not in protocol.slips:
        # A text can be empty (a lone EOS was sampled); the start token alone stands for it.
        return backbone.encode([row or [backbone.start_id] for row in ids], start="bos" not in protocol.slips)
    head = [backbone.start_id] if "bos" not in protocol.slips else []
    return encode_padded(backbone, [head + row for row in ids])


@torch.inference_mode()
def encode_padded(backbone: Backbone, rows: list[list[int]]) -> np.ndarray:
    """h (N, d) float32 of token ids, read at index count − 1 (slip ``left_pad``).

    Padded on the tokenizer's own side, in batches of 16; on a left-padded row index count − 1 is not the last token. A
    row of no tokens is read at index −1.
    """
    h_Nd = np.empty((len(rows), backbone.d), dtype=np.float32)
    for first in range(0, len(rows), PUBLISHED_BATCH):
        batch = slice(first, min(first + PUBLISHED_BATCH, len(rows)))
        ids_BT, mask_BT = (x.to(backbone.device) for x in pad(rows[batch], backbone.pad_id, backbone.padding_side))
        h_BTd = backbone.hidden_at_layer(input_ids=ids_BT, attention_mask=mask_BT)
        h_Bd = h_BTd[torch.arange(len(h_BTd), device=backbone.device), mask_BT.sum(dim=1) - 1]
        h_Nd[batch] = h_Bd.float().cpu().numpy()
    check_finite(h_Nd, "texts encoded as the authors do")
    return h_Nd


def nats_per_token(backbone: Backbone, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Mean cross-entropy (N,) of a text's tokens behind the start token, no v in sight: its fluency; e to it is its
    perplexity; NaN for a text of no tokens. ``texts`` are ids, an EOS among them counted."""
    start_11d = backbone.embed(torch.tensor([[backbone.start_id]]))
    nats_N = np.full(len(texts), np.nan)
    # Of similar length together; a stable order, so that equal texts make equal batches.
    order = sorted((i for i in range(len(texts)) if len(texts[i])), key=lambda i: len(texts[i]))
    for first in range(0, len(order), LIKELIHOOD_BATCH):
        batch = order[first : first + LIKELIHOOD_BATCH]
        prefix_B1d = start_11d.expand(len(batch), -1, -1)
        logp_BT = text_logprobs(backbone, prefix_B1d, [list(texts[i]) for i in batch])
        nats_N[batch] = -logp_BT.nanmean(dim=1).cpu().numpy()
    return nats_N


def text_hidden(backbone: Backbone, prefix_BPd: Tensor, text_BTd: Tensor) -> Tensor:
    """Final hidden states (B, T, d) from which the tokens of texts behind a prefix are predicted."""
    hidden_BSd = backbone.last_hidden(inputs_embeds=torch.cat([prefix_BPd, text_BTd], dim=1))
    # The last prefix position predicts the first token.
    return hidden_BSd[:, prefix_BPd.shape[1] - 1 : -1]


@torch.inference_mode()
def text_logprobs(
    backbone: Backbone, prefix_BPd: Tensor, texts: list[list[int]], embed: Optional[Callable[[Tensor], Tensor]] = None
) -> Tensor:
    """log p of each token of texts behind a prefix (B, T), NaN after the end; ``embed`` gives embeddings of ids, else
    the backbone does."""
    ids_BT, valid_BT = (x.to(backbone.device) for x in pad(texts, backbone.pad_id, "right"))
    valid_BT = valid_BT.bool()
    hidden_nd = text_hidden(backbone, prefix_BPd, (embed or backbone.embed)(ids_BT))[valid_BT]
    logp_BT = torch.full(ids_BT.shape, torch.nan, device=backbone.device)
    logp_BT[valid_BT] = backbone.logprobs(hidden_nd, ids_BT[valid_BT])
    return logp_BT
