"""Evidence: a row for each text as it was read and for each target, from which every results file is made.

Kept as one Parquet file a run; ``paper/EVIDENCE.md`` describes its columns. Needs no model.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Optional, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from nla_utils import metrics
from nla_utils.config import FLOOR_ROWS, N_PARAPHRASES, POOL_TEXTS
from nla_utils.errors import ArtefactError
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import CORRECTED, PROTOCOLS, PUBLISHED, READINGS, Protocol
from nla_utils.store import RunFolder, atomic_write

if TYPE_CHECKING:
    from nla_utils.encoding import Texts
    from nla_utils.run import Run
    from nla_utils.targets import Targets
    from nla_utils.verbalizer import SourceLoss


VERSION = 3
FILE = "results/evidence.parquet"
# The key of the file's own record among Parquet's metadata.
RECORD = b"nla_evidence"
# raw; centred by the pool's μ; that with the pool's first principal direction projected out; centred by the mean of the
# part's own targets (slip ``self_mu``).
CENTRINGS = ("raw", "cen", "cen1", "own")
KEYS = ("kind", "part", "reading")
# What is kept once a centring: {what: {centring: column}}; ``score`` is that of a text.
_OF_TARGETS = ("nearest", "floor", "nearest_other", "pair_floor", "null", "null_sd")
CENTRED = {"score": {c: c for c in CENTRINGS}} | {what: {c: f"{what}_{c}" for c in CENTRINGS} for what in _OF_TARGETS}
CENTRED |= {what: {c: f"{what}_{c}" for c in CENTRINGS[:3]} for what in ("others_greedy", "others_best")}
CENTRED["null_left_out"] = {c: f"null_left_out_{c}" for c in ("cen", "cen1")}


def _columns(kind: pa.DataType, *names: str) -> list[tuple[str, pa.DataType]]:
    return [(column, kind) for name in names for column in CENTRED.get(name, {name: name}).values()]


_NUMBER, _NUMBERS = pa.float32(), pa.list_(pa.float32())
SCHEMA = pa.schema(
    _columns(pa.string(), *KEYS)
    + [("row", pa.int32()), ("draw", pa.int16()), ("tokens", pa.int16()), ("ids", pa.list_(pa.int32()))]
    # Of texts; norm and pc of targets too.
    + _columns(_NUMBER, "score", "anchor", "norm", "logp", "logp_published")
    + [("rank", pa.int32()), ("pc", _NUMBERS), ("others", _NUMBERS)]
    # Of the losses of sources, and of texts of the pool.
    + _columns(_NUMBERS, "nats_own", "nats_other", "nats_mean", "nats_none", "nats_ends_alike", "nats_begins_alike")
    + _columns(_NUMBERS, "against")
    # Of targets.
    + _columns(_NUMBER, "nearest", "floor", "nearest_other", "pair_floor", "null_sd", "constant_mu")
    + _columns(_NUMBERS, "null", "null_left_out")
    + _columns(_NUMBER, "others_greedy", "others_best")
    + [("others_curve", _NUMBERS), ("greedy_rank", pa.int32())]
)


def part_of(protocol: Protocol) -> str:
    """The part of the targets that a protocol evaluates."""
    return "held_out" if "in_sample" not in protocol.slips else "in_sample"


def reading_of_ids(protocol: Protocol) -> str:
    """The reading of texts that are ids, never decoded: of the slips of re-encoding only ``bos`` acts on them."""
    return CORRECTED.name if "bos" not in protocol.slips else PUBLISHED.name


def block(kind: str, part: str, reading: str, rows: Sequence[int], draws: Sequence[int] = (0,), **columns) -> pa.Table:
    """Rows of one kind: n draws of each of M targets. A column is (M, n), or (M, n, J) where a row holds J numbers;
    lists of different lengths, such as ``ids``, are given row by row. What is not given is null."""
    m, n = len(rows), len(draws)
    columns |= {key: [value] * (m * n) for key, value in zip(KEYS, (kind, part, reading))}
    columns |= {"row": np.repeat(rows, n).reshape(m, n), "draw": np.tile(draws, (m, 1))}
    given = [_array(columns[f.name], f.type) if f.name in columns else pa.nulls(m * n, f.type) for f in SCHEMA]
    return pa.table(given, schema=SCHEMA)


def _array(values, kind: pa.DataType) -> pa.Array:
    if not isinstance(values, list):
        values = np.asarray(values)
        values = values.reshape(-1, *values.shape[2:])
        if pa.types.is_list(kind):
            values = [*values.astype(np.float32)]
    # An unknown integer is null, an unknown float NaN.
    return pa.array(values, kind, from_pandas=pa.types.is_integer(kind))


@dataclass(frozen=True)
class Evidence:
    """Rows of :data:`SCHEMA`, and what is said once a run.

    ``facts``: ``sizes``: M and the pool's; ``K`` and ``T`` of the rollouts; ``mu_norm`` of the pool and of each part;
    the null's ``null_k``, and its number of texts ``null_pool``, by reading; ``ceiling``, the row that ρ takes in
    ``published``. ``made_from``: by results file, the hashes of the artefacts that its rows were made from.
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
        """A column of one kind's rows as float64, targets and draws in order: (M, n), or (M,) where there is one row a
        target; (M, n, J) or (M, J) where a row holds a list, padded by NaN. Raises ``ArtefactError`` where there is
        no such row."""
        if not self.has(kind, part, reading):
            raise ArtefactError(f"the evidence holds no {kind} of {part} targets read as {reading}; rerun its notebook")
        # Every protocol, kind and step of the ablation asks for the same ones again.
        key = kind, part, reading, column
        if key not in self._taken:
            self._taken[key] = self._take(*key)
        return self._taken[key]

    @cached_property
    def _taken(self) -> dict[tuple, np.ndarray]:
        return {}

    def _take(self, kind: str, part: str, reading: str, column: str) -> np.ndarray:
        places = self._places[kind, part, reading]
        found, m = self._frame[column].iloc[places], self._frame["row"].iloc[places].nunique()
        if pa.types.is_list(SCHEMA.field(column).type):
            found = pd.DataFrame(found.to_list())
        values = found.to_numpy(dtype=np.float64)
        values = values if len(values) == m else values.reshape(m, -1, *values.shape[1:])
        values.flags.writeable = False
        return values

    def to_bytes(self, record: Mapping) -> bytes:
        """The Parquet file; ``record`` goes into its metadata."""
        record = {"version": VERSION, **record, "made_from": self.made_from, "facts": self.facts}
        buffer = io.BytesIO()
        # Ids are kept plain and a column in one page: what repeats in texts is then found across them.
        pq.write_table(
            self.table.replace_schema_metadata({RECORD: json.dumps(record)}),
            buffer,
            compression="zstd",
            compression_level=19,
            use_dictionary=["kind", "part", "reading", "row", "draw", "tokens", "rank", "greedy_rank"],
            use_byte_stream_split=[f.name for f in SCHEMA if f.type == _NUMBER]
            + [f"{f.name}.list.element" for f in SCHEMA if f.type == _NUMBERS],
            write_page_checksum=True,
            data_page_size=1 << 26,
        )
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
    """The run's evidence; raises ``ArtefactError`` where it is missing, damaged, or of artefacts changed since."""
    path = folder.file(FILE)
    evidence = Evidence.read(path)
    # Hashes alone are compared, so nothing that makes artefacts need be imported: their specs are left aside.
    folder = replace(folder, config=None)
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


