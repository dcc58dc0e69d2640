"""The probe decode: what a linear read of v gives without any verbalizer (PROTOCOL.md §8).

Ridge regression from v to the embeddings of the source's last n tokens, fitted on the training targets alone,
all n positions in one solve; each predicted embedding is written down as the token nearest to it by cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.artefacts import SPECS, Artefact, derive_seed
from nla_utils.config import PROBE_LENGTHS, TAIL_TOKENS, VALIDATION_SHARE, RunConfig
from nla_utils.lm.backbone import Backbone
from nla_utils.protocol import CORRECTED, PAPER, Protocol
from nla_utils.run import Run
from nla_utils.stages.encoding import re_encode
from nla_utils.stages.rollouts import rows_at
from nla_utils.stages.targets import Targets

ARTEFACT = "probe"
PROBE_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHUNK = 1024
NEAREST_ROWS = 256


@dataclass
class ProbeTexts:
    """The probe's texts of some targets: ``ids`` (R, n), and their last 1, 2, 4, 8 tokens re-encoded (R, lengths, d)."""

    rows: np.ndarray
    ids: np.ndarray
    h_bos: np.ndarray
    h_nobos: np.ndarray
    sha256: str

    @classmethod
    def of(cls, artefact: Artefact) -> "ProbeTexts":
        t = artefact.tensors
        return cls(t["rows"], *(t[f"probe_{name}"] for name in ("ids", "h_bos", "h_nobos")), artefact.sha256)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Ids (len(rows), n) of these targets' texts."""
        return self.ids[rows_at(self.rows, rows)]

    def h(self, protocol: Protocol, rows: np.ndarray) -> np.ndarray:
        """(len(rows), lengths, d) of these targets, as the protocol encodes it."""
        return (self.h_bos if protocol.bos else self.h_nobos)[rows_at(self.rows, rows)]


def fit_spec(config: RunConfig) -> dict:
    """What a linear fit depends on beside the run's identity and its targets, strengths of the ridge aside."""
    s = config.sizes
    return {"n_eval": s.n_eval, "tail_tokens": TAIL_TOKENS, "validation": [VALIDATION_SHARE, s.n_validate]}


SPECS[ARTEFACT] = lambda config: {**fit_spec(config), "ridges": PROBE_RIDGES, "lengths": PROBE_LENGTHS}


def make_probe(run: Run, targets: Targets) -> ProbeTexts:
    """The probe's texts of the in-sample and the held-out targets, or what is on disk."""
    if run.folder.has(ARTEFACT):
        return ProbeTexts.of(run.folder.load(ARTEFACT))
    rows, n = np.concatenate([targets.in_sample, targets.held_out]), TAIL_TOKENS
    train, validation = fit_split(run, targets)
    # Without texts (released vectors alone) there is nothing to fit it to: it writes no tokens.
    ids_Rn, trials = np.empty((len(rows), 0), dtype=np.int32), []
    if len(train):
        probe, trials = fit_probe(run.backbone, [(targets, train)], targets, validation, n)
        ids_Rn = probe.decode(targets.v[rows], n)
    texts, shape = [row[-k:].tolist() for row in ids_Rn for k in PROBE_LENGTHS], (len(rows), len(PROBE_LENGTHS), -1)
    tensors = {
        "rows": rows,
        "probe_ids": ids_Rn.astype(np.int32),
        "probe_h_bos": re_encode(run.backbone, texts, CORRECTED.on_ids).reshape(shape),
        "probe_h_nobos": re_encode(run.backbone, texts, PAPER.on_ids).reshape(shape),
    }
    facts = {"seed": run.seed, "trials": trials, "train_rows": len(train)}
    return ProbeTexts.of(run.folder.save(ARTEFACT, tensors, made_from={"targets": targets.sha256}, **facts))


def load_probe(run: Run) -> ProbeTexts:
    """The probe's texts; raises ``ArtefactError`` if notebook 04 has not made them."""
    return ProbeTexts.of(run.folder.load(ARTEFACT))


