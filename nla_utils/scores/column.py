"""One protocol's column of a results file: values by key, with intervals from shared resamples."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Optional, Sequence

import numpy as np

from nla_utils import metrics
from nla_utils.metrics import fve, fve_matrix


class Scorer:
    """M targets and the pool they are compared with: fve raw, or centred where ``mu_d`` is given.

    Args:
        v_Md: the targets' activations.
        pool_Pd: activations of P other texts.
        mu_d: what both sides are centred by.
    """

    def __init__(self, v_Md: np.ndarray, pool_Pd: np.ndarray, mu_d: Optional[np.ndarray] = None):
        self.v, self.pool, self.mu = v_Md, pool_Pd, mu_d

    def own(self, h: np.ndarray) -> np.ndarray:
        """Score of each target's own texts: h (M, d) gives (M,), h (M, K, d) gives (M, K)."""
        return fve(h, self.v if h.ndim == 2 else self.v[:, None], self.mu)

    @cached_property
    def against_pool(self) -> np.ndarray:
        """Score of each text of the pool for each target (M, P)."""
        return fve_matrix(self.v, self.pool, self.mu)

    @property
    def nearest(self) -> np.ndarray:
        """Best score in the pool (M,): NN-retrieval."""
        return self.against_pool.max(axis=1)

    @property
    def floor(self) -> np.ndarray:
        """Mean score in the pool (M,): the random floor."""
        return self.against_pool.mean(axis=1)

    def against(self, h_Pd: np.ndarray) -> np.ndarray:
        """Score of each of P texts for each target (M, P)."""
        return self.against_pool if h_Pd is self.pool else fve_matrix(self.v, h_Pd, self.mu)

    def others(self, h_MKd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rollouts of every other target against this one: mean greedy (M,) and mean best-of-K (M,).

        Column 0 of ``h_MKd`` is greedy, the others are sampled.
        """
        m = len(self.v)
        scores_MMK = np.stack([fve_matrix(self.v, h_Kd, self.mu) for h_Kd in h_MKd], axis=1)
        other = ~np.eye(m, dtype=bool)
        greedy = scores_MMK[:, :, 0][other].reshape(m, m - 1).mean(axis=1)
        best = scores_MMK[:, :, 1:].max(axis=2)[other].reshape(m, m - 1).mean(axis=1)
        return greedy, best

    def others_curve(self, h_MKd: np.ndarray, ks: Sequence[int]) -> np.ndarray:
        """Exact K-curve of the K sampled rollouts of another target, mean over the others (M, len(ks))."""
        m = len(self.v)
        curve_MJ = np.zeros((m, len(ks)))
        for j in range(m):
            others = np.arange(m) != j
            curve_MJ[others] += metrics.exact_k_curve(fve_matrix(self.v[others], h_MKd[j], self.mu), ks)
        return curve_MJ / (m - 1)


class Column:
    """Numbers of one protocol over ``n`` targets.

    Means over targets are added with their values per target (M,), so that intervals and paired differences come from
    the same resamples. An interval is computed when it is first asked for, and once.
    """

    def __init__(self, protocol: str, n: int):
        self.protocol, self.n = protocol, n
        self.values: dict[str, object] = {}
        self.per_target: dict[str, np.ndarray] = {}
        self._intervals: dict[str, object] = {}

    def add(self, key: str, values_M: np.ndarray) -> None:
        """Add a mean over targets; NaN rows are left out."""
        self.per_target[key] = np.asarray(values_M, dtype=np.float64)
        self.values[key] = float(np.nanmean(values_M))

    def put(self, key: str, value: object, ci95: object = None) -> None:
        """Add a figure that is no mean over targets, with its interval if it has one."""
        self.values[key] = value
        if ci95 is not None:
            self._intervals[key] = ci95

    def difference(self, a: str, b: str) -> None:
        """Add ``a`` − ``b``, paired by target."""
        self.add(f"{a}_minus_{b}", self.per_target[a] - self.per_target[b])

    def ratio(self, key: str, score_M: np.ndarray, floor_M: np.ndarray, ceiling_M: np.ndarray) -> None:
        """Add ρ of three means over targets, its interval from joint resamples of the three; targets without a
        ceiling (NaN: their text is not known) are left out."""
        known = ~np.isnan(ceiling_M)
        score_M, floor_M, ceiling_M = (x[known] for x in (score_M, floor_M, ceiling_M))
        if not known.any():
            return self.put(key, math.nan)
        s, f, c = metrics.bootstrap_means(np.stack([score_M, floor_M, ceiling_M], axis=1)).T
        rho = float(metrics.rho(score_M.mean(), floor_M.mean(), ceiling_M.mean()))
        self.put(key, rho, interval(metrics.rho(s, f, c)))

    def unpaired(self, key: str, a_M: np.ndarray, b_M: np.ndarray) -> None:
        """Add mean of a − mean of b, two different sets of targets, each resampled on its own."""
        gap_R = metrics.bootstrap_means(a_M) - metrics.bootstrap_means(b_M, seed=metrics.BOOTSTRAP_SEED + 1)
        self.put(key, float(a_M.mean() - b_M.mean()), interval(gap_R))

    @property
    def ci95(self) -> dict[str, object]:
        """95 % intervals by key."""
        for key, values_M in self.per_target.items():
            if key not in self._intervals:
                self._intervals[key] = metrics.ci95(values_M)
        return self._intervals

    def to_json(self) -> dict:
        """The column as a results file holds it; NaN, which is not JSON, is null."""
        return _without_nan({"protocol": self.protocol, "n": self.n, **self.values, "ci95": self.ci95})


def interval(resampled_R: np.ndarray) -> list[float]:
    """95 % percentile interval [low, high] of a resampled figure (R,)."""
    return [float(x) for x in np.percentile(resampled_R, [2.5, 97.5])]


def _without_nan(x):
    if isinstance(x, dict):
        return {k: _without_nan(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_without_nan(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x
