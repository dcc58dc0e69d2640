"""What a tail reader is solved from: sums over every position of the training sequences, of one or many layers at once.

The features are the embeddings of the last n tokens. They do not depend on the layer, so neither does XᵀX: a pass that
takes the activations of all layers along gives the sums of all their readers.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.baselines import NormalEquations, embedding_mean, tail_features, token_counts
from nla_utils.lm.backbone import Backbone
from nla_utils.store import Progress
from nla_utils.targets import Targets

FIT_TOKENS = 4096


class ReaderEquations(NormalEquations):
    """Normal equations that also keep YᵀY, from which the covariance of what is left of Y follows."""

    def __init__(self, p: int, q: int):
        super().__init__(p, q)
        self.raw_yy = torch.zeros(q, q, dtype=torch.float64)

    def add_all_but_xx(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Add rows of X and Y whose XᵀX the caller adds to ``raw_xx``, having a cheaper way to it."""
        super().add_all_but_xx(x_np, y_nq)
        self.raw_yy += (y_nq.T @ y_nq).cpu()

    def leading(self, p: int) -> "ReaderEquations":
        """The equations of the first p features alone; shares memory with these."""
        part = copy.copy(self)
        part.sum_x, part.raw_xx, part.raw_xy = self.sum_x[:p], self.raw_xx[:p, :p], self.raw_xy[:p]
        return part

    def beside(self) -> "ReaderEquations":
        """Empty equations of another Y and the same X; ``raw_xx`` is shared memory, to be added to once."""
        other = ReaderEquations(0, len(self.sum_y))
        other.sum_x, other.raw_xx = torch.zeros_like(self.sum_x), self.raw_xx
        other.raw_xy = torch.zeros_like(self.raw_xy)
        return other

    def residual_covariance(self, b_pq: Tensor, ridge: float) -> Tensor:
        """Covariance (q, q) of what is left of Y, with ``ridge`` times Y's mean variance added to the diagonal."""
        cross, sum_fitted = b_pq.T @ self.xy(), self.sum_x @ b_pq
        yy = torch.addr(self.raw_yy, self.sum_y, self.sum_y, alpha=-1 / self.n)
        fitted = torch.addr(b_pq.T @ (self.raw_xx @ b_pq), sum_fitted, sum_fitted, alpha=-1 / self.n)
        s = (yy - cross - cross.T + fitted) / self.n
        return s + ridge * yy.diagonal().mean() / self.n * torch.eye(len(s), dtype=torch.float64)


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


@dataclass
class ReaderSums:
    """What a reader of n tokens is solved from: the normal equations of v on its last n embeddings, with the vectors
    that v (d,) and the embeddings (d,) were roughly centred by, and the token counts (V,)."""

    n: int
    equations: ReaderEquations
    mean_d: Tensor
    embedding_mean_d: Tensor
    counts_V: np.ndarray

    def features(self, table_Vd: Tensor, ids_nj: Tensor) -> Tensor:
        """Centred embeddings (n, j · d) of the tokens up to each position, the last first."""
        return table_Vd[ids_nj.to(table_Vd.device)].float().sub_(self.embedding_mean_d).flatten(1)

    def beside(self, mean_d: Tensor) -> "ReaderSums":
        """Empty sums for the v of another layer at the same tokens, whose XᵀX are these ones'."""
        equations = self.equations.beside()
        return dataclasses.replace(self, equations=equations, mean_d=mean_d, counts_V=np.zeros_like(self.counts_V))


def empty_sums(backbone: Backbone, targets: Targets, rows: np.ndarray, n: int) -> ReaderSums:
    """Sums of nothing, roughly centred for sequences like those of the rows."""
    table_Vd = backbone.embedding_table()
    counts_V = token_counts(targets, rows, table_Vd)
    mean_d = torch.from_numpy(targets.v[rows].mean(axis=0)).to(backbone.device)
    equations = ReaderEquations(n * backbone.d, backbone.d)
    return ReaderSums(n, equations, mean_d, embedding_mean(table_Vd, counts_V), np.zeros_like(counts_V))


