"""What depth does: runs that differ in their layer, and what text alone can reach at every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import pandas as pd

from nla_extensions.tail_reader.tables import reader_column
from nla_utils import rows
from nla_utils.report.results import RunResults, group
from nla_utils.report.tables import number, with_interval
from nla_utils.rows import Row

# The results file of `nla depth` and notebook 08.
RESULTS = "depth"
# What text can reach needs no AV, nor does the reader need training: (label, protocol, row).
TEXT_CURVES = (
    (rows.TAILS[8].label, "corrected", rows.TAILS[8]),
    (rows.RETRIEVAL.label, "corrected", rows.RETRIEVAL),
    ("replay, as published", "published", rows.REPLAY),
    (rows.PARAPHRASE.label, "corrected", rows.PARAPHRASE),
    ("tail reader, greedy", "reader", rows.GREEDY),
    (rows.UNRELATED.label, "corrected", rows.UNRELATED),
)
AV_CURVE = Row("AV, best-of-K", rows.BEST.key)
# What of the AV's score is owed to v.
AV_DIFFERENCES = (
    Row("AV − unrelated texts, best-of-K", rows.BEST_MINUS_UNRELATED.key),
    Row("AV − AV of other targets, best-of-K", rows.BEST_MINUS_OTHERS.key),
    Row("AV − AV of other targets, greedy", rows.GREEDY_MINUS_OTHERS.key),
)
# A column of numbers by protocol and results file.
Columns = Callable[[str, str], dict]


@dataclass(frozen=True)
class Depth:
    """Results of several layers that are otherwise alike, by layer, and what was found of text alone, if that was
    measured: ``{"K", "layers", …}``, at more layers, from sequences of its own."""

    runs: dict[int, RunResults]
    record: Optional[dict]

    @property
    def backbone(self) -> str:
        return next(iter(self.runs.values())).backbone

    @property
    def title(self) -> str:
        """The backbone, and what the names of the runs have in common."""
        first, *others = self.runs.values()
        shared = [p for p in first.profile.split("-") if all(p in r.profile.split("-") for r in others)]
        return f"{self.backbone} · {'-'.join(shared)}"

    @property
    def label(self) -> str:
        """The backbone and the number of targets, for readers."""
        return next(iter(self.runs.values())).label

    @property
    def sequences(self) -> dict[str, str]:
        """By layer where an AV was trained: whether from the sequences that text alone was measured on."""
        return {
            layer: "the same" if r.seed == _seed(self.record) else f"seed {r.seed}" for layer, r in self.runs.items()
        }

    @property
    def texts(self) -> dict[int, Columns]:
        """Columns of what text can reach, the reader's among it, by layer."""
        if self.record is None:
            return self.evaluated
        layers = {int(layer): columns for layer, columns in self.record["layers"].items()}
        return {layer: lambda protocol, _, c=columns: c[protocol] for layer, columns in sorted(layers.items())}

    @property
    def evaluated(self) -> dict[int, Columns]:
        """Columns of the runs, by layer."""
        return {layer: lambda protocol, name, r=r: _column(r, protocol, name) for layer, r in self.runs.items()}


def _seed(record: Optional[dict]) -> Optional[int]:
    return record and record["identity"]["seed"]


def _column(results: RunResults, protocol: str, name: str) -> dict:
    return reader_column(results) if protocol == "reader" else results.column(name, protocol)


def depths(everything: Sequence[RunResults]) -> list[Depth]:
    """Every set of results that says something about depth: of several layers, or with a record of text alone.

    Beside a record stand runs of any seed, of each layer the one that shares the record's where there is one.
    """
    recorded = {(r.backbone, r.family): record for r in everything if (record := r.optional(RESULTS))}
    others = [r for r in everything if (r.backbone, r.family) not in recorded]
    swept = group(others, lambda r: (r.backbone, r.family, r.seed), lambda r: r.layer, 2)
    found = [
        _beside([r for r in everything if (r.backbone, r.family) == family], recorded[family])
        for family in sorted(recorded)
    ]
    return found + [Depth(layers, None) for layers in swept]


def _beside(family: Sequence[RunResults], record: dict) -> Depth:
    chosen: dict[int, RunResults] = {}
    for results in sorted(family, key=lambda r: (r.seed != _seed(record), r.seed)):
        chosen.setdefault(results.layer, results)
    return Depth(dict(sorted(chosen.items())), record)


def depth_table(depth: Depth) -> pd.DataFrame:
    """One row a layer: ‖μ‖, the raw floor, what text can reach there, and what an AV reaches where one was trained."""
    table = []
    for layer, columns in depth.texts.items():
        of_pool = columns("corrected", rows.CEILING_FILE)
        row = {"layer": layer, "‖μ‖": number(of_pool["mu_norm"], 1), "raw floor": number(of_pool[rows.FLOOR.raw])}
        row |= {label: with_interval(columns(p, r.file), r.cen) for label, p, r in TEXT_CURVES}
        row[rows.PARAPHRASE_MINUS_UNRELATED.label] = with_interval(of_pool, rows.PARAPHRASE_MINUS_UNRELATED.cen)
        against = columns("reader", rows.EVALUATION_FILE)
        row["reader − NN-retrieval"] = with_interval(against, rows.GREEDY_MINUS_RETRIEVAL.cen)
        if layer in depth.runs:
            of_av = depth.evaluated[layer]("corrected", rows.EVALUATION_FILE)
            row |= {r.label: with_interval(of_av, r.cen) for r in (AV_CURVE, *AV_DIFFERENCES)}
            row["AV's sequences"] = depth.sequences[layer]
        table.append(row)
    return pd.DataFrame(table).set_index("layer").fillna("–")
