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

from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.linear import NormalEquations
from nla_utils.reader import TAIL_TOKENS, reader_split
from nla_utils.reader_sums import embedding_mean, embedding_table, tail_features, token_counts
from nla_utils.targets import Targets

PROBE_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHUNK = 1024
NEAREST_ROWS = 256


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


def probe_decode(run: RunConfig, backbone: Backbone, targets: Targets, rows: np.ndarray) -> tuple[np.ndarray, dict]:
    """The probe's guess of the last n tokens of each row (len(rows), n) in reading order, and how it was fitted."""
    n = min(TAIL_TOKENS, run.sizes.max_new_tokens)
    train, validation = reader_split(run, targets)
    probe, trials = fit_probe(backbone, [(targets, train)], targets, validation, n)
    return probe.decode(targets.v[rows], n), {"trials": trials, "train_rows": len(train)}


@torch.inference_mode()
def fit_probe(
    backbone: Backbone, parts: Sequence[tuple[Targets, np.ndarray]], targets: Targets, validation: np.ndarray, n: int
) -> tuple[Probe, list[dict]]:
    """A probe fitted on rows of one or several sets of targets, and the ridge strengths that were tried.

    The one kept names the most last tokens of the validation rows.
    """
    table_Vd = embedding_table(backbone)
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


def nearest_tokens(table_Vd: Tensor, mean_d: Tensor, guess_md: Tensor) -> np.ndarray:
    """The token whose centred embedding has the largest cosine with each centred guess (m,)."""
    best_m = []
    norm_V = torch.cat([(t.float() - mean_d).norm(dim=1) for t in table_Vd.split(16384)]).clamp_min(1e-6)
    for block_md in guess_md.split(NEAREST_ROWS):
        dot_mV = (block_md.to(table_Vd.dtype) @ table_Vd.T).float() - (block_md @ mean_d)[:, None]
        best_m.append((dot_mV / norm_V).argmax(dim=1).cpu())
    return torch.cat(best_m).numpy()
