"""The tail reader: a verbalizer in closed form that writes the last n tokens from v.

The layer's activation is modelled as linear in the embeddings e of the last n tokens, with Gaussian noise:

    v = μ + Σ_j A_j (e(x₋ⱼ) − ē) + ε,   ε ~ N(0, Σ)

fitted by least squares on every position of the training sequences: those before the last are activations too. A text
is read backwards, the last token first: each step takes the token that is likeliest given v and the tokens behind it
(Bayes' rule with a unigram prior). No gradient step, no sampling from the language model, no text is re-encoded to
choose (PROTOCOL.md §7 ``one_span``). XᵀX is the same at every layer: one pass fits the readers of several layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.baselines import NormalEquations, embedding_mean, fit_spec, fit_split, tail_features, token_counts
from nla_utils.config import TAIL_TOKENS
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import choose, uniforms
from nla_utils.metrics import fve
from nla_utils.run import Run
from nla_utils.store import SPECS, Progress
from nla_utils.targets import Targets

ARTEFACT = "reader"
RIDGES = (1e-4, 1e-3, 1e-2)
# Candidates are found in the backbone's dtype and scored again in float32.
CANDIDATES = 64
PSEUDO_COUNT = 0.1
TOP_K = 50
# Tokens that one batch of the fit holds.
FIT_TOKENS = 4096
SPECS[ARTEFACT] = lambda config: {
    **fit_spec(config),
    "ridges": RIDGES,
    "pseudo_count": PSEUDO_COUNT,
    "candidates": CANDIDATES,
    "pool_size": config.sizes.pool_size,
}


@dataclass
class TailReader:
    """What :func:`fit_reader` solves for, on the backbone's device.

    ``weights_nad`` (n, d_embedding, d): A_j with the whitening applied, j = 1 the last token. ``whiten_dd``
    (d, d), ``mean_d`` (d,) of v, ``embedding_mean_d``, ``log_prior_V`` of the training tokens,
    ``half_norm_nV``: ½‖A_j (e(x) − ē)‖² of every token; ``ends_V``: the EOS tokens, which only stand last.
    """

    weights_nad: Tensor
    whiten_dd: Tensor
    mean_d: Tensor
    embedding_mean_d: Tensor
    log_prior_V: Tensor
    half_norm_nV: Tensor
    ends_V: Tensor
    table_Vd: Tensor

    @property
    def n(self) -> int:
        return len(self.weights_nad)

    def first_residual(self, v_Md: np.ndarray | Tensor) -> Tensor:
        """Whitened v (M, d): what the tokens have to explain."""
        return (torch.as_tensor(v_Md, device=self.mean_d.device).float() - self.mean_d) @ self.whiten_dd.T

    def explained(self, j: int, ids_M: Tensor) -> Tensor:
        """What token −(j+1) adds to the whitened v (M, d)."""
        return (self.table_Vd[ids_M].float() - self.embedding_mean_d) @ self.weights_nad[j]

    def candidates(self, j: int, residual_Md: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens at −(j+1) and their log-posteriors up to a constant, best first, (M, k)."""
        # The mean embedding adds the same to every token's score and is left out.
        query_Ma = residual_Md @ self.weights_nad[j].T
        constant_V = self.log_prior_V - self.half_norm_nV[j]
        rough_MV = (query_Ma.to(self.table_Vd.dtype) @ self.table_Vd.T).float() + constant_V
        if j > 0:
            rough_MV = rough_MV.masked_fill(self.ends_V, -torch.inf)
        ids_Mk = rough_MV.topk(min(CANDIDATES, rough_MV.shape[1])).indices
        score_Mk = torch.einsum("ma,mka->mk", query_Ma, self.table_Vd[ids_Mk].float()) + constant_V[ids_Mk]
        best = score_Mk.topk(min(k, score_Mk.shape[1]))
        return ids_Mk.gather(1, best.indices), best.values


def reader_from(tensors: Mapping[str, np.ndarray], backbone: Backbone) -> TailReader:
    """The reader on the backbone's device, with the backbone's embedding table."""
    names = ("weights", "whiten", "mean", "embedding_mean", "log_prior", "half_norm")
    arrays = [torch.from_numpy(np.array(tensors[name])).to(backbone.device) for name in names]
    table_Vd = backbone.embedding_table()
    ends_V = torch.zeros(len(table_Vd), dtype=torch.bool, device=backbone.device)
    ends_V[list(backbone.eos_ids)] = True
    return TailReader(*arrays, ends_V, table_Vd)


