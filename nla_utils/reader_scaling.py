"""How the tail reader, the probe and NN-retrieval grow with the number of sequences that each of them may use."""

from __future__ import annotations

from itertools import pairwise
from typing import Callable, Sequence

import numpy as np
import torch

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.metrics import fve_matrix
from nla_utils.probe import fit_probe
from nla_utils.reader import add_rows, best_ridge, empty_sums, read_greedy, reader_from, reader_split
from nla_utils.targets import Targets

SHARES = (8, 4, 2, 1)


def scale(
    run: RunConfig, backbone: Backbone, targets: Targets, n: int, more: Sequence[tuple[Targets, np.ndarray]],
    score: Callable[[list[list[int]]], dict],
) -> list[dict]:  # fmt: skip
    """``{"train_rows", "reader", "probe", "retrieval"}`` for an eighth to all of the run's training rows, and then
    with the rows of further targets added, one set after the other.

    ``score`` scores texts of the held-out targets, which are the same at every size. Ridge strengths are chosen on
    the run's validation rows at each size. Retrieval is from the very sequences that the others are fitted on.
    """
    train, validation = reader_split(run, targets)
    edges = [0, *(len(train) // share for share in SHARES)]
    steps = [(targets, train[a:b]) for a, b in pairwise(edges)] + list(more)
    sums = empty_sums(backbone, targets, steps[0][1], n)
    v_Md, nearest_M = targets.v[targets.held_out], np.full(targets.n_eval, -np.inf)
    records = []
    for i, (own, rows) in enumerate(steps, start=1):
        add_rows(sums, backbone, own, rows)
        tensors, _ = best_ridge(backbone, sums, targets, validation)
        reader = reader_from(tensors, backbone)
        probe, _ = fit_probe(backbone, steps[:i], targets, validation, n)
        nearest_M = np.maximum(nearest_M, fve_matrix(v_Md, own.v[rows], targets.mu).max(axis=1))
        records.append({
            "train_rows": sum(len(r) for _, r in steps[:i]),
            "reader": score(read_greedy(reader, torch.from_numpy(v_Md).to(backbone.device)).tolist()),
            "probe": score(probe.decode(v_Md, n).tolist()),
            "retrieval": {"mean": float(nearest_M.mean()), "ci95": metrics.ci95(nearest_M)},
        })  # fmt: skip
    return records
