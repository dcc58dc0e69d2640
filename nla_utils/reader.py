"""The tail reader: a verbalizer in closed form that writes the last n tokens from v.

The layer's activation is modelled as linear in the embeddings e of the last n tokens, with Gaussian noise:

    v = μ + Σ_j A_j (e(x₋ⱼ) − ē) + ε,   ε ~ N(0, Σ)

fitted by least squares on every position of the training sequences: the positions before the last one are
activations too, and cost one forward pass. A text is read backwards, the last token first: each step takes
the token that is likeliest given v and the tokens behind it (Bayes' rule with a unigram prior). No gradient
step, no sampling from the language model, no text is re-encoded to choose (PROTOCOL.md §7 ``one_span``).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nla_utils.backbone import Backbone
from nla_utils.config import VALIDATION_SHARE, RunConfig
from nla_utils.linear import NormalEquations, sliding_gram, whitening
from nla_utils.metrics import fve
from nla_utils.progress import Progress
from nla_utils.store import RunFolder, derive_seed
from nla_utils.targets import Targets

ARTEFACT = "reader"
TAIL_TOKENS = 8
RIDGES = (1e-4, 1e-3, 1e-2)
# Candidates are found in the backbone's dtype and scored again in float32.
CANDIDATES = 64
FIT_TOKENS = 4096
PSEUDO_COUNT = 0.1
TOP_K = 50


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

    def first_residual(self, v_Md: Tensor) -> Tensor:
        """Whitened v (M, d): what the tokens have to explain."""
        return (v_Md.float() - self.mean_d) @ self.whiten_dd.T

    def explained(self, j: int, ids_M: Tensor) -> Tensor:
        """What token −(j+1) adds to the whitened v (M, d)."""
        return (self.table_Vd[ids_M].float() - self.embedding_mean_d) @ self.weights_nad[j]

    def with_weights(self, weights_nad: Tensor) -> "TailReader":
        """The same reader with other whitened A_j."""
        half_norm_nV = torch.stack([half_norms(self.table_Vd, w, self.embedding_mean_d) for w in weights_nad])
        return dataclasses.replace(self, weights_nad=weights_nad, half_norm_nV=half_norm_nV)

    def candidates(self, j: int, residual_Md: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens at −(j+1) and their log-posteriors up to a constant, best first, (M, k).

        The mean embedding adds the same to every token's score and is left out.
        """
        query_Ma = residual_Md @ self.weights_nad[j].T
        constant_V = self.log_prior_V - self.half_norm_nV[j]
        rough_MV = (query_Ma.to(self.table_Vd.dtype) @ self.table_Vd.T).float() + constant_V
        if j > 0:
            rough_MV = rough_MV.masked_fill(self.ends_V, -torch.inf)
        ids_Mk = rough_MV.topk(min(CANDIDATES, rough_MV.shape[1])).indices
        score_Mk = torch.einsum("ma,mka->mk", query_Ma, self.table_Vd[ids_Mk].float()) + constant_V[ids_Mk]
        best = score_Mk.topk(min(k, score_Mk.shape[1]))
        return ids_Mk.gather(1, best.indices), best.values


def tail_features(ids_NT: np.ndarray, rows: np.ndarray, positions: np.ndarray, n: int, start_id: int) -> np.ndarray:
    """Token ids (len(rows), n): the n tokens up to each position, the last first, padded by the start token."""
    at = positions[:, None] - np.arange(1, n + 1)
    return np.where(at >= 0, ids_NT[rows[:, None], np.maximum(at, 0)], start_id)


