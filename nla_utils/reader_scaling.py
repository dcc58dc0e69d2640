"""How the tail reader, the probe and NN-retrieval grow with the number of sequences that each of them may use.

An eighth to all of the run's training rows, and then the rows of further targets, one set after the other. The held-out
targets are the run's at every size, and so are the validation rows that choose the ridge strengths.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Callable, Iterator, Sequence

import numpy as np
import torch

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.metrics import fve_matrix
from nla_utils.probe import fit_probe
from nla_utils.reader import best_ridge, read_greedy, reader_from, reader_split
from nla_utils.reader_sums import ReaderSums, add_rows, empty_sums
from nla_utils.targets import Targets

SHARES = (8, 4, 2, 1)


Part = tuple[Targets, np.ndarray]


def grow(
    run: RunConfig, backbone: Backbone, targets: Targets, n: int, more: Sequence[Part]
) -> Iterator[tuple[list[Part], ReaderSums]]:
    """The parts that count so far, and the sums over them: the same object, with every step holding more."""
    train, _ = reader_split(run, targets)
    edges = [0, *(len(train) // share for share in SHARES)]
    steps = [(targets, train[a:b]) for a, b in pairwise(edges)] + list(more)
    sums = empty_sums(backbone, *steps[0], n)
    for i, part in enumerate(steps, start=1):
        yield steps[:i], add_rows(sums, backbone, *part)


def score_size(
    run: RunConfig, backbone: Backbone, targets: Targets, parts: Sequence[Part], sums: ReaderSums,
    score: Callable[[list[list[int]]], dict],
) -> dict:  # fmt: skip
    """``{"train_rows", "reader", "probe", "retrieval"}`` with the sequences of some parts.

    ``score`` scores texts of the held-out targets. Retrieval is from the very sequences that the others are fitted on.
    """
    _, validation = reader_split(run, targets)
    v_Md = targets.v[targets.held_out]
    reader = reader_from(best_ridge(backbone, sums, targets, validation)[0], backbone)
    probe, _ = fit_probe(backbone, parts, targets, validation, sums.n)
    nearest_M = np.max([fve_matrix(v_Md, own.v[rows], targets.mu).max(axis=1) for own, rows in parts], axis=0)
    return {
        "train_rows": sum(len(rows) for _, rows in parts),
        "reader": score(read_greedy(reader, torch.from_numpy(v_Md).to(backbone.device)).tolist()),
        "probe": score(probe.decode(v_Md, sums.n).tolist()),
        "retrieval": {"mean": float(nearest_M.mean()), "ci95": metrics.ci95(nearest_M)},
    }
