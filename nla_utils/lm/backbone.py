"""The frozen language model: embed, encode token ids to the activation h at layer ℓ, predict tokens.

``hidden_states[ℓ]`` counts as the paper does: index 0 is the embedding output, index ℓ the output of
block ℓ (1-based). Only the first ℓ blocks are run when h is all that is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from nla_utils.errors import BackboneError, ConfigError
from nla_utils.lm.cpu import head_product, product_dtype
from nla_utils.lm.weights import BackboneSpec

# Of everything here that decides what the model gives: raised with each change of it, so that older artefacts are
# refused.
FORMAT = 1
# Tokens encoded together, and rows decoded together: enough to keep the products of two CPU cores efficient, and to
# hide a GPU's launches.
ENCODE_TOKENS = {"cpu": 2048, "cuda": 65536, "mps": 8192}
SAMPLE_BATCH = {"cpu": 256, "cuda": 1024, "mps": 256}
# Rows whose logits are made at once: with fewer the head's products are held up by reading its weight.
CHUNK_ROWS = 256


def head_logits(hidden_nd: Tensor, weight_Vd: Tensor, cap: Optional[float], out_nV: Tensor) -> Tensor:
    """Logits (n, V) of a head, Gemma-2's soft cap included, written to ``out_nV``."""
    z_nV = head_product(hidden_nd, weight_Vd, out_nV)
    return z_nV if cap is None else z_nV.div_(cap).tanh_().mul_(cap)


def _chunks(hidden_nd: Tensor, weight_Vd: Tensor, cap: Optional[float]) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows and their logits, all in the same memory."""
    buffer_CV = weight_Vd.new_empty(min(CHUNK_ROWS, len(hidden_nd)), len(weight_Vd))
    for first in range(0, len(hidden_nd), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        hidden_cd = hidden_nd[rows]
        yield rows, head_logits(hidden_cd, weight_Vd, cap, buffer_CV[: len(hidden_cd)])


def _log_likelihood(z_nV: Tensor, y_n: Tensor) -> tuple[Tensor, Tensor]:
    """(log p(y) (n,), normaliser (n,)); leaves exp(z − max z) in ``z_nV``'s memory.

    The normaliser is applied to (n, d) results instead of to (n, V) probabilities.
    """
    z_y_n = z_nV.gather(1, y_n[:, None])[:, 0].float()
    top_n = z_nV.amax(dim=1)
    z_nV.sub_(top_n[:, None]).exp_()
    # A few rows at a time: on a CPU a float32 sum of reduced floats copies its input, and a small copy stays in cache.
    rows = 4 if z_nV.device.type == "cpu" else len(z_nV)
    norm_n = torch.cat([few_V.sum(dim=1, dtype=torch.float32) for few_V in z_nV.split(rows)])
    return z_y_n - top_n.float() - norm_n.log(), norm_n


class _HeadCrossEntropy(torch.autograd.Function):
    """Sum of token cross-entropies, each times its share; the gradient to the hidden states is made on the way forward.

    The head is frozen, so the only gradient is ∂/∂h = (softmax(z) − onehot(y)) W, which needs the
    logits z of one chunk of rows at a time and nothing of them later.
    """

    @staticmethod
    def forward(
        ctx, hidden_nd: Tensor, weight_Vd: Tensor, targets_n: Tensor, cap: Optional[float], share_n: Optional[Tensor]
    ):
        grad_nd = torch.empty_like(hidden_nd)
        total = hidden_nd.new_zeros((), dtype=torch.float32)
        for rows, z_cV in _chunks(hidden_nd, weight_Vd, cap):
            y_c = targets_n[rows]
            target_cd = weight_Vd[y_c].float()
            slope_cV = None if cap is None else 1 - (z_cV / cap) ** 2
            logp_c, norm_c = _log_likelihood(z_cV, y_c)
            if slope_cV is not None:
                z_cV.mul_(slope_cV)
                target_cd = target_cd * slope_cV.gather(1, y_c[:, None]).float()
            grad_cd = (z_cV @ weight_Vd).float() / norm_c[:, None] - target_cd
            if share_n is not None:
                logp_c, grad_cd = logp_c * share_n[rows], grad_cd * share_n[rows, None]
            total -= logp_c.sum()
            grad_nd[rows] = grad_cd.to(hidden_nd.dtype)
        ctx.save_for_backward(grad_nd)
        return total

    @staticmethod
    def backward(ctx, upstream: Tensor):
        (grad_nd,) = ctx.saved_tensors
        return grad_nd * upstream.to(grad_nd.dtype), None, None, None, None


def head_cross_entropy(
    hidden_nd: Tensor, weight_Vd: Tensor, targets_n: Tensor, cap: float | None = None, share_n: Tensor | None = None
) -> Tensor:
    """Mean token cross-entropy (nats) of a frozen linear head, from final hidden states, contiguous, one row a token.

    ``cap`` is Gemma-2's soft cap on the logits, ``share_n`` what each token counts in place of 1/n.
    """
    on = weight_Vd.device
    total = _HeadCrossEntropy.apply(hidden_nd.to(on), weight_Vd, targets_n.to(on), cap, share_n)
    return total / len(hidden_nd) if share_n is None else total


@torch.inference_mode()
def head_logprobs(hidden_nd: Tensor, weight_Vd: Tensor, targets_n: Tensor, cap: Optional[float] = None) -> Tensor:
    """log p(target) (n,) under the whole vocabulary's softmax at temperature 1, chunk by chunk."""
    on = weight_Vd.device
    y_n, chunks = targets_n.to(on), _chunks(hidden_nd.to(on), weight_Vd, cap)
    return torch.cat([_log_likelihood(z_cV, y_n[rows])[0] for rows, z_cV in chunks]).to(hidden_nd.device)


