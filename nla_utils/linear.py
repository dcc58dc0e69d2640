"""Streaming least squares: Y ≈ ȳ + (X − x̄) B from data that is seen once, chunk by chunk."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


class NormalEquations:
    """Sums from which B and the residual covariance follow in closed form.

    X (n, p) and Y (n, q) are added in chunks and never kept. Sums are float64, products within a chunk
    float32, so X and Y should come roughly centred; the exact means are taken out at the end.
    """

    def __init__(self, p: int, q: int):
        self.n = 0
        self.sum_x = torch.zeros(p, dtype=torch.float64)
        self.sum_y = torch.zeros(q, dtype=torch.float64)
        self.raw_xx = torch.zeros(p, p, dtype=torch.float64)
        self.raw_xy = torch.zeros(p, q, dtype=torch.float64)
        self.raw_yy = torch.zeros(q, q, dtype=torch.float64)

    def add(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Rows of X and Y."""
        self.raw_xx += (x_np.T @ x_np).cpu()
        self.add_all_but_xx(x_np, y_nq)

    def add_all_but_xx(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Rows of X and Y whose XᵀX the caller adds to ``raw_xx`` himself, having a cheaper way to it."""
        self.n += len(x_np)
        self.sum_x += x_np.sum(0).cpu().double()
        self.sum_y += y_nq.sum(0).cpu().double()
        self.raw_xy += (x_np.T @ y_nq).cpu()
        self.raw_yy += (y_nq.T @ y_nq).cpu()

    def leading(self, p: int) -> "NormalEquations":
        """The equations of the first p features alone; shares memory with these."""
        part = copy.copy(self)
        part.sum_x, part.raw_xx, part.raw_xy = self.sum_x[:p], self.raw_xx[:p, :p], self.raw_xy[:p]
        return part

    def beside(self) -> "NormalEquations":
        """Empty equations of another Y and the same X; ``raw_xx`` is shared memory, to be added to once."""
        other = NormalEquations(0, len(self.sum_y))
        other.sum_x, other.raw_xx = torch.zeros_like(self.sum_x), self.raw_xx
        other.raw_xy = torch.zeros_like(self.raw_xy)
        return other

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(B (p, q), intercept ȳ − x̄ B (q,)), with a penalty of ``ridge`` times the mean diagonal of XᵀX."""
        # At p = 18,432 (eight embeddings of Gemma-2-2B) each (p, p) is 2.7 GB, so none is made that can be spared.
        penalised_pp = torch.addr(self.raw_xx, self.sum_x, self.sum_x, alpha=-1 / self.n)
        penalised_pp.diagonal().add_(ridge * penalised_pp.diagonal().mean().clamp_min(1e-12))
        b_pq = torch.cholesky_solve(self._xy(), torch.linalg.cholesky(penalised_pp))
        return b_pq, (self.sum_y - self.sum_x @ b_pq) / self.n

    def residual_covariance(self, b_pq: Tensor, ridge: float) -> Tensor:
        """Covariance (q, q) of what is left of Y, with ``ridge`` times Y's mean variance added to the diagonal."""
        cross, sum_fitted = b_pq.T @ self._xy(), self.sum_x @ b_pq
        yy = torch.addr(self.raw_yy, self.sum_y, self.sum_y, alpha=-1 / self.n)
        fitted = torch.addr(b_pq.T @ (self.raw_xx @ b_pq), sum_fitted, sum_fitted, alpha=-1 / self.n)
        s = (yy - cross - cross.T + fitted) / self.n
        return s + ridge * yy.diagonal().mean() / self.n * torch.eye(len(s), dtype=torch.float64)

    def _xy(self) -> Tensor:
        """XᵀY (p, q), means taken out."""
        return torch.addr(self.raw_xy, self.sum_x, self.sum_y, alpha=-1 / self.n)


def sliding_gram(first_dp: Tensor, ends_pp: Tensor, n_sequences: int, before_d: Tensor) -> Tensor:
    """XᵀX (p, p) float64 of windows that slide over sequences, from its first d rows ``first_dp`` alone.

    A row of X is a window of p / d vectors of a sequence, the newest first, and each sequence has one row for each of
    its vectors. A block of XᵀX is then the one above it on the left, less the pairs of vectors that the ends of the
    sequences hold, plus those of ``before_d``, which stands before every sequence. ``ends_pp`` is XᵀX of the sequences'
    last rows alone, and is written over. Linear in the sums over sequences: made once, after the last of them.
    """
    d, p = first_dp.shape
    before_dd = n_sequences * torch.outer(before_d, before_d)
    row = first_dp
    for at in range(0, p, d):
        ends = ends_pp[at : at + d, at:].clone()
        ends_pp[at : at + d, at:] = row
        ends_pp[at:, at : at + d] = row.T
        row = (row - ends + before_dd.repeat(1, (p - at) // d))[:, : p - at - d]
    return ends_pp


def whitening(covariance_qq: Tensor) -> Tensor:
    """Λ^−½ Uᵀ (q, q) float32 of covariance = U Λ Uᵀ: rows times its transpose have unit covariance.

    Directions without variance (fewer samples than features) count as if they had the smallest that float32
    sums can tell from none.
    """
    variance_q, u_qq = torch.linalg.eigh(covariance_qq)
    variance_q = variance_q.clamp_min(1e-7 * variance_q.max())
    return (u_qq / variance_q.sqrt()).T.float()