def reader_split(run: RunConfig, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows): the held-out targets are in neither."""
    rng = np.random.default_rng(derive_seed(run.seed, "reader split", 0))
    order = rng.permutation(len(targets.v) - targets.n_eval)
    n_val = min(run.sizes.n_validate, max(2, round(VALIDATION_SHARE * len(order))))
    return np.sort(order[n_val:]), np.sort(order[:n_val])


def fit_reader(run: RunConfig, backbone: Backbone, targets: Targets, folder: RunFolder) -> TailReader:
    """Fit on every position of the training rows, or load what is whole; ridge chosen on validation."""
    if folder.has(ARTEFACT):
        return load_reader(backbone, folder)
    n = min(TAIL_TOKENS, run.sizes.max_new_tokens)
    train, validation = reader_split(run, targets)
    sums = accumulate(backbone, targets, train, n)
    tensors, trials = best_ridge(backbone, sums, targets, validation)
    folder.save(
        ARTEFACT, tensors, made_from={"targets": targets.sha256}, seed=run.seed, tail_tokens=n,
        train_positions=sums.equations.n, train_rows=len(train), validation_rows=validation.tolist(), trials=trials,
    )  # fmt: skip
    return reader_from(tensors, backbone)


def best_ridge(
    backbone: Backbone, sums: ReaderSums, targets: Targets, validation: np.ndarray
) -> tuple[dict[str, np.ndarray], list[dict]]:
    """The arrays of the reader whose greedy texts score highest, centred, on the validation rows; all trials."""
    v_Md = torch.from_numpy(targets.v[validation]).to(backbone.device)
    best, trials = None, []
    for ridge in RIDGES:
        tensors = solve_reader(backbone, sums, ridge)
        h = backbone.encode(read_greedy(reader_from(tensors, backbone), v_Md).tolist(), start=True)
        score = float(fve(h, targets.v[validation], targets.mu).mean())
        trials.append({"ridge": ridge, "fve_nrm_cen": score})
        if best is None or score > best[0]:
            best = (score, tensors)
    return best[1], trials


def load_reader(backbone: Backbone, folder: RunFolder) -> TailReader:
    """The fitted reader; raises ``ArtefactError`` if notebook 02 has not made it."""
    return reader_from(folder.load(ARTEFACT).tensors, backbone)


@dataclass
class ReaderSums:
    """What a reader of n tokens is solved from: the normal equations of v on its last n embeddings, with the vectors
    that v (d,) and the embeddings (d,) were roughly centred by, and the token counts (V,)."""

    n: int
    equations: NormalEquations
    mean_d: Tensor
    embedding_mean_d: Tensor
    counts_V: np.ndarray

    def features(self, table_Vd: Tensor, ids_nj: Tensor) -> Tensor:
        """Centred embeddings (n, j · d) of the tokens up to each position, the last first."""
        return table_Vd[ids_nj.to(table_Vd.device)].float().sub_(self.embedding_mean_d).flatten(1)


def empty_sums(backbone: Backbone, targets: Targets, rows: np.ndarray, n: int) -> ReaderSums:
    """Sums of nothing, roughly centred for sequences like those of the rows."""
    table_Vd = embedding_table(backbone)
    counts_V = token_counts(targets, rows, table_Vd)
    mean_d = torch.from_numpy(targets.v[rows].mean(axis=0)).to(backbone.device)
    equations = NormalEquations(n * backbone.d, backbone.d)
    return ReaderSums(n, equations, mean_d, embedding_mean(table_Vd, counts_V), np.zeros_like(counts_V))


def accumulate(backbone: Backbone, targets: Targets, rows: np.ndarray, n: int) -> ReaderSums:
    """Sums over every position of the rows."""
    return add_rows(empty_sums(backbone, targets, rows, n), backbone, targets, rows)


def leading(sums: ReaderSums, n: int) -> ReaderSums:
    """The sums of a reader of fewer tokens, which are part of those of a longer one."""
    return dataclasses.replace(sums, n=n, equations=sums.equations.leading(n * len(sums.mean_d)))


@torch.inference_mode()
def add_rows(sums: ReaderSums, backbone: Backbone, targets: Targets, rows: np.ndarray) -> ReaderSums:
    """One forward pass over the rows, every position of them added to the sums; returns them."""
    table_Vd, d, p = embedding_table(backbone), backbone.d, sums.n * backbone.d
    sums.counts_V += token_counts(targets, rows, table_Vd)
    first_dp, ends = torch.zeros(d, p, dtype=torch.float64), []
    per_batch = max(1, FIT_TOKENS // (targets.ids.shape[1] + 1))
    with Progress(total=len(rows), desc="fitting the reader", unit="seq") as bar:
        for first in range(0, len(rows), per_batch):
            chosen = rows[first : first + per_batch]
            v_nd, row_n, position_n = every_position(backbone, targets, chosen)
            ids_nj = torch.from_numpy(tail_features(targets.ids, row_n, position_n, sums.n, backbone.start_id))
            x_np = sums.features(table_Vd, ids_nj)
            sums.equations.add_all_but_xx(x_np, v_nd - sums.mean_d)
            first_dp += (x_np[:, :d].T @ x_np).cpu()
            ends.append(ids_nj[torch.from_numpy(position_n == targets.lengths[row_n])])
            bar.update(len(chosen))
    start_d = sums.features(table_Vd, torch.tensor([[backbone.start_id]]))[0].cpu().double()
    sums.equations.raw_xx += sliding_gram(first_dp, _gram(sums, table_Vd, torch.cat(ends)), len(rows), start_d)
    return sums


def _gram(sums: ReaderSums, table_Vd: Tensor, ids_nj: Tensor) -> Tensor:
    """XᵀX (p, p) float64 of the features of some tails."""
    gram_pp = torch.zeros_like(sums.equations.raw_xx)
    for part in ids_nj.split(FIT_TOKENS):
        x_np = sums.features(table_Vd, part)
        gram_pp += (x_np.T @ x_np).cpu()
    return gram_pp


def token_counts(targets: Targets, rows: np.ndarray, table_Vd: Tensor) -> np.ndarray:
    """How often each token of the table stands in the rows' sequences (V,)."""
    return np.bincount(np.concatenate(targets.sequences(rows)), minlength=len(table_Vd))


