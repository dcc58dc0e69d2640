"""Token cross-entropy of a frozen head, without ever holding the logits of a whole batch."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from nla_utils.lm.cpu import head_product

# Below this many rows the two products are held up by reading the weight.
CHUNK_ROWS = 256


class _HeadCrossEntropy(torch.autograd.Function):
    """Sum of token cross-entropies, each times its share if there are shares; the gradient to the hidden states is made
    on the way forward.

    The head is frozen, so the only gradient is ∂/∂h = (softmax(z) − onehot(y)) W, which needs the
    logits z of one chunk of rows at a time and nothing of them later.
    """

    @staticmethod
    def forward(
        ctx, hidden_nd: Tensor, weight_Vd: Tensor, targets_n: Tensor, cap: Optional[float], share_n: Optional[Tensor]
    ):
        grad_nd = torch.empty_like(hidden_nd)
        total = hidden_nd.new_zeros((), dtype=torch.float32)
        buffer_CV = _buffer(hidden_nd, weight_Vd)
        for first in range(0, len(hidden_nd), CHUNK_ROWS):
            rows = slice(first, first + CHUNK_ROWS)
            logp_c, grad_cd = _chunk(hidden_nd[rows], weight_Vd, targets_n[rows], cap, buffer_CV)
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


def _buffer(hidden_nd: Tensor, weight_Vd: Tensor) -> Tensor:
    """Memory for the logits of one chunk, used again by every chunk."""
    return weight_Vd.new_empty(min(CHUNK_ROWS, len(hidden_nd)), len(weight_Vd))


def _logits(hidden_nd: Tensor, weight_Vd: Tensor, cap: Optional[float], buffer_CV: Tensor) -> Tensor:
    z_nV = head_product(hidden_nd, weight_Vd, buffer_CV[: len(hidden_nd)])
    return z_nV if cap is None else z_nV.div_(cap).tanh_().mul_(cap)


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


def _chunk(hidden_nd: Tensor, weight_Vd: Tensor, y_n: Tensor, cap: Optional[float], buffer_CV: Tensor):
    z_nV = _logits(hidden_nd, weight_Vd, cap, buffer_CV)
    slope_nV = None if cap is None else 1 - (z_nV / cap) ** 2
    logp_n, norm_n = _log_likelihood(z_nV, y_n)
    target_nd = weight_Vd[y_n].float()
    if slope_nV is not None:
        z_nV.mul_(slope_nV)
        target_nd = target_nd * slope_nV.gather(1, y_n[:, None]).float()
    grad_nd = (z_nV @ weight_Vd).float() / norm_n[:, None] - target_nd
    return logp_n, grad_nd


def head_cross_entropy(
    hidden_nd: Tensor, weight_Vd: Tensor, targets_n: Tensor, cap: Optional[float] = None, share_n: Optional[Tensor] = None
) -> Tensor:
    """Mean token cross-entropy (nats) of a frozen linear head.

    Args:
        hidden_nd: final hidden states, contiguous, one row a token.
        weight_Vd: the head's weight; gets no gradient.
        targets_n: token ids (int64).
        cap: Gemma-2's soft cap on the logits, or ``None``.
        share_n: what each token counts, in place of 1/n.
    """
    on = weight_Vd.device
    total = _HeadCrossEntropy.apply(hidden_nd.to(on), weight_Vd, targets_n.to(on), cap, share_n)
    return total / len(hidden_nd) if share_n is None else total


@torch.inference_mode()
def head_logprobs(
    hidden_nd: Tensor, weight_Vd: Tensor, targets_n: Tensor, cap: Optional[float] = None
) -> Tensor:
    """log p(target) (n,) under the whole vocabulary's softmax at temperature 1, chunk by chunk."""
    given, on = hidden_nd.device, weight_Vd.device
    hidden_nd, targets_n = hidden_nd.to(on), targets_n.to(on)
    buffer_CV, found = _buffer(hidden_nd, weight_Vd), []
    for first in range(0, len(hidden_nd), CHUNK_ROWS):
        rows = slice(first, first + CHUNK_ROWS)
        z_nV = _logits(hidden_nd[rows], weight_Vd, cap, buffer_CV)
        found.append(_log_likelihood(z_nV, targets_n[rows])[0])
    return torch.cat(found).to(given)
