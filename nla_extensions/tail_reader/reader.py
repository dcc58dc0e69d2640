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
from typing import Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from nla_extensions.tail_reader.sums import ReaderSums, sums_at_layers, whitening
from nla_utils.baselines import fit_spec, fit_split
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


def fit_reader(run: Run, targets: Targets) -> TailReader:
    """The reader fitted on every position of the training rows, or what is on disk; ridge chosen on validation."""
    fit_readers([(run, targets)])
    return load_reader(run)


def fit_readers(at_layers: Sequence[tuple[Run, Targets]]) -> None:
    """Fit the readers of several layers from one pass over the sequences, which are the same for all of them.

    ``at_layers`` holds the run at each layer, in whose folder that layer's reader is kept, and its targets. A reader
    that is there already is left alone.
    """
    missing = [(run, targets) for run, targets in at_layers if not run.folder.has(ARTEFACT)]
    if not missing:
        return
    first_run, first_targets = missing[0]
    train, validation = fit_split(first_run, first_targets)
    at = {run.backbone.layer: targets for run, targets in missing}
    sums_of = sums_at_layers(first_run.backbone, at, train, TAIL_TOKENS)
    for run, targets in Progress(missing, desc="solving for the reader", unit="layer"):
        sums = sums_of[run.backbone.layer]
        tensors, trials = best_ridge(run.backbone, sums, targets, validation)
        run.folder.save(
            ARTEFACT,
            tensors,
            made_from={"targets": targets.sha256},
            seed=run.seed,
            tail_tokens=TAIL_TOKENS,
            train_positions=sums.equations.n,
            train_rows=len(train),
            validation_rows=validation.tolist(),
            trials=trials,
        )


def describe(run: Run) -> dict:
    """How the run's reader was fitted."""
    sidecar = run.folder.load(ARTEFACT).sidecar
    return {k: sidecar[k] for k in ("tail_tokens", "train_rows", "train_positions", "trials")}


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


def load_reader(run: Run) -> TailReader:
    """The fitted reader of a run; raises ``ArtefactError`` if there is none."""
    return reader_from(run.folder.load(ARTEFACT).tensors, run.backbone)


def solve_reader(backbone: Backbone, sums: ReaderSums, ridge: float) -> dict[str, np.ndarray]:
    """The arrays of a :class:`TailReader` for one ridge strength, all n positions in one solve."""
    b_pd, intercept_d = sums.equations.solve(ridge)
    whiten_dd = whitening(sums.equations.residual_covariance(b_pd, ridge))
    weights_nad = (b_pd.float() @ whiten_dd.T).reshape(sums.n, backbone.d, backbone.d)
    table_Vd, on = backbone.embedding_table(), backbone.device
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
    table_Vd = backbone.embedding_table()
    ends_V = torch.zeros(len(table_Vd), dtype=torch.bool, device=backbone.device)
    ends_V[list(backbone.eos_ids)] = True
    return TailReader(
        t["weights"], t["whiten"], t["mean"], t["embedding_mean"], t["log_prior"], t["half_norm"], ends_V, table_Vd
    )


@torch.inference_mode()
def read_greedy(reader: TailReader, v_Md: Tensor) -> Tensor:
    """The likeliest tail, token by token from the last to the first, (M, n) in reading order."""
    return read_tails(reader, v_Md, None, torch.ones(len(v_Md), dtype=torch.bool))[0]


@torch.inference_mode()
def read_tails(
    reader: TailReader, v_Md: Tensor, streams_M: Optional[np.ndarray], greedy_M: Tensor
) -> tuple[Tensor, Tensor]:
    """One tail per row, (M, n) in reading order, and its mean token log-probability (M,).

    Each token is drawn from the reader's posterior over the 50 likeliest, as the language model's own
    sampler does, from its row's random stream; the likeliest is taken where ``greedy_M``, which needs no streams if it
    is every row.
    """
    uniform_Mn = torch.zeros(len(v_Md), reader.n) if streams_M is None else uniforms(streams_M, reader.n)
    uniform_Mn = uniform_Mn.to(v_Md.device)
    residual_Md, tokens, logp_M = reader.first_residual(v_Md), [], 0.0
    for j in range(reader.n):
        ids_Mk, score_Mk = reader.candidates(j, residual_Md, TOP_K)
        logp_Mk = torch.log_softmax(score_Mk, dim=1)
        drawn_M1 = choose(logp_Mk, ids_Mk, uniform_Mn[:, j])
        # Candidates come best first.
        choice_M1 = drawn_M1.masked_fill(greedy_M.to(v_Md.device)[:, None], 0)
        tokens.append(ids_Mk.gather(1, choice_M1)[:, 0])
        logp_M = logp_M + logp_Mk.gather(1, choice_M1)[:, 0]
        residual_Md = residual_Md - reader.explained(j, tokens[-1])
    return torch.stack(tokens[::-1], dim=1).cpu(), (logp_M / reader.n).cpu()