class _LayerReached(Exception):
    """Raised by a hook to leave the forward pass once block ℓ has run."""


@dataclass
class Description:
    """What is known of a backbone without its weights.

    ``layer`` ℓ of ``n_layers``, ``d`` the width of an activation; ``dtype`` is the weights'; ``hashes`` are of the
    weights and of the model's settings.
    """

    spec: BackboneSpec
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    layer: int
    n_layers: int
    d: int
    start_id: int
    eos_ids: tuple[int, ...]
    pad_id: int
    padding_side: str
    dtype: torch.dtype
    hashes: tuple[str, str]

    @property
    def name(self) -> str:
        return self.spec.name

    def identity(self) -> dict:
        """What every artefact made with this backbone must agree on."""
        return {
            "backbone": self.name,
            "format": FORMAT,
            "weight_hash": self.hashes[0],
            "settings_hash": self.hashes[1],
            "layer": self.layer,
            "layer_convention": "hidden_states[layer], 0 = embeddings",
            "start_id": self.start_id,
            "eos_ids": list(self.eos_ids),
            "pad_id": self.pad_id,
            "padding_side": self.padding_side,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass
class Backbone(Description):
    """A frozen causal language model, its tokenizer and the extraction layer.

    ``head_weight`` (V, d) is in the dtype that its products are taken in. ``own_head``: the model's logits are more
    than that product and a soft cap (a bias, a scale), so the model itself makes them.
    """

    model: nn.Module
    head_weight: Tensor
    library_attention: str
    own_head: bool = False

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def sample_batch(self) -> int:
        """Rows to decode together on this device."""
        return SAMPLE_BATCH[self.device.type]

    @property
    def softcap(self) -> float | None:
        """Gemma-2's cap on the final logits, ``None`` elsewhere."""
        return getattr(self.model.config, "final_logit_softcapping", None)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, whatever the architecture calls them; raises ``BackboneError`` where none are found."""
        for module in self.model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.n_layers:
                return module
        raise BackboneError(f"{type(self.model).__name__}: no list of {self.n_layers} decoder blocks was found")

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Token embeddings (B, T, d) through the module, so that Gemma's √d scale is applied."""
        return self.model.get_input_embeddings()(ids_BT.to(self.device))

    @torch.inference_mode()
    def embedding_table(self) -> Tensor:
        """Every token's embedding through the module (V, d), in the dtype that products with it are taken in."""
        table_Vd = self.embed(torch.arange(len(self.head_weight)))
        return table_Vd.to(product_dtype(table_Vd))

    def logits(self, hidden_nd: Tensor, out_nV: Tensor | None = None) -> Tensor:
        """Next-token logits (n, V) from final hidden states (n, d), final soft cap included, where the head lies.

        A product into fresh memory is far slower on a CPU, hence ``out_nV`` for callers that come again.
        """
        if self.own_head:
            return self._own_logits(hidden_nd)
        # Contiguous: a head applied to a strided slice is far slower on a CPU.
        hidden_nd = hidden_nd.to(self.head_weight.device).contiguous()
        if out_nV is None:
            out_nV = hidden_nd.new_empty(len(hidden_nd), len(self.head_weight))
        return head_logits(hidden_nd, self.head_weight, self.softcap, out_nV)

    def _own_logits(self, hidden_nd: Tensor) -> Tensor:
        """As the model's own code makes them: it is run on one token, and its last hidden state is replaced."""

        def put(_module, _given, found: ModelOutput) -> ModelOutput:
            found["last_hidden_state"] = hidden_nd[None]
            return found

        handle = self.model.base_model.register_forward_hook(put)
        try:
            start_11 = torch.tensor([[self.start_id]], device=self.device)
            return self.model(input_ids=start_11, use_cache=False).logits[0]
        finally:
            handle.remove()

    def cross_entropy(self, hidden_nd: Tensor, targets_n: Tensor, share_n: Tensor | None = None) -> Tensor:
        """Mean token cross-entropy (nats) from final hidden states (n, d), or each token's times its share, summed."""
        if not self.own_head:
            return head_cross_entropy(hidden_nd, self.head_weight, targets_n, self.softcap, share_n)
        nats_n = nn.functional.cross_entropy(self.logits(hidden_nd).float(), targets_n, reduction="none")
        return nats_n.mean() if share_n is None else (nats_n * share_n).sum()

    @torch.inference_mode()
    def logprobs(self, hidden_nd: Tensor, targets_n: Tensor) -> Tensor:
        """log p of each target (n,) from final hidden states (n, d), under the whole vocabulary at temperature 1."""
        if not self.own_head:
            return head_logprobs(hidden_nd, self.head_weight, targets_n, self.softcap)
        parts = zip(hidden_nd.split(CHUNK_ROWS), targets_n.split(CHUNK_ROWS))
        return torch.cat([-nn.functional.cross_entropy(self.logits(h).float(), y, reduction="none") for h, y in parts])

    def last_hidden(self, **inputs: Tensor) -> Tensor:
        """Final hidden states (B, T, d) of a whole forward pass, normalised: what the head is applied to."""
        return self.model.base_model(**inputs, use_cache=False).last_hidden_state.to(self.device)

    def hidden_at_layer(self, **inputs: Tensor) -> Tensor:
        """``hidden_states[ℓ]`` (B, T, d) of a forward pass that stops at block ℓ."""
        return self.hidden_at_layers((self.layer,), **inputs)[0]

    def hidden_at_layers(self, layers: Sequence[int], **inputs: Tensor) -> list[Tensor]:
        """``hidden_states`` (B, T, d) at each of the layers, of one forward pass that stops at the last of them."""
        blocks, reached = self.blocks, {}
        wanted, last = [blocks[layer - 1] for layer in layers], blocks[max(layers) - 1]

        def grab(block: nn.Module, _given, output) -> None:
            reached[block] = (output[0] if isinstance(output, tuple) else output).to(self.device)
            if block is last:
                raise _LayerReached

        handles = [block.register_forward_hook(grab) for block in wanted]
        try:
            self.model.base_model(**inputs, use_cache=False)
        except _LayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [reached[block] for block in wanted]

    def encode(self, sequences: Sequence[Sequence[int]], start: bool) -> np.ndarray:
        """Activation h (N, d) at the last token of each id sequence, at the run's layer; see :meth:`encode_layers`."""
        return self.encode_layers(sequences, start, (self.layer,))[0]

    @torch.inference_mode()
    def encode_layers(self, sequences: Sequence[Sequence[int]], start: bool, layers: Sequence[int]) -> np.ndarray:
        """Activation h (L, N, d) float32 at the last token of each of N id sequences, at L layers in one pass.

        ``start`` puts the start token (BOS) in front: ``corrected`` does, ``published`` does not. Raises
        ``BackboneError`` where a sequence is empty, an id has no embedding, or an activation is not finite.

        Rows are padded on the right: under causal attention a valid token never sees what follows it, so no mask is
        needed. Rows of similar length share a batch.
        """
        head = [self.start_id] if start else []
        rows = [head + list(s) for s in sequences]
        if any(len(r) == 0 for r in rows):
            raise BackboneError("a sequence of no tokens has no activation")
        highest = max(map(max, rows), default=0)
        if highest >= len(self.head_weight):
            raise BackboneError(f"{self.name}: token id {highest} has no embedding, there are {len(self.head_weight)}")
        h_LNd = np.empty((len(layers), len(rows), self.d), dtype=np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for batch in _batches(order, rows, ENCODE_TOKENS[self.device.type]):
            ids_BT, mask_BT = pad([rows[i] for i in batch], self.pad_id, "right")
            row_B, last_B = torch.arange(len(batch), device=self.device), (mask_BT.sum(1) - 1).to(self.device)
            h_LBTd = self.hidden_at_layers(layers, input_ids=ids_BT.to(self.device))
            h_LNd[:, batch] = np.stack([h_BTd[row_B, last_B].float().cpu().numpy() for h_BTd in h_LBTd])
        for h_Nd in h_LNd:
            check_finite(h_Nd, "re-encoded activations")
        return h_LNd

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens."""
        return self.tokenizer.decode(list(map(int, ids)), skip_special_tokens=True)

    def tokenize_text(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added."""
        return self.tokenizer(text, add_special_tokens=False).input_ids


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, T) int64, padded on ``side`` (``left`` or ``right``); T is at least 1."""
    width = max(1, max(len(r) for r in rows))
    ids_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids_BT[i, at] = torch.tensor(row, dtype=torch.long)
        mask_BT[i, at] = 1
    return ids_BT, mask_BT


def _batches(order: list[int], rows: list[list[int]], budget: int) -> Iterator[list[int]]:
    """Cut length-sorted indices into batches of at most ``budget`` padded tokens."""
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(rows[i]) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def check_finite(h_Nd: np.ndarray, what: str) -> None:
    """Raise ``BackboneError`` naming the first row that holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(h_Nd).all(axis=1))
    if len(bad):
        raise BackboneError(
            f"{what}: {len(bad)} of {len(h_Nd)} rows are not finite, the first is row {bad[0]}; try --dtype float32"
        )


def outside_ids(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    """Token ids of a text from outside, no special tokens added; ``where`` names it in errors.

    Raises ``ConfigError`` for a text that is not valid Unicode (a lone surrogate, bytes of another encoding), and for
    one that spells a special token: it would be read as a second BOS, or as an end.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        said = f"character {error.start + 1} is not valid Unicode ({text[error.start]!a})"
        raise ConfigError(f"{where}: {said}") from None
    ids = tokenizer(text, add_special_tokens=False).input_ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - {tokenizer.unk_token_id}
    spelled = [i for i in ids if i in special]
    if spelled:
        raise ConfigError(f"{where}: it spells the special token {tokenizer.decode(spelled[:1])!r}; leave it out")
    return ids
