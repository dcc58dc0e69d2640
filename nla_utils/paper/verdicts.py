"""Verdicts by one written rule (PROTOCOL.md §12), the only place that says yes or no of a figure.

The verdicts of one table are a family, judged together. Each has a p-value by target; Holm's adjustment holds the chance
of any false verdict in the table at 5 %. *Yes* and *no*: adjusted p ≤ .05 on the claimed or the opposite side.
Otherwise *not decided*. They speak of one run: pool, μ and training are held fixed.

The p-value is an approximation. Results keep a value and its 95 % percentile bootstrap interval, not the scores per
target, so the standard error is read off the side of the interval that faces the bound, and the law taken as normal.
Before adjustment p ≤ .05 exactly where the interval excludes the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Hashable, Mapping, Optional, Sequence, TypeVar

YES, NO, UNDECIDED = "yes", "no", "not decided"
# A value without an interval is shown and not judged; what was not measured is a dash.
VALUE_ONLY, UNMEASURED = "value only", "–"
LEVEL = 0.05
NORMAL = NormalDist()
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Claimed:
    """A figure, its 95 % interval ``ci95`` (low, high), and what is claimed: that it lies between ``low`` and ``high``.

    "Above 0" has one bound. "Equal", "zero" and "no better than" have two, a distance Δ written down beforehand.
    """

    value: Optional[float]
    ci95: Optional[Sequence[Optional[float]]]
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_judged(self) -> bool:
        """Whether there is an interval to judge by."""
        return self.value is not None and self.ci95 is not None and None not in self.ci95

    @property
    def p(self) -> float:
        """Two-sided p-value of the value against the bound that is hardest to tell from it.

        Inside two bounds that is the larger of two one-sided tests (equivalence), outside it is the bound crossed.
        """
        return max(self._p_at(bound) for bound in (self.low, self.high) if math.isfinite(bound))

    def _p_at(self, bound: float) -> float:
        if self.value == bound:
            return 1.0
        facing = self.value - self.ci95[0] if self.value > bound else self.ci95[1] - self.value
        if facing <= 0:
            return 0.0
        return 2 * NORMAL.cdf(-abs(self.value - bound) / facing * NORMAL.inv_cdf(1 - LEVEL / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the i-th smallest of m (from 0) times m − i, never falling, at most 1."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for i, j in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[j]))
        adjusted[j] = largest
    return adjusted


def decide(family: Mapping[Key, Claimed]) -> dict[Key, str]:
    """The verdict on each figure of a table. Figures without an interval get none and do not count as members."""
    judged = [key for key, figure in family.items() if figure.is_judged]
    adjusted = dict(zip(judged, holm([family[key].p for key in judged])))
    return {key: _word(figure, adjusted.get(key)) for key, figure in family.items()}


def _word(figure: Claimed, p: Optional[float]) -> str:
    if p is None:
        return UNMEASURED if figure.value is None else VALUE_ONLY
    if p > LEVEL:
        return UNDECIDED
    return YES if figure.low < figure.value < figure.high else NO