def embedding_mean(table_Vd: Tensor, counts_V: np.ndarray) -> Tensor:
    """Mean embedding (d,) float32 under token counts, without a float32 copy of the table."""
    weight_V = torch.from_numpy(counts_V / counts_V.sum()).float().to(table_Vd.device)
    used = weight_V.nonzero()[:, 0]
    return weight_V[used] @ table_Vd[used].float()


def embedding_table(backbone: Backbone) -> Tensor:
    """Every token's embedding through the module (V, d), in the backbone's dtype."""
    return backbone.embed(torch.arange(len(backbone.head_weight)))


def every_position(backbone: Backbone, targets: Targets, rows: np.ndarray) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """v (n, d) float32 at each generated token of the rows, its row, and its position (1 = first generated)."""
    lengths = targets.lengths[rows]
    ids_BT = torch.from_numpy(targets.ids[rows, : lengths.max()].astype(np.int64))
    ids_BT = torch.cat([torch.full((len(rows), 1), backbone.start_id), ids_BT], dim=1).to(backbone.device)
    h_BTd = backbone.hidden_at_layer(input_ids=ids_BT)
    valid_BT = np.arange(1, ids_BT.shape[1])[None] <= lengths[:, None]
    at_row, at = np.nonzero(valid_BT)
    v_nd = h_BTd[:, 1:][torch.from_numpy(valid_BT).to(h_BTd.device)].float()
    return v_nd, rows[at_row], at + 1