def load_reader(run: Run) -> TailReader:
    """The fitted reader of a run; raises ``ArtefactError`` if there is none."""
    return reader_from(run.folder.load(ARTEFACT).tensors, run.backbone)


def read_greedy(reader: TailReader, v_Md: np.ndarray | Tensor) -> Tensor:
    """The likeliest tail, token by token from the last to the first, (M, n) in reading order."""
    return read_tails(reader, v_Md, 0)[0][:, 0]


@torch.inference_mode()
def read_tails(
    reader: TailReader, v_Md: np.ndarray | Tensor, k: int, streams_B: Optional[np.ndarray] = None
) -> tuple[Tensor, Tensor]:
    """The likeliest tail of each v and k drawn ones (M, 1 + k, n) in reading order, and their mean token
    log-probabilities (M, 1 + k). Tokens are drawn from the posterior over the 50 likeliest, as the language model's own
    sampler does; each tail has a random stream, which the likeliest alone (``k`` 0) need not."""
    v_Bd = torch.as_tensor(v_Md, device=reader.mean_d.device).repeat_interleave(k + 1, dim=0)
    uniform_Bn = torch.zeros(len(v_Bd), reader.n) if streams_B is None else uniforms(streams_B, reader.n)
    uniform_Bn = uniform_Bn.to(v_Bd.device)
    greedy_B1 = (torch.arange(len(v_Bd), device=v_Bd.device) % (k + 1) == 0)[:, None]
    residual_Bd, tokens, logp_B = reader.first_residual(v_Bd), [], 0.0
    for j in range(reader.n):
        ids_Bk, score_Bk = reader.candidates(j, residual_Bd, TOP_K)
        logp_Bk = torch.log_softmax(score_Bk, dim=1)
        # Candidates come best first.
        choice_B1 = choose(logp_Bk, ids_Bk, uniform_Bn[:, j]).masked_fill(greedy_B1, 0)
        tokens.append(ids_Bk.gather(1, choice_B1)[:, 0])
        logp_B = logp_B + logp_Bk.gather(1, choice_B1)[:, 0]
        residual_Bd = residual_Bd - reader.explained(j, tokens[-1])
    ids_Bn, shape = torch.stack(tokens[::-1], dim=1).cpu(), (len(v_Md), k + 1)
    return ids_Bn.reshape(*shape, reader.n), (logp_B / reader.n).cpu().reshape(shape)


def fit_reader(run: Run, targets: Targets) -> TailReader:
    """The reader fitted on every position of the training rows, or what is on disk; ridge chosen on validation."""
    fit_readers([(run, targets)])
    return load_reader(run)


def fit_readers(at_layers: Sequence[tuple[Run, Targets]]) -> None:
    """Fit the readers of several layers, unless they are there, from one pass over the sequences, which they share;
    ``at_layers`` holds the run at each layer, in whose folder that layer's reader is kept, and its targets."""
    missing = [(run, targets) for run, targets in at_layers if not run.folder.has(ARTEFACT)]
    if not missing:
        return
    train, validation = fit_split(*missing[0])
    at = {run.backbone.layer: targets for run, targets in missing}
    sums_of = sums_at_layers(missing[0][0].backbone, at, train, TAIL_TOKENS)
    for run, targets in Progress(missing, desc="solving for the reader", unit="layer"):
        sums = sums_of[run.backbone.layer]
        tensors, trials = best_ridge(run.backbone, sums, targets, validation)
        run.folder.save(
            ARTEFACT,
            tensors,
            made_from={"targets": targets.sha256},
            tail_tokens=TAIL_TOKENS,
            train_positions=sums.n,
            train_rows=len(train),
            trials=trials,
        )


def describe(run: Run) -> dict:
    """How the run's reader was fitted."""
    sidecar = run.folder.sidecar(ARTEFACT)
    return {k: sidecar[k] for k in ("tail_tokens", "train_rows", "train_positions", "trials")}


