"""Directions that are no activation of a text: a way of reading that scores well on them is gaming the score.

Each kind is made from the bundle's stored activations, measured from their mean, at an activation's distance from it.
"""

from __future__ import annotations

from typing import Callable

import numpy as np

from nla_extensions.comparison import texts as of
from nla_extensions.release.api import NLA
from nla_extensions.release.methods import DRAWING
from nla_utils.metrics import fve, fve_matrix
from nla_utils.scores import Column

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


def read_directions(nla: NLA, kind: str, v_nd: np.ndarray, budget: int, seed: int) -> list[dict]:
    """For each way of reading: the score of the best text that the budget buys for vectors of a kind, and the chance that
    the best of as many unrelated texts scores less; means over n vectors with intervals.

    Texts that vectors were made from are kept out of what they are compared with.
    """
    kept, records = nla.without_last(len(v_nd)), []
    mu, pool_v = kept.bundle.mu, kept.bundle.pool_v
    drawn = {method: of.draw(kept, method, v_nd, budget, seed) for method in DRAWING}
    for method, texts in {**drawn, "guided": of.guided(kept, drawn["reader"], v_nd, budget)}.items():
        score_n = fve(texts.h[:, 1:], v_nd[:, None], mu).max(axis=1)
        # The guided search has looked at as many texts as it had tokens for.
        k = drawn["reader"].k if method == "guided" else texts.k
        column = Column("corrected", len(v_nd))
        column.add("score", score_n)
        column.add("percentile", (fve_matrix(v_nd, pool_v, mu) < score_n[:, None]).mean(axis=1) ** k)
        records.append({"method": method, "kind": kind, "k": k, **column.to_json()})
    return records
