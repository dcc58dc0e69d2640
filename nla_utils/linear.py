"""Streaming least squares: Y ≈ ȳ + (X − x̄) B from data that is seen once, chunk by chunk."""

from __future__ import annotations

import copy
from typing import Optional

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

    def add(self, x_np: Tensor, y_nq: Tensor, xx_pp: Optional[Tensor] = None) -> None:
        """Rows of X and Y; ``xx_pp`` is XᵀX where the caller has a cheaper way to it."""
        self.n += len(x_np)
        self.sum_x += x_np.sum(0).cpu().double()
        self.sum_y += y_nq.sum(0).cpu().double()
        self.raw_xx += (x_np.T @ x_np).cpu().double() if xx_pp is None else xx_pp
        self.raw_xy += (x_np.T @ y_nq).cpu().double()
        self.raw_yy += (y_nq.T @ y_nq).cpu().double()

    def leading(self, p: int) -> "NormalEquations":
        """The equations of the first p features alone; shares memory with these."""
        part = copy.copy(self)
        part.sum_x, part.raw_xx, part.raw_xy = self.sum_x[:p], self.raw_xx[:p, :p], self.raw_xy[:p]
        return part

    @property
    def xx(self) -> Tensor:
        return self.raw_xx - torch.outer(self.sum_x, self.sum_x) / self.n

    @property
    def xy(self) -> Tensor:
        return self.raw_xy - torch.outer(self.sum_x, self.sum_y) / self.n

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(B (p, q), intercept ȳ − x̄ B (q,)), with a penalty of ``ridge`` times the mean diagonal of XᵀX."""
        # A matrix of its own: at p = 18,432 (eight embeddings of Gemma-2-2B) each copy is 2.7 GB.
        penalised_pp = self.xx
        penalised_pp.diagonal().add_(ridge * penalised_pp.diagonal().mean().clamp_min(1e-12))
        b_pq = torch.cholesky_solve(self.xy, torch.linalg.cholesky(penalised_pp))
        return b_pq, (self.sum_y - self.sum_x @ b_pq) / self.n

    def residual_covariance(self, b_pq: Tensor, ridge: float) -> Tensor:
        """Covariance (q, q) of what is left of Y, with ``ridge`` times Y's mean variance added to the diagonal."""
        cross = b_pq.T @ self.xy
        yy = self.raw_yy - torch.outer(self.sum_y, self.sum_y) / self.n
        s = (yy - cross - cross.T + b_pq.T @ (self.xx @ b_pq)) / self.n
        return s + ridge * yy.diagonal().mean() / self.n * torch.eye(len(s), dtype=torch.float64)


def sliding_gram(x_np: Tensor, last_Bp: Tensor, before_d: Tensor) -> Tensor:
    """XᵀX (p, p) float64 of windows that slide over sequences, from its first d rows alone.

    A row of X is a window of p / d vectors of a sequence, the newest first, and each sequence has one row for each of
    its vectors. A block of XᵀX is then the one above it on the left, less the pairs of vectors that the ends of the
    sequences hold, ``last_Bp`` being their last rows, plus those of ``before_d``, which stands before every sequence.
    """
    d, p = len(before_d), x_np.shape[1]
    xx_pp = torch.empty(p, p, dtype=torch.float64)
    xx_pp[:d] = x_np[:, :d].T @ x_np
    change_pp = (len(last_Bp) * torch.outer(before_d, before_d)).repeat(p // d, p // d) - last_Bp.T @ last_Bp
    change_pp = change_pp.cpu().double()
    for at in range(d, p, d):
        above = slice(at - d, at), slice(at - d, p - d)
        xx_pp[at : at + d, at:] = xx_pp[above] + change_pp[above]
        xx_pp[at:, at - d : at] = xx_pp[at - d : at, at:].T
    return xx_pp


def whitening(covariance_qq: Tensor) -> Tensor:
    """Λ^−½ Uᵀ (q, q) float32 of covariance = U Λ Uᵀ: rows times its transpose have unit covariance.

    Directions without variance (fewer samples than features) count as if they had the smallest that float32
    sums can tell from none.
    """
    variance_q, u_qq = torch.linalg.eigh(covariance_qq)
    variance_q = variance_q.clamp_min(1e-7 * variance_q.max())
    return (u_qq / variance_q.sqrt()).T.float()