def sums_at_layers(
    backbone: Backbone, targets_of: Mapping[int, Targets], rows: np.ndarray, n: int
) -> dict[int, ReaderSums]:
    """Sums over every position of the rows, for the v of several layers; XᵀX is of the tokens alone, and shared."""
    (layer, targets), *others = targets_of.items()
    sums_of = {layer: empty_sums(backbone, targets, rows, n)}
    for other, own in others:
        mean_d = torch.from_numpy(own.v[rows].mean(axis=0)).to(backbone.device)
        sums_of[other] = sums_of[layer].beside(mean_d)
    _add_rows(sums_of, backbone, targets, rows)
    return sums_of


def leading(sums: ReaderSums, n: int) -> ReaderSums:
    """The sums of a reader of fewer tokens, which are part of those of a longer one."""
    return dataclasses.replace(sums, n=n, equations=sums.equations.leading(n * len(sums.mean_d)))


def add_rows(sums: ReaderSums, backbone: Backbone, targets: Targets, rows: np.ndarray) -> ReaderSums:
    """One forward pass over the rows, every position of them added to the sums; returns them."""
    _add_rows({backbone.layer: sums}, backbone, targets, rows)
    return sums


@torch.inference_mode()
def _add_rows(sums_of: dict[int, ReaderSums], backbone: Backbone, targets: Targets, rows: np.ndarray) -> None:
    """The same for the sums of several layers, which share XᵀX."""
    table_Vd, sums, d = backbone.embedding_table(), next(iter(sums_of.values())), backbone.d
    counts_V = token_counts(targets, rows, table_Vd)
    first_dp, ends = torch.zeros(d, sums.n * d, dtype=torch.float64), []
    per_batch = max(1, FIT_TOKENS // (targets.ids.shape[1] + 1))
    with Progress(total=len(rows), desc="fitting the reader", unit="seq") as bar:
        for first in range(0, len(rows), per_batch):
            chosen = rows[first : first + per_batch]
            v_Lnd, row_n, position_n = every_position(backbone, targets, chosen, list(sums_of))
            ids_nj = torch.from_numpy(tail_features(targets.ids, row_n, position_n, sums.n, backbone.start_id))
            x_np = sums.features(table_Vd, ids_nj)
            for own, v_nd in zip(sums_of.values(), v_Lnd):
                own.equations.add_all_but_xx(x_np, v_nd - own.mean_d)
            first_dp += (x_np[:, :d].T @ x_np).cpu()
            ends.append(ids_nj[torch.from_numpy(position_n == targets.lengths[row_n])])
            bar.update(len(chosen))
    start_d = sums.features(table_Vd, torch.tensor([[backbone.start_id]]))[0].cpu().double()
    sums.equations.raw_xx += sliding_gram(first_dp, _gram(sums, table_Vd, torch.cat(ends)), len(rows), start_d)
    for own in sums_of.values():
        own.counts_V += counts_V


def _gram(sums: ReaderSums, table_Vd: Tensor, ids_nj: Tensor) -> Tensor:
    """XᵀX (p, p) float64 of the features of some tails."""
    gram_pp = torch.zeros_like(sums.equations.raw_xx)
    for part in ids_nj.split(FIT_TOKENS):
        x_np = sums.features(table_Vd, part)
        gram_pp += (x_np.T @ x_np).cpu()
    return gram_pp


def every_position(
    backbone: Backbone, targets: Targets, rows: np.ndarray, layers: Sequence[int]
) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """v (n, d) float32 of each layer at each generated token of the rows, its row, and its position (1 = first)."""
    lengths = targets.lengths[rows]
    ids_BT = torch.from_numpy(targets.ids[rows, : lengths.max()].astype(np.int64))
    ids_BT = torch.cat([torch.full((len(rows), 1), backbone.start_id), ids_BT], dim=1).to(backbone.device)
    h_LBTd = backbone.hidden_at_layers(layers, input_ids=ids_BT)
    valid_BT = np.arange(1, ids_BT.shape[1])[None] <= lengths[:, None]
    at_row, at = np.nonzero(valid_BT)
    valid = torch.from_numpy(valid_BT).to(backbone.device)
    return [h_BTd[:, 1:][valid].float() for h_BTd in h_LBTd], rows[at_row], at + 1