def best_ridge(
    backbone: Backbone, sums: ReaderSums, targets: Targets, validation: np.ndarray
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The arrays of the reader whose greedy texts score highest, centred, on the validation rows; all trials."""
    v_Md, solved, trials = targets.v[validation], [], []
    for ridge in RIDGES:
        solved.append(solve_reader(backbone, sums, ridge))
        h = backbone.encode(read_greedy(reader_from(solved[-1], backbone), v_Md).tolist(), start=True)
        trials.append({"ridge": ridge, "fve_nrm_cen": float(fve(h, v_Md, targets.mu).mean())})
    best = max(range(len(RIDGES)), key=lambda i: trials[i]["fve_nrm_cen"])
    return solved[best], trials


def solve_reader(backbone: Backbone, sums: ReaderSums, ridge: float) -> dict[str, np.ndarray]:
    """The arrays of a :class:`TailReader` for one ridge strength, all n positions in one solve."""
    b_pd, intercept_d = sums.solve(ridge)
    whiten_dd = whitening(sums.residual_covariance(b_pd, ridge))
    weights_nad = (b_pd.float() @ whiten_dd.T).reshape(sums.n_tokens, backbone.d, backbone.d)
    counts_V = sums.counts_V + PSEUDO_COUNT
    log_prior_V = np.log(counts_V / counts_V.sum())
    log_prior_V[[i for i in (backbone.start_id, backbone.pad_id) if i not in backbone.eos_ids]] = -1e9
    return {
        "weights": weights_nad.numpy(),
        "whiten": whiten_dd.numpy(),
        "mean": (sums.mean_d.cpu() + intercept_d).float().numpy(),
        "embedding_mean": sums.embedding_mean_d.cpu().numpy(),
        "log_prior": log_prior_V.astype(np.float32),
        "half_norm": half_norms(backbone.embedding_table(), weights_nad, sums.embedding_mean_d).cpu().numpy(),
    }


@torch.inference_mode()
def half_norms(table_Vd: Tensor, weights_nad: Tensor, embedding_mean_d: Tensor) -> Tensor:
    """½‖(e(x) − ē) A_j‖² of every token (n, V)."""
    norms = []
    for weight_ad in weights_nad.to(table_Vd.device):
        parts = ((t.float() - embedding_mean_d) @ weight_ad for t in table_Vd.split(16384))
        norms.append(torch.cat([0.5 * part.square().sum(dim=1) for part in parts]))
    return torch.stack(norms)


def whitening(covariance_qq: Tensor) -> Tensor:
    """Λ^−½ Uᵀ (q, q) float32 of covariance = U Λ Uᵀ: rows times its transpose have unit covariance."""
    variance_q, u_qq = torch.linalg.eigh(covariance_qq)
    # Directions without variance (fewer samples than features) get the least that float32 sums can tell from none.
    variance_q = variance_q.clamp_min(1e-7 * variance_q.max())
    return (u_qq / variance_q.sqrt()).T.float()


class ReaderSums(NormalEquations):
    """The normal equations of v on its last n embeddings, with YᵀY, from which the covariance of what is left of v
    follows. ``mean_d`` and ``embedding_mean_d`` (d,) roughly centre v and the embeddings; ``counts_V`` is of tokens."""

    def __init__(self, n_tokens: int, mean_d: Tensor, embedding_mean_d: Tensor, vocabulary: int):
        super().__init__(n_tokens * len(embedding_mean_d), len(mean_d))
        self.n_tokens, self.mean_d, self.embedding_mean_d = n_tokens, mean_d, embedding_mean_d
        self.raw_yy = torch.zeros(len(mean_d), len(mean_d), dtype=torch.float64)
        self.counts_V = np.zeros(vocabulary, dtype=np.int64)

    def add(self, x_np: Tensor, y_nq: Tensor, with_xx: bool = True) -> None:
        super().add(x_np, y_nq, with_xx)
        self.raw_yy += (y_nq.T @ y_nq).cpu()

    def features(self, table_Vd: Tensor, ids_nj: Tensor) -> Tensor:
        """Centred embeddings (n, j · d) of the tokens up to each position, the last first."""
        return table_Vd[ids_nj.to(table_Vd.device)].float().sub_(self.embedding_mean_d).flatten(1)

    def leading(self, n_tokens: int) -> ReaderSums:
        """The sums of a reader of fewer tokens, which are part of these; shares memory with them."""
        part, p = copy.copy(self), n_tokens * len(self.embedding_mean_d)
        part.n_tokens = n_tokens
        part.sum_x, part.raw_xx, part.raw_xy = self.sum_x[:p], self.raw_xx[:p, :p], self.raw_xy[:p]
        return part

    def beside(self, mean_d: Tensor) -> ReaderSums:
        """Empty sums for the v of another layer at the same tokens; ``raw_xx`` is shared, to be added to once."""
        other = ReaderSums(0, mean_d, self.embedding_mean_d, len(self.counts_V))
        other.n_tokens, other.raw_xx = self.n_tokens, self.raw_xx
        other.sum_x, other.raw_xy = torch.zeros_like(self.sum_x), torch.zeros_like(self.raw_xy)
        return other

    def residual_covariance(self, b_pq: Tensor, ridge: float) -> Tensor:
        """Covariance (q, q) of what is left of Y, with ``ridge`` times Y's mean variance added to the diagonal."""
        cross, sum_fitted = b_pq.T @ self.xy(), self.sum_x @ b_pq
        yy = torch.addr(self.raw_yy, self.sum_y, self.sum_y, alpha=-1 / self.n)
        fitted = torch.addr(b_pq.T @ (self.raw_xx @ b_pq), sum_fitted, sum_fitted, alpha=-1 / self.n)
        s = (yy - cross - cross.T + fitted) / self.n
        return s + ridge * yy.diagonal().mean() / self.n * torch.eye(len(s), dtype=torch.float64)


def empty_sums(backbone: Backbone, targets: Targets, rows: np.ndarray, n: int) -> ReaderSums:
    """Sums of nothing, roughly centred for sequences like those of the rows."""
    table_Vd = backbone.embedding_table()
    mean_d = torch.from_numpy(targets.v[rows].mean(axis=0)).to(backbone.device)
    return ReaderSums(n, mean_d, embedding_mean(table_Vd, token_counts(targets, rows, table_Vd)), len(table_Vd))


def sums_at_layers(
    backbone: Backbone, targets_of: Mapping[int, Targets], rows: np.ndarray, n: int
) -> dict[int, ReaderSums]:
    """Sums over every position of the rows, for the v of several layers; XᵀX is of the tokens alone, and shared."""
    (layer, targets), *others = targets_of.items()
    sums_of = {layer: empty_sums(backbone, targets, rows, n)}
    for other, own in others:
        sums_of[other] = sums_of[layer].beside(torch.from_numpy(own.v[rows].mean(axis=0)).to(backbone.device))
    add_rows(sums_of, backbone, targets, rows)
    return sums_of


@torch.inference_mode()
def add_rows(sums_of: Mapping[int, ReaderSums], backbone: Backbone, targets: Targets, rows: np.ndarray) -> None:
    """One forward pass over the rows, every position of them added to the sums of each layer, which share XᵀX."""
    table_Vd, sums, d = backbone.embedding_table(), next(iter(sums_of.values())), backbone.d
    counts_V = token_counts(targets, rows, table_Vd)
    first_dp, ends = torch.zeros(d, sums.n_tokens * d, dtype=torch.float64), []
    per_batch = max(1, FIT_TOKENS // (targets.ids.shape[1] + 1))
    with Progress(total=len(rows), desc="fitting the reader", unit="seq") as bar:
        for first in range(0, len(rows), per_batch):
            chosen = rows[first : first + per_batch]
            v_Lnd, row_n, position_n = every_position(backbone, targets, chosen, list(sums_of))
            ids_nj = tail_features(targets.ids, row_n, position_n, sums.n_tokens, backbone.start_id)
            x_np = sums.features(table_Vd, torch.from_numpy(ids_nj))
            for own, v_nd in zip(sums_of.values(), v_Lnd):
                own.add(x_np, v_nd - own.mean_d, with_xx=False)
            first_dp += (x_np[:, :d].T @ x_np).cpu()
            ends.append(torch.from_numpy(ids_nj[position_n == targets.lengths[row_n]]))
            bar.update(len(chosen))
    ends_pp = torch.zeros_like(sums.raw_xx)
    for part in torch.cat(ends).split(FIT_TOKENS):
        x_np = sums.features(table_Vd, part)
        ends_pp += (x_np.T @ x_np).cpu()
    start_d = sums.features(table_Vd, torch.tensor([[backbone.start_id]]))[0].cpu().double()
    sums.raw_xx += sliding_gram(first_dp, ends_pp, len(rows), start_d)
    for own in sums_of.values():
        own.counts_V += counts_V


def sliding_gram(first_dp: Tensor, ends_pp: Tensor, n_sequences: int, before_d: Tensor) -> Tensor:
    """XᵀX (p, p) float64 of windows that slide over sequences, from its first d rows ``first_dp`` alone.

    A row of X is a window of p / d vectors of a sequence, the newest first, and each sequence has one row for each of
    its vectors. A block of XᵀX is then the one above it on the left, less the pairs of vectors that the ends of the
    sequences hold, plus those of ``before_d``, which is before every sequence. ``ends_pp``, XᵀX of the sequences' last
    rows alone, is written over.
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
