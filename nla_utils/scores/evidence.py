"""Evidence: a row for each text as it was read and for each target, from which every results file is made.

Kept as one Parquet file a run; ``paper/EVIDENCE.md`` describes its columns. Needs no model.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from nla_utils.artefacts import RunFolder, atomic_write
from nla_utils.errors import ArtefactError
from nla_utils.protocol import CORRECTED, PAPER, Protocol

if TYPE_CHECKING:
    from nla_utils.run import Run

VERSION = 1
FILE = "results/evidence.parquet"
# The key of the file's own record among Parquet's metadata.
RECORD = b"nla_evidence"
# raw; centred by the pool's μ; centred by the mean of the part's own targets (slip ``self_mu``).
CENTRINGS = ("raw", "cen", "own")
KEYS = ("kind", "part", "reading")
_FLOATS = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [(name, pa.string()) for name in KEYS]
    + [("row", pa.int32()), ("draw", pa.int16()), ("tokens", pa.int16()), ("ids", pa.list_(pa.int32()))]
    # Of texts; norm and pc of targets too.
    + [(name, pa.float32()) for name in (*CENTRINGS, "anchor", "norm", "logp", "logp_paper")]
    + [("rank", pa.int32()), ("pc", _FLOATS), ("others", _FLOATS)]
    # Of the losses of sources, and of texts of the pool.
    + [(f"nats_{c}", _FLOATS) for c in ("own", "other", "mean", "none")]
    + [("against", _FLOATS)]
    # Of targets.
    + [(f"{what}_{c}", pa.float32()) for what in ("nearest", "floor", "nearest_other", "pair_floor") for c in CENTRINGS]
    + [("constant_mu", pa.float32())]
    + [(f"null_{c}", _FLOATS) for c in CENTRINGS]
    + [("null_left_out", _FLOATS)]
    + [(f"others_{what}_{c}", pa.float32()) for what in ("greedy", "best") for c in ("raw", "cen")]
    + [("others_curve", _FLOATS), ("greedy_rank", pa.int32())]
)


def part_of(protocol: Protocol) -> str:
    """The part of the targets that a protocol evaluates."""
    return "held_out" if protocol.held_out else "in_sample"


def reading_of_ids(protocol: Protocol) -> str:
    """The reading of texts that are ids and are never decoded: of the slips of re-encoding only ``bos`` acts on them."""
    return CORRECTED.name if protocol.bos else PAPER.name


def block(kind: str, part: str, reading: str, rows: Sequence[int], draws: Sequence[int] = (0,), **columns) -> pa.Table:
    """Rows of one kind: n draws of each of M targets. A column is (M, n), or (M, n, J) where a row holds J numbers;
    lists of different lengths, such as ``ids``, are given row by row. What is not given is null."""
    m, n = len(rows), len(draws)
    columns |= {key: [value] * (m * n) for key, value in zip(KEYS, (kind, part, reading))}
    columns |= {"row": np.repeat(rows, n).reshape(m, n), "draw": np.tile(draws, (m, 1))}
    return pa.table(
        [_array(columns[f.name], f.type) if f.name in columns else pa.nulls(m * n, f.type) for f in SCHEMA],
        schema=SCHEMA,
    )


def _array(values, kind: pa.DataType) -> pa.Array:
    if isinstance(values, list):
        return pa.array(values, kind)
    values = np.asarray(values)
    values = values.reshape(-1, *values.shape[2:])
    if pa.types.is_integer(kind):
        unknown = np.isnan(values)
        return pa.array(np.where(unknown, 0, values).astype(kind.to_pandas_dtype()), mask=unknown)
    if not pa.types.is_list(kind):
        return pa.array(values.astype(kind.to_pandas_dtype()))
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel().astype(kind.value_type.to_pandas_dtype())))


@dataclass(frozen=True)
class Evidence:
    """Rows of :data:`SCHEMA`, and what is said once a run.

    ``facts``: ``sizes``: M and the pool's; ``K`` and ``T`` of the rollouts; ``mu_norm`` of the pool and of each part;
    the null's ``null_k``, and its number of texts ``null_pool``, by reading; ``ceiling``, the row that ρ takes in
    ``paper``. ``made_from``: by results file, the hashes of the artefacts that its rows were made from.
    """

    table: pa.Table
    facts: dict = field(default_factory=dict)
    made_from: dict = field(default_factory=dict)

    def __or__(self, other: Evidence) -> Evidence:
        """Both; of a kind that both have, the rows of ``other``."""
        own = self.table.filter(pa.compute.invert(pa.compute.is_in(self.table["kind"], other.table["kind"].unique())))
        table = pa.concat_tables([own, other.table]).combine_chunks()
        return Evidence(table, self.facts | other.facts, self.made_from | other.made_from)

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return self.table.to_pandas()

    @cached_property
    def _places(self) -> dict[tuple, np.ndarray]:
        return self._frame.groupby(list(KEYS)).indices

    def has(self, kind: str, part: str, reading: str) -> bool:
        """Whether there are such rows."""
        return (kind, part, reading) in self._places

    def texts(self, kind: str, part: str, reading: str, column: str) -> np.ndarray:
        """A column of one kind's rows (M, n) as float64, targets and draws in order; (M, n, J) where a row holds a list,
        padded by NaN. Raises ``ArtefactError`` where there is no such row."""
        if not self.has(kind, part, reading):
            raise ArtefactError(f"the evidence holds no {kind} of {part} targets read as {reading}; rerun its notebook")
        chosen = self._frame.iloc[self._places[kind, part, reading]]
        found = chosen[column].to_list()
        if pa.types.is_list(SCHEMA.field(column).type):
            width = max(map(len, found))
            found = [np.pad(np.asarray(x, dtype=np.float64), (0, width - len(x)), constant_values=np.nan) for x in found]
        values = np.asarray(found, dtype=np.float64)
        return values.reshape(chosen["row"].nunique(), -1, *values.shape[1:])

    def targets(self, part: str, reading: str, column: str, kind: str = "target") -> np.ndarray:
        """A column of what there is one row a target of: (M,), or (M, J) where a row holds a list."""
        return self.texts(kind, part, reading, column)[:, 0]

    def null(self, part: str, reading: str, centring: str, ks: Sequence[int]) -> np.ndarray:
        """Expected best of k of the P unrelated texts (M, len(ks))."""
        kept = self.facts["null_k"][reading]
        return self.targets(part, reading, f"null_{centring}")[:, [kept.index(k) for k in ks]]

    def to_bytes(self, record: Mapping) -> bytes:
        """The Parquet file; ``record`` goes into its metadata."""
        record = {"version": VERSION, **record, "made_from": self.made_from, "facts": self.facts}
        table = self.table.replace_schema_metadata({RECORD: json.dumps(record)})
        buffer = io.BytesIO()
        floats = [f"{f.name}.list.element" if pa.types.is_list(f.type) else f.name for f in SCHEMA
                  if pa.float32() in (f.type, getattr(f.type, "value_type", None))]  # fmt: skip
        # Ids are kept plain and a column in one page: what repeats in texts is then found across them.
        whole = ["kind", "part", "reading", "row", "draw", "tokens", "rank", "greedy_rank"]
        pq.write_table(
            table, buffer, compression="zstd", compression_level=19, use_dictionary=whole, use_byte_stream_split=floats,
            write_page_checksum=True, data_page_size=1 << 26,
        )  # fmt: skip
        return buffer.getvalue()

    @classmethod
    def read(cls, path: Path) -> Evidence:
        """The evidence in a file; raises ``ArtefactError`` where it is missing, damaged or of another version."""
        rerun = "delete it and rerun notebooks 03, 04"
        try:
            table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
            record = json.loads(table.schema.metadata[RECORD])
        except FileNotFoundError:
            raise ArtefactError(f"{path} does not exist; run notebook 03, then 04") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(f"{path} is no evidence, or damaged ({error}); {rerun}") from None
        if record["version"] != VERSION or not table.schema.equals(SCHEMA):
            versions = f"{path} is evidence of version {record['version']}; this code reads version {VERSION}"
            raise ArtefactError(f"{versions}: {rerun}")
        return cls(table.replace_schema_metadata(None), record["facts"], record["made_from"])


def keep(run: Run, results: str, evidence: Evidence, made_from: Mapping[str, str]) -> Evidence:
    """Add what a results file is made from to the run's evidence; returns what is then on disk.

    What is there of an older state of the same artefacts is left out.
    """
    path = run.folder.file(FILE)
    evidence = Evidence(evidence.table, evidence.facts, {results: dict(made_from)})
    if path.exists():
        there = Evidence.read(path)
        others = [of for name, of in there.made_from.items() if name != results]
        if others and all(of.get(k, digest) == digest for of in others for k, digest in made_from.items()):
            evidence = there | evidence
    atomic_write(path, evidence.to_bytes(run.provenance))
    return evidence


def load(folder: RunFolder) -> Evidence:
    """The run's evidence; raises ``ArtefactError`` where it is missing, damaged, or of artefacts that have changed since."""
    path = folder.file(FILE)
    evidence = Evidence.read(path)
    for results, parents in evidence.made_from.items():
        for name, digest in parents.items():
            if folder.sha256_of(name) != digest:
                other = f"what {results} is made from is of another {name} than the run's"
                raise ArtefactError(f"{path}: {other}; rerun notebooks 03, 04")
    return evidence


def is_kept(folder: RunFolder, results: str, made_from: Mapping[str, str]) -> bool:
    """Whether the run's evidence holds what a results file of these artefacts is made from."""
    path = folder.file(FILE)
    return path.exists() and Evidence.read(path).made_from.get(results) == dict(made_from)