def solve_reader(backbone: Backbone, sums: ReaderSums, ridge: float) -> dict[str, np.ndarray]:
    """The arrays of a :class:`TailReader` for one ridge strength, all n positions in one solve."""
    b_pd, intercept_d = sums.equations.solve(ridge)
    whiten_dd = whitening(sums.equations.residual_covariance(b_pd, ridge))
    weights_nad = (b_pd.float() @ whiten_dd.T).reshape(sums.n, backbone.d, backbone.d)
    table_Vd, on = embedding_table(backbone), backbone.device
    half_norm_nV = torch.stack([half_norms(table_Vd, w.to(on), sums.embedding_mean_d) for w in weights_nad])
    counts_V = sums.counts_V + PSEUDO_COUNT
    log_prior_V = np.log(counts_V / counts_V.sum())
    log_prior_V[[i for i in (backbone.start_id, backbone.pad_id) if i not in backbone.eos_ids]] = -1e9
    return {
        "weights": weights_nad.numpy(),
        "whiten": whiten_dd.numpy(),
        "mean": (sums.mean_d.cpu() + intercept_d).float().numpy(),
        "embedding_mean": sums.embedding_mean_d.cpu().numpy(),
        "log_prior": log_prior_V.astype(np.float32),
        "half_norm": half_norm_nV.cpu().numpy(),
    }


@torch.inference_mode()
def half_norms(table_Vd: Tensor, weight_ad: Tensor, embedding_mean_d: Tensor, rows: int = 16384) -> Tensor:
    """½‖(e(x) − ē) A‖² of every token (V,), in blocks of ``rows``."""
    blocks = (table_Vd[i : i + rows].float() - embedding_mean_d for i in range(0, len(table_Vd), rows))
    return torch.cat([0.5 * (b @ weight_ad).square().sum(dim=1) for b in blocks])


def reader_from(tensors: dict[str, np.ndarray], backbone: Backbone) -> TailReader:
    """The reader on the backbone's device, with the backbone's embedding table."""
    t = {k: torch.from_numpy(np.array(x)).to(backbone.device) for k, x in tensors.items()}
    with torch.inference_mode():
        table_Vd = embedding_table(backbone)
    ends_V = torch.zeros(len(table_Vd), dtype=torch.bool, device=backbone.device)
    ends_V[list(backbone.eos_ids)] = True
    return TailReader(
        t["weights"], t["whiten"], t["mean"], t["embedding_mean"], t["log_prior"], t["half_norm"], ends_V, table_Vd
    )


@torch.inference_mode()
def read_greedy(reader: TailReader, v_Md: Tensor) -> Tensor:
    """The likeliest tail, token by token from the last to the first, (M, n) in reading order."""
    return read_tails(reader, v_Md, seed=0, greedy_M=torch.ones(len(v_Md), dtype=torch.bool))[0]


@torch.inference_mode()
def read_tails(reader: TailReader, v_Md: Tensor, seed: int, greedy_M: Tensor) -> tuple[Tensor, Tensor]:
    """One tail per row, (M, n) in reading order, and its mean token log-probability (M,).

    Each token is drawn from the reader's posterior over the 50 likeliest, as the language model's own
    sampler does; the likeliest is taken where ``greedy_M``.
    """
    generator = torch.Generator(v_Md.device).manual_seed(seed)
    residual_Md, tokens, logp_M = reader.first_residual(v_Md), [], 0.0
    for j in range(reader.n):
        ids_Mk, score_Mk = reader.candidates(j, residual_Md, TOP_K)
        logp_Mk = torch.log_softmax(score_Mk, dim=1)
        drawn_M1 = torch.multinomial(logp_Mk.exp(), 1, generator=generator)
        # Candidates come best first.
        choice_M1 = drawn_M1.masked_fill(greedy_M.to(v_Md.device)[:, None], 0)
        tokens.append(ids_Mk.gather(1, choice_M1)[:, 0])
        logp_M = logp_M + logp_Mk.gather(1, choice_M1)[:, 0]
        residual_Md = residual_Md - reader.explained(j, tokens[-1])
    return torch.stack(tokens[::-1], dim=1).cpu(), (logp_M / reader.n).cpu()