def fit_split(run: Run, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) of a linear fit: neither the held-out targets nor those without a text."""
    rng = np.random.default_rng(derive_seed(run.seed, "reader split", 0))
    order = rng.permutation(np.flatnonzero(targets.lengths[: len(targets.v) - targets.n_eval]))
    n_val = min(run.sizes.n_validate, max(2, round(VALIDATION_SHARE * len(order))))
    return np.sort(order[n_val:]), np.sort(order[:n_val])


@dataclass
class Probe:
    """Ŷ = intercept + (v − v̄) B: the centred embeddings of the last n tokens, the last first."""

    b_dq: Tensor
    intercept_q: Tensor
    v_mean_d: np.ndarray
    embedding_mean_d: Tensor
    table_Vd: Tensor

    def decode(self, v_Md: np.ndarray, n: int) -> np.ndarray:
        """Nearest tokens to the predicted embeddings of the last n (M, n), in reading order."""
        y_Mq = torch.from_numpy(v_Md - self.v_mean_d) @ self.b_dq + self.intercept_q
        y_md = y_Mq.reshape(len(v_Md), -1, len(self.embedding_mean_d))[:, :n].flatten(0, 1)
        ids = nearest_tokens(self.table_Vd, self.embedding_mean_d, y_md.to(self.table_Vd.device))
        return ids.reshape(len(v_Md), n)[:, ::-1].copy()


class NormalEquations:
    """Sums from which Y ≈ ȳ + (X − x̄) B follows in closed form, from data that is seen once, chunk by chunk.

    X (n, p) and Y (n, q) are added in chunks and never kept. Sums are float64, products within a chunk
    float32, so X and Y should come roughly centred; the exact means are taken out at the end.
    """

    def __init__(self, p: int, q: int):
        self.n = 0
        self.sum_x = torch.zeros(p, dtype=torch.float64)
        self.sum_y = torch.zeros(q, dtype=torch.float64)
        self.raw_xx = torch.zeros(p, p, dtype=torch.float64)
        self.raw_xy = torch.zeros(p, q, dtype=torch.float64)

    def add(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Add rows of X and Y."""
        self.raw_xx += (x_np.T @ x_np).cpu()
        self.add_all_but_xx(x_np, y_nq)

    def add_all_but_xx(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Add rows of X and Y whose XᵀX the caller adds to ``raw_xx``, having a cheaper way to it."""
        self.n += len(x_np)
        self.sum_x += x_np.sum(0).cpu().double()
        self.sum_y += y_nq.sum(0).cpu().double()
        self.raw_xy += (x_np.T @ y_nq).cpu()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(B (p, q), intercept ȳ − x̄ B (q,)), with a penalty of ``ridge`` times the mean diagonal of XᵀX."""
        # At p = 18,432 (eight embeddings of Gemma-2-2B) each (p, p) is 2.7 GB, so none is made that can be spared.
        penalised_pp = torch.addr(self.raw_xx, self.sum_x, self.sum_x, alpha=-1 / self.n)
        penalised_pp.diagonal().add_(ridge * penalised_pp.diagonal().mean().clamp_min(1e-12))
        b_pq = torch.cholesky_solve(self.xy(), torch.linalg.cholesky(penalised_pp))
        return b_pq, (self.sum_y - self.sum_x @ b_pq) / self.n

    def xy(self) -> Tensor:
        """XᵀY (p, q), means taken out."""
        return torch.addr(self.raw_xy, self.sum_x, self.sum_y, alpha=-1 / self.n)


@torch.inference_mode()
def fit_probe(
    backbone: Backbone, parts: Sequence[tuple[Targets, np.ndarray]], targets: Targets, validation: np.ndarray, n: int
) -> tuple[Probe, list[dict]]:
    """A probe fitted on rows of one or several sets of targets, and the ridge strengths that were tried.

    The one kept names the most last tokens of the validation rows.
    """
    table_Vd = backbone.embedding_table()
    counts_V = sum(token_counts(own, rows, table_Vd) for own, rows in parts)
    first_targets, first_rows = parts[0]
    mean_d, v_mean_d = embedding_mean(table_Vd, counts_V), first_targets.v[first_rows].mean(axis=0)
    equations = NormalEquations(backbone.d, n * backbone.d)
    for own, rows in parts:
        for first in range(0, len(rows), CHUNK):
            chosen = rows[first : first + CHUNK]
            y_nj = torch.from_numpy(_tails(own, chosen, n, backbone.start_id)).to(backbone.device)
            y_nq = (table_Vd[y_nj].float() - mean_d).flatten(1)
            equations.add(torch.from_numpy(own.v[chosen] - v_mean_d), y_nq.cpu())
    last = _tails(targets, validation, 1, backbone.start_id)
    trials = []
    for ridge in PROBE_RIDGES:
        b_dq, intercept_q = (x.float() for x in equations.solve(ridge))
        probe = Probe(b_dq, intercept_q, v_mean_d, mean_d, table_Vd)
        trials.append((float((probe.decode(targets.v[validation], 1) == last).mean()), ridge, probe))
    best = max(trials, key=lambda t: t[0])[2]
    return best, [{"ridge": ridge, "names_last_token": share} for share, ridge, _ in trials]


def _tails(targets: Targets, rows: np.ndarray, n: int, start_id: int) -> np.ndarray:
    return tail_features(targets.ids, rows, targets.lengths[rows], n, start_id)


def tail_features(ids_NT: np.ndarray, rows: np.ndarray, positions: np.ndarray, n: int, start_id: int) -> np.ndarray:
    """Token ids (len(rows), n): the n tokens up to each position, the last first, padded by the start token."""
    at = positions[:, None] - np.arange(1, n + 1)
    return np.where(at >= 0, ids_NT[rows[:, None], np.maximum(at, 0)], start_id)


def token_counts(targets: Targets, rows: np.ndarray, table_Vd: Tensor) -> np.ndarray:
    """How often each token of the table stands in the rows' sequences (V,)."""
    return np.bincount(np.concatenate(targets.sequences(rows)), minlength=len(table_Vd))


def embedding_mean(table_Vd: Tensor, counts_V: np.ndarray) -> Tensor:
    """Mean embedding (d,) float32 under token counts, without a float32 copy of the table."""
    weight_V = torch.from_numpy(counts_V / counts_V.sum()).float().to(table_Vd.device)
    used = weight_V.nonzero()[:, 0]
    return weight_V[used] @ table_Vd[used].float()


def nearest_tokens(table_Vd: Tensor, mean_d: Tensor, guess_md: Tensor) -> np.ndarray:
    """The token whose centred embedding has the largest cosine with each centred guess (m,)."""
    best_m = []
    norm_V = torch.cat([(t.float() - mean_d).norm(dim=1) for t in table_Vd.split(16384)]).clamp_min(1e-6)
    for block_md in guess_md.split(NEAREST_ROWS):
        dot_mV = (block_md.to(table_Vd.dtype) @ table_Vd.T).float() - (block_md @ mean_d)[:, None]
        best_m.append((dot_mV / norm_V).argmax(dim=1).cpu())
    return torch.cat(best_m).numpy()
