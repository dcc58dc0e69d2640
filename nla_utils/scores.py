"""Results files: the rows of the registry, made of a run's evidence."""

from __future__ import annotations

import math
from typing import Callable, Optional, Sequence

import numpy as np
import pandas as pd

from nla_utils import metrics, rows
from nla_utils.config import PROBE_LENGTHS
from nla_utils.evidence import CENTRED, Evidence, part_of, reading_of_ids
from nla_utils.protocol import CORRECTED, LADDER, PROTOCOLS, PUBLISHED, Protocol, ablation_steps


class Column:
    """Numbers of one protocol over ``n`` targets: ``values`` by key, ``ci95`` of those that have an interval, and the
    values per target (M,) that means were taken of, so that differences are paired and resampled together."""

    def __init__(self, protocol: str, n: int):
        self.protocol, self.n = protocol, n
        self.values: dict[str, object] = {}
        self.ci95: dict[str, object] = {}
        self.per_target: dict[str, np.ndarray] = {}

    def add(self, key: str, values_M: np.ndarray) -> None:
        """Add a mean over targets; NaN rows are left out."""
        self.per_target[key] = np.asarray(values_M, dtype=np.float64)
        self.put(key, *metrics.mean(values_M))

    def put(self, key: str, value: object, ci95: object = None) -> None:
        """Add a number as it is, with its interval if it has one."""
        self.values[key] = value
        if ci95 is not None:
            self.ci95[key] = ci95

    def difference(self, a: str, b: str) -> None:
        """Add ``a`` − ``b``, paired by target."""
        self.add(f"{a}_minus_{b}", self.per_target[a] - self.per_target[b])

    def to_json(self) -> dict:
        """The column as a results file holds it; NaN, which is not JSON, is null."""
        return _without_nan({"protocol": self.protocol, "n": self.n, **self.values, "ci95": self.ci95})