# Directions of the pool that coordinates are kept on, other targets that a rollout is scored against, and blocks of the
# pool that the null is taken without.
N_DIRECTIONS, OTHERS_KEPT, N_BLOCKS = 4, 8, 10
# Columns of log-probabilities, after how they are taken.
LOGP = {"sampled": "logp", "published": "logp_published"}
# Rollouts and the probe's texts are never centred by the targets' own mean.
CENTRINGS_OF = dict.fromkeys(("source", "paraphrase", "tail"), CENTRINGS)
CENTRINGS_OF |= dict.fromkeys(("rollout", "probe"), CENTRINGS[:3])


class Scorer:
    """M targets and the pool they are compared with: fve raw, or centred where ``mu_d`` is given.

    Args:
        v_Md: the targets' activations.
        pool_Pd: activations of P other texts.
        mu_d: what both sides are centred by.
        out_d: a direction at norm 1 that is projected out of both sides.
    """

    def __init__(
        self,
        v_Md: np.ndarray,
        pool_Pd: np.ndarray,
        mu_d: Optional[np.ndarray] = None,
        out_d: Optional[np.ndarray] = None,
    ):
        self.v, self.pool, self.mu, self.out = v_Md, pool_Pd, mu_d, out_d

    def own(self, h: np.ndarray) -> np.ndarray:
        """Score of each target's own texts: h (M, d) gives (M,), h (M, K, d) gives (M, K)."""
        return fve(h, self.v if h.ndim == 2 else self.v[:, None], self.mu, self.out)

    @cached_property
    def against_pool(self) -> np.ndarray:
        """Score of each text of the pool for each target (M, P)."""
        return self.against(self.pool)

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
        return fve_matrix(self.v, h_Pd, self.mu, self.out)

    def others(self, h_MKd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rollouts of every other target against this one: mean greedy (M,) and mean best-of-K (M,).

        Column 0 of ``h_MKd`` is greedy, the others are sampled.
        """
        scores_MMK = np.stack([self.against(h_Kd) for h_Kd in h_MKd], axis=1)
        greedy_MM, best_MM = scores_MMK[:, :, 0], scores_MMK[:, :, 1:].max(axis=2)
        return metrics.off_diagonal(greedy_MM).mean(axis=1), metrics.off_diagonal(best_MM).mean(axis=1)

    def others_curve(self, h_MKd: np.ndarray, ks: Sequence[int]) -> np.ndarray:
        """Exact K-curve of the K sampled rollouts of another target, mean over the others (M, len(ks))."""
        m = len(self.v)
        curve_MJ = np.zeros((m, len(ks)))
        for j in range(m):
            others = np.arange(m) != j
            curve_MJ[others] += metrics.exact_k_curve(fve_matrix(self.v[others], h_MKd[j], self.mu), ks)
        return curve_MJ / (m - 1)


class Part:
    """The targets that one protocol evaluates, and what texts of theirs score.

    Args:
        null_Pd: the null's texts as that protocol reads them.
    """

    def __init__(self, targets: Targets, protocol: Protocol, null_Pd: np.ndarray):
        self.protocol, self.name, self.rows = protocol, part_of(protocol), targets.eval_rows(protocol)
        self.v, self.pool, self.mu = targets.v[self.rows], targets.v[targets.pool], targets.mu
        self.own_mu = self.v.mean(axis=0)
        self.directions_4d = metrics.principal_directions(self.pool, N_DIRECTIONS)
        centres = {"raw": (), "cen": (self.mu,), "cen1": (self.mu, self.directions_4d[0]), "own": (self.own_mu,)}
        self.scorers = {kind: Scorer(self.v, self.pool, *centre) for kind, centre in centres.items()}
        self.anchor_Md = self.pool[self.scorers["cen"].against_pool.argmax(axis=1)]
        self.null_MP = np.sort(self.scorers["cen"].against(null_Pd), axis=1)

    def place(self, h: np.ndarray) -> dict[str, np.ndarray]:
        """‖h − μ‖ and the coordinates of h (…, d) on the pool's first principal directions."""
        gap = h.astype(np.float64) - self.mu
        return {"norm": np.linalg.norm(gap, axis=-1), "pc": gap @ self.directions_4d.T}

    def texts(self, texts: Texts, how: Protocol, once: bool, **more) -> pa.Table:
        """Rows of texts as a protocol reads them. Where they lie, and their rank among the null's texts, is kept with
        the protocol that evaluates the part; what does not depend on the reading is kept ``once``."""
        h_Mnd = texts.read_as(how)
        columns = {centring: self.scorers[centring].own(h_Mnd) for centring in CENTRINGS_OF[texts.kind]}
        if how.reading == self.protocol.reading:
            pairs = zip(self.null_MP, columns["cen"])
            rank = np.stack([len(null) - np.searchsorted(null, own, "left") for null, own in pairs])
            # NaN sorts last: a null that is not known has it at its end.
            unknown = np.isnan(columns["cen"]) | np.isnan(self.null_MP[:, -1:])
            columns |= {"rank": np.where(unknown, np.nan, rank), **self.place(h_Mnd)}
        if once:
            columns |= {"ids": texts.sequences} | {LOGP[kind]: logp_Mn for kind, logp_Mn in texts.logp.items()}
        columns |= {"tokens": texts.lengths, **more}
        return block(texts.kind, self.name, how.reading, self.rows, texts.draws, **columns)

    def target(self, reading: str, null_Pd: np.ndarray, ks: Sequence[int]) -> pa.Table:
        """A row a target: where it lies, its neighbours and floors, and the null's curve."""
        columns = self.place(self.v) | {"constant_mu": fve(self.mu, self.v)}
        null_MP = {centring: scorer.against(null_Pd) for centring, scorer in self.scorers.items()}
        for centring, scorer in self.scorers.items():
            others = metrics.off_diagonal(scorer.against(self.v))
            columns |= {
                f"nearest_{centring}": scorer.nearest,
                f"floor_{centring}": scorer.floor,
                f"nearest_other_{centring}": others.max(axis=1),
                f"pair_floor_{centring}": others.mean(axis=1),
                f"null_{centring}": metrics.exact_k_curve(null_MP[centring], ks),
                f"null_sd_{centring}": null_MP[centring].std(axis=1),
            }
        if reading == self.protocol.name:
            for centring, name in CENTRED["null_left_out"].items():
                columns[name] = metrics.curves_without_blocks(null_MP[centring], ks, N_BLOCKS)
        return block("target", self.name, reading, self.rows, **{k: np.asarray(x)[:, None] for k, x in columns.items()})

    def others(self, reading: str, h_MKd: np.ndarray) -> pa.Table:
        """A row a target: what the rollouts of other targets score, and the rank of its own v for its greedy text."""
        columns = {}
        for kind in CENTRED["others_greedy"]:
            greedy, best = self.scorers[kind].others(h_MKd)
            columns |= {f"others_greedy_{kind}": greedy, f"others_best_{kind}": best}
        ks = metrics.k_values(h_MKd.shape[1] - 1)
        columns["others_curve"] = self.scorers["cen"].others_curve(h_MKd[:, 1:], ks)
        columns["greedy_rank"] = metrics.rank_of_own(h_MKd[:, 0], self.v, self.mu)
        return block("others", self.name, reading, self.rows, **{k: x[:, None] for k, x in columns.items()})

    def pool_texts(self, pool: Texts) -> pa.Table:
        """Rows of the pool's first texts, each scored against every target of the part; in sample, of the first 512,
        which the published floor is made of."""
        h_Pd = self.pool if "bos" not in self.protocol.slips else pool.read_as(self.protocol)[:, 0]
        n = kept = min(POOL_TEXTS, len(h_Pd))
        scores, place = self.scorers["cen"].against(h_Pd[:n]).T, self.place(h_Pd[:n])
        floors = {}
        if self.protocol == PUBLISHED:
            kept = min(FLOOR_ROWS, len(h_Pd))
            for kind in ("raw", "cen"):
                others = metrics.off_diagonal(fve_matrix(self.pool[:kept], self.pool[:kept], self.scorers[kind].mu))
                floors[f"floor_{kind}"] = others.mean(axis=1, keepdims=True)
        columns = {
            "against": [*scores.astype(np.float32)],
            "norm": [*place["norm"]],
            "pc": [*place["pc"].astype(np.float32)],
            "logp": [*pool.logp["alone"][:n, 0]],
            "ids": pool.sequences[:n],
        }
        columns = {name: x + [None] * (kept - n) for name, x in columns.items()}
        return block(
            "pool", self.name, self.protocol.name, pool.rows[:kept], tokens=pool.lengths[:kept], **columns, **floors
        )


def null_texts(targets: Targets, ceilings: Mapping[str, Texts], protocol: Protocol) -> np.ndarray:
    """The null's texts (P, d) as a protocol reads them; those that are not known are left out, unless none is.

    Behind BOS a target's text reads as its own v, so there are as many as no protocol evaluates, the pool first.
    """
    behind_bos = "bos" not in protocol.slips
    h_Pd = targets.v[targets.unevaluated] if behind_bos else ceilings["pool"].read_as(protocol)[:, 0]
    known = np.isfinite(h_Pd[:, 0])
    return h_Pd[known] if known.any() else h_Pd


def of_ceilings(targets: Targets, ceilings: Mapping[str, Texts], k: int) -> Evidence:
    """What notebook 03 scores: targets, sources, paraphrases, last tokens and the pool's texts.

    ``k``: draws that best-of-K is taken of, for which the null is wanted. Of texts and readings that the ceilings do
    not hold, nothing is made.
    """
    held = [p for p in PROTOCOLS if p.texts("source") in ceilings]
    null = {p.name: null_texts(targets, ceilings, p) for p in held}
    parts = {part_of(p): Part(targets, p, null[p.name]) for p in held}
    null_k = {name: sorted({*metrics.k_values(len(h_Pd)), k, N_PARAPHRASES}) for name, h_Pd in null.items()}
    norms = {"pool": targets.mu} | {name: part.own_mu for name, part in parts.items()}
    facts = {
        "sizes": {"M": targets.n_eval, "pool": targets.pool_size},
        "mu_norm": {name: float(np.linalg.norm(mu)) for name, mu in norms.items()},
        "null_pool": {name: len(h_Pd) for name, h_Pd in null.items()},
        "null_k": null_k,
    }
    tables = []
    for part in parts.values():
        own = part.protocol
        tables += [other.target(own.name, null[own.name], null_k[own.name]) for other in parts.values()]
        tables.append(part.texts(ceilings[own.texts("tail")], own, once=True))
        if "pool" in ceilings:
            tables.append(part.pool_texts(ceilings["pool"]))
    for kind in ("source", "paraphrase"):
        first = {p.texts(kind): reading for reading, p in reversed(READINGS[kind].items())}
        for reading, protocol in sorted(READINGS[kind].items()):
            name = protocol.texts(kind)
            if name in ceilings and ceilings[name].reading(protocol) in ceilings[name].h:
                part = parts[part_of(protocol)]
                tables.append(part.texts(ceilings[name], protocol, once=reading == first[name]))
    return Evidence(pa.concat_tables(tables), facts)


def of_rollouts(
    targets: Targets,
    rollouts: Texts,
    ceilings: Mapping[str, Texts],
    probe: Texts,
    loss: Optional[SourceLoss] = None,
    ceiling: str = "paraphrase_bestof8",
) -> Evidence:
    """What notebook 04 scores: rollouts, what others' rollouts score, the probe's texts, and losses of the sources.

    ``ceiling``: the row of notebook 03 that ρ takes as ceiling in ``published``.
    """
    tables = []
    for own in PROTOCOLS:
        part = Part(targets, own, null_texts(targets, ceilings, own))
        rolled, probed = rollouts.at(part.rows), probe.at(part.rows)
        for protocol in PROTOCOLS:
            once, h_MKd = protocol == own, rolled.read_as(protocol)
            more = _against_anchor_and_others(part, h_MKd) if once else {}
            tables.append(part.texts(rolled, protocol, once, **more))
            tables.append(part.others(protocol.name, h_MKd))
            tables.append(part.texts(probed, protocol, once))
    if loss is not None:
        tables.append(of_losses(loss).table)
    return Evidence(pa.concat_tables(tables), {"K": rollouts.k, "T": rollouts.ids.shape[2], "ceiling": ceiling})


def of_losses(loss: SourceLoss) -> Evidence:
    """Nats of the held-out sources' tokens, by what stands in the AV's slot."""
    lengths = np.isfinite(loss.nats["own"]).sum(axis=1)
    nats = {f"nats_{c}": [row[:t] for row, t in zip(nats_MT, lengths)] for c, nats_MT in loss.nats.items()}
    part, reading = part_of(CORRECTED), CORRECTED.name
    return Evidence(block("source_loss", part, reading, loss.rows, tokens=lengths[:, None], **nats))


def _against_anchor_and_others(part: Part, h_MKd: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of rollouts against the stored v that is nearest to their target's, and against the v of other targets."""
    shifts = range(1, min(OTHERS_KEPT, len(part.v) - 1) + 1)
    others = [fve(h_MKd, np.roll(part.v, -s, axis=0)[:, None], part.mu) for s in shifts]
    return {"anchor": fve(h_MKd, part.anchor_Md[:, None], part.mu), "others": np.stack(others, axis=-1)}
