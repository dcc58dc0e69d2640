"""Directions that are no activation of a text: a way of reading that scores well on them is gaming the score.

Each kind is made from the bundle's stored activations, measured from their mean, at an activation's distance from it.
"""

from __future__ import annotations

from typing import Callable, Sequence

import numpy as np

from nla_utils.extensions.release.api import NLA
from nla_utils.progress import Progress
from nla_utils.scores.column import Column

RESULTS = "directions"
SEED = 0


def _gaussian(rng: np.random.Generator, a_Nd: np.ndarray) -> np.ndarray:
    return rng.normal(size=a_Nd.shape)


def _shuffled(rng: np.random.Generator, a_Nd: np.ndarray) -> np.ndarray:
    return rng.permuted(a_Nd, axis=1)


def _difference(rng: np.random.Generator, a_Nd: np.ndarray) -> np.ndarray:
    """Between the means of two halves of the activations, drawn anew for each."""
    halves = [rng.permutation(len(a_Nd)) for _ in a_Nd]
    middle = len(a_Nd) // 2
    return np.stack([a_Nd[order[:middle]].mean(axis=0) - a_Nd[order[middle:]].mean(axis=0) for order in halves])


def _mean_of_two(_: np.random.Generator, a_Nd: np.ndarray) -> np.ndarray:
    return (a_Nd + np.roll(a_Nd, 1, axis=0)) / 2


KINDS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "an activation": lambda _, a_Nd: a_Nd,
    "mean of two activations": _mean_of_two,
    "difference of two means": _difference,
    "coordinates shuffled": _shuffled,
    "Gaussian": _gaussian,
}


def vectors(nla: NLA, n: int) -> dict[str, np.ndarray]:
    """n vectors of each kind (n, d) float32, μ added, made from the last n stored activations."""
    mu, own = nla.bundle.mu, nla.bundle.pool_v[-n:] - nla.bundle.mu
    norm = np.linalg.norm(own, axis=1).mean()
    found = {}
    for kind, make in KINDS.items():
        a_nd = make(np.random.default_rng(SEED), own)
        scale = 1 if kind == "an activation" else norm / np.linalg.norm(a_nd, axis=1, keepdims=True)
        found[kind] = (mu + a_nd * scale).astype(np.float32)
    return found


def read_directions(nla: NLA, methods: Sequence[str], n: int, k: int) -> list[dict]:
    """For each method and kind: the score of the best of k texts and the chance that unrelated texts score less, means
    over n vectors with intervals. Texts that vectors were made from are kept out of what they are compared with."""
    of_kind, records = vectors(nla, n), []
    kept = nla.without_last(n)
    with Progress(total=len(methods) * len(of_kind) * n, desc="reading directions", unit="vector") as bar:
        for method in methods:
            for kind, v_nd in of_kind.items():
                read = []
                for v in v_nd:
                    read.append(kept.verbalize(v, k, method))
                    bar.update()
                column = Column("corrected", n)
                column.add("score", np.array([r.score for r in read]))
                column.add("percentile", np.array([r.percentile for r in read]))
                records.append({"method": method, "kind": kind, "k": k, **column.to_json()})
    return records