def _without_nan(x):
    if isinstance(x, dict):
        return {k: _without_nan(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_without_nan(v) for v in x]
    return None if isinstance(x, float) and math.isnan(x) else x


# What rows need of the evidence, by name: the kind of its rows, and the column, or its name in ``CENTRED``.
_COLUMNS = {
    "target": (
        *("nearest", "nearest_raw", "nearest_cen", "nearest_other", "floor", "pair_floor", "null", "null_sd"),
        *("null_left_out", "constant_mu", "pc"),
    ),
    "rollout": ("tokens", "anchor", "logp", "logp_published", "others"),
    "others": ("others_greedy", "others_best", "others_curve", "greedy_rank"),
    "source_loss": ("nats_own", "nats_other", "nats_mean", "nats_none", "nats_ends_alike", "nats_begins_alike"),
}
KEPT = {kind: (kind, "score") for kind in ("source", "paraphrase", "tail", "rollout", "probe")}
KEPT |= {column: (kind, column) for kind, columns in _COLUMNS.items() for column in columns}
KEPT |= {f"rank_of_{kind}": (kind, "rank") for kind in ("paraphrase", "rollout", "probe")}
KEPT |= {"pairs_of_pool": ("pool", "floor"), "pc_of_rollout": ("rollout", "pc")}
KEPT |= {f"{column}_of_pool": ("pool", column) for column in ("against", "logp")}
# What rows need besides, by name.
FACTS: dict[str, Callable[[RowValues], object]] = {
    "K": lambda s: s.evidence.facts["K"],
    "T": lambda s: s.evidence.facts["T"],
    "pool_size": lambda s: s.evidence.facts["sizes"]["pool"],
    "unrelated_text_pool_size": lambda s: s.evidence.facts["null_pool"][reading_of_ids(s.protocol)],
    "mu_norm": lambda s: s.evidence.facts["mu_norm"]["pool"],
    "own_mu_norm": lambda s: s.evidence.facts["mu_norm"][s.part],
    "mu_of": lambda s: "the evaluated targets" if "self_mu" in s.protocol.slips else "the pool",
    "probe_length": lambda s: max(PROBE_LENGTHS),
    "ceiling": lambda s: s[rows.RHO_CEILINGS[s.evidence.facts["ceiling"]]],
}


class RowValues:
    """Values of rows (``scores[row]``), ``raw`` or ``cen``, of one part's targets as a protocol reads them."""

    def __init__(self, evidence: Evidence, protocol: Protocol, kind: str = "cen", part: Optional[str] = None):
        self.evidence, self.protocol, self.kind = evidence, protocol, kind
        self.part = part or part_of(protocol)
        self._made: dict[rows.Row, object] = {}

    def needed(self, row: rows.Row) -> tuple:
        """What a row needs under this protocol; nothing where it is not measured."""
        return row.under[1] if row.under and row.under[0] in self.protocol.slips else row.needs

    def __getitem__(self, row: rows.Row):
        if row.part and row.part != self.part:
            return RowValues(self.evidence, self.protocol, self.kind, row.part)[row]
        if row not in self._made:
            # Ceilings take μ from the evaluated targets themselves while ``self_mu`` is in force.
            own = row.file == rows.CEILING_FILE and self.kind == "cen" and "self_mu" in self.protocol.slips
            self._made[row] = row.value(*(self._find(need, "own" if own else self.kind) for need in self.needed(row)))
        return self._made[row]

    def _find(self, need: rows.Row | str, centring: str):
        if isinstance(need, rows.Row):
            return self[need]
        return FACTS[need](self) if need in FACTS else self.look_up(need, centring)

    def look_up(self, name: str, centring: str) -> np.ndarray | pd.DataFrame:
        """What :data:`KEPT` names; the null has a column for each number of texts."""
        kind, column = KEPT[name]
        # Sources and paraphrases are decoded; of the slips of re-encoding only ``bos`` acts on ids.
        decoded = kind in ("source", "paraphrase")
        reading = self.protocol.reading if decoded else reading_of_ids(self.protocol)
        if kind == "source_loss" and not self.evidence.has(kind, self.part, reading):
            return np.empty((0, 1))  # no text is known
        column = CENTRED[column][centring] if column in CENTRED else column
        found = self.evidence.texts(kind, self.part, reading, column)
        return found if name != "null" else pd.DataFrame(found, columns=self.evidence.facts["null_k"][reading])


def score(evidence: Evidence, protocol: Protocol, chosen: Sequence[rows.Row], part: Optional[str] = None) -> Column:
    """The column of these rows of one protocol, of its own targets or those of ``part``; the first row is a mean over
    targets."""
    kinds = ("raw", "cen") if protocol.slips else ("raw", "cen", "cen1")
    scores = {kind: RowValues(evidence, protocol, kind, part) for kind in kinds}
    column = Column(protocol.reading, len(scores["cen"][chosen[0]]))
    for row in chosen:
        for kind in row.kinds:
            if kind not in scores or not scores[kind].needed(row):
                continue
            if row.summary is metrics.mean:
                column.add(row.at(kind), scores[kind][row])
            else:
                column.put(row.at(kind), *row.summary(scores[kind][row]))
    return column


def score_ablation(evidence: Evidence, with_rollouts: bool = False) -> dict:
    """``{"in_order": {step: column}, "alone": {slip: column}}`` as JSON, the steps in their order."""
    chosen = rows.OF_STEPS + (rows.OF_STEPS_OF_ROLLOUTS if with_rollouts else ())
    return {
        way: {step: score(evidence, protocol, chosen).to_json() for step, protocol in steps.items()}
        for way, steps in ablation_steps().items()
    }


def oracle_ceiling(evidence: Evidence) -> dict:
    """What notebook 03 keeps."""
    columns = {p.name: score(evidence, p, rows.OF_CEILINGS) for p in PROTOCOLS}
    columns["ladder"] = Column("ladder", evidence.facts["sizes"]["M"])
    for row, protocol in zip(rows.LADDER, LADDER):
        columns["ladder"].add(row.key, RowValues(evidence, protocol.fix("self_mu"))[row])
    return {"protocols": _as_json(columns), "ablation": score_ablation(evidence)}


# What notebook 04 shows: each protocol on its own targets, and on the other's.
WAYS = {
    "published": (PUBLISHED, rows.OF_ROLLOUTS, "in_sample"),
    "corrected": (CORRECTED, rows.OF_ROLLOUTS + rows.IN_SAMPLE, "held_out"),
    "published_on_held_out": (PUBLISHED, rows.OF_ANY_TARGETS, "held_out"),
    "corrected_on_in_sample": (CORRECTED, rows.OF_ANY_TARGETS, "in_sample"),
}


def centered_eval(evidence: Evidence) -> dict:
    """What notebook 04 keeps."""
    return {
        "protocols": _as_json({name: score(evidence, *way) for name, way in WAYS.items()}),
        "source_loss": score(evidence, CORRECTED, rows.OF_LOSSES + rows.OF_ENDS).to_json(),
        "ablation": score_ablation(evidence, with_rollouts=True),
    }


def rerank_eval(evidence: Evidence) -> dict:
    """What notebook 05 keeps."""
    return {"protocols": _as_json({p.name: score(evidence, p, rows.OF_RERANKS) for p in PROTOCOLS})}


def _as_json(columns: dict[str, Column]) -> dict[str, dict]:
    return {name: column.to_json() for name, column in columns.items()}


FILES: dict[str, Callable[[Evidence], dict]] = {
    rows.CEILING_FILE: oracle_ceiling,
    rows.EVALUATION_FILE: centered_eval,
    rows.RERANK_FILE: rerank_eval,
}
