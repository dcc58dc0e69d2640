"""Guided search: tails changed one token at a time, re-encoded, and kept where they come closer to v.

This uses v at choice time, as best-of-K does, and is to be compared with it at equal forward tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nla_utils.backbone import Backbone
from nla_utils.metrics import fve
from nla_utils.reader import TailReader

BEAMS = 2
SWAPS = 16


@dataclass
class GuidedSearch:
    """``ids`` (M, n) and ``h`` (M, d) of the best tail; ``curve`` (M, rounds + 1): its centred score after each
    round; ``spent`` (rounds + 1,): forward tokens per target by then, the K first tails included."""

    ids: np.ndarray
    h: np.ndarray
    curve: np.ndarray
    spent: np.ndarray


def guided_search(
    reader: TailReader, backbone: Backbone, v_Md: np.ndarray, mu_d: np.ndarray,
    ids_MKn: np.ndarray, h_MKd: np.ndarray, budget: int,
) -> GuidedSearch:  # fmt: skip
    """Improve the best of K tails until ``budget`` forward tokens per target are spent.

    Each round takes one position, the last first, and tries the 16 tokens there that would best explain what
    the re-encoded tail still leaves of v, for the two best tails of each target.
    """
    m, k, n = ids_MKn.shape
    score_MK = fve(h_MKd, v_Md[:, None], mu_d)
    top = np.argsort(-score_MK, axis=1)[:, :BEAMS]
    at = np.arange(m)[:, None]
    beams = (ids_MKn[at, top], h_MKd[at, top], score_MK[at, top])
    spent, curve = [k * (n + 1)], [beams[2][:, 0]]
    per_round = BEAMS * SWAPS * (n + 1)
    rounds = max(0, (budget - spent[0]) // per_round)
    for r in range(rounds):
        proposed = _propose(reader, v_Md, beams[0], beams[1], r % n)
        h = backbone.encode(proposed.reshape(-1, n).tolist(), start=True).reshape(*proposed.shape[:2], -1)
        score = fve(h, v_Md[:, None], mu_d)
        # A proposal that is a beam already would push out a different one.
        score[(proposed[:, :, None] == beams[0][:, None]).all(axis=3).any(axis=2)] = -1.0
        beams = _best(*(np.concatenate(pair, axis=1) for pair in zip(beams, (proposed, h, score))))
        spent.append(spent[-1] + per_round)
        curve.append(beams[2][:, 0])
    return GuidedSearch(beams[0][:, 0], beams[1][:, 0], np.stack(curve, axis=1), np.array(spent))


@torch.inference_mode()
def _propose(reader: TailReader, v_Md: np.ndarray, ids_MBn: np.ndarray, h_MBd: np.ndarray, j: int) -> np.ndarray:
    """Tails with the token at −(j+1) changed (M, B·SWAPS, n)."""
    m, beams, n = ids_MBn.shape
    device = reader.mean_d.device
    gap = torch.from_numpy(v_Md[:, None] - h_MBd).float().flatten(0, 1).to(device)
    current = torch.from_numpy(ids_MBn[:, :, n - 1 - j].astype(np.int64)).flatten().to(device)
    residual = gap @ reader.whiten_dd.T + reader.explained(j, current)
    swaps, _ = reader.candidates(j, residual, SWAPS)
    proposed = np.repeat(ids_MBn[:, :, None], swaps.shape[1], axis=2)
    proposed[..., n - 1 - j] = swaps.cpu().numpy().reshape(m, beams, -1)
    return proposed.reshape(m, -1, n)


def _best(ids: np.ndarray, h: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The BEAMS best of each target, best first."""
    top = np.argsort(-score, axis=1, kind="stable")[:, :BEAMS]
    at = np.arange(len(ids))[:, None]
    return ids[at, top], h[at, top], score[at, top]
