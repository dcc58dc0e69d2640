"""Evidence: a row for each text as it was read and for each target, from which every results file is made.

Kept as one Parquet file a run; ``paper/EVIDENCE.md`` describes its columns. Needs no model.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Mapping, Optional, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from nla_utils import metrics
from nla_utils.config import FLOOR_ROWS, N_PARAPHRASES, POOL_TEXTS, PROBE_LENGTHS, TAIL_LENGTHS
from nla_utils.errors import ArtefactError
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import CORRECTED, PROTOCOLS, PUBLISHED, Protocol
from nla_utils.store import RunFolder, atomic_write

if TYPE_CHECKING:
    from nla_utils.baselines import Ablation, Ceilings, ProbeTexts
    from nla_utils.rollouts import Rollouts
    from nla_utils.run import Run
    from nla_utils.targets import Targets
    from nla_utils.verbalizer import SourceLoss


VERSION = 2
FILE = "results/evidence.parquet"
# The key of the file's own record among Parquet's metadata.
RECORD = b"nla_evidence"
# raw; centred by the pool's μ; centred by the mean of the part's own targets (slip ``self_mu``).
CENTRINGS = ("raw", "cen", "own")
KEYS = ("kind", "part", "reading")
# What is kept once a centring: {what: {centring: column}}; ``score`` is that of a text.
_OF_TARGETS = ("nearest", "floor", "nearest_other", "pair_floor", "null")
CENTRED = {"score": {c: c for c in CENTRINGS}} | {what: {c: f"{what}_{c}" for c in CENTRINGS} for what in _OF_TARGETS}
CENTRED |= {what: {c: f"{what}_{c}" for c in ("raw", "cen")} for what in ("others_greedy", "others_best")}


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
    + _columns(_NUMBERS, "nats_own", "nats_other", "nats_mean", "nats_none", "against")
    # Of targets.
    + _columns(_NUMBER, "nearest", "floor", "nearest_other", "pair_floor", "constant_mu")
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
        places = self._places[kind, part, reading]
        found, m = self._frame[column].iloc[places], self._frame["row"].iloc[places].nunique()
        if pa.types.is_list(SCHEMA.field(column).type):
            found = pd.DataFrame(found.to_list())
        values = found.to_numpy(dtype=np.float64)
        return values if len(values) == m else values.reshape(m, -1, *values.shape[1:])

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
N_DIRECTIONS, N_OTHERS, N_BLOCKS = 4, 8, 10
BY_NAME = {p.name: p for p in PROTOCOLS}
# Rollouts and the probe's texts are never centred by the targets' own mean.
CENTRINGS_OF = dict.fromkeys(("source", "paraphrase", "tail"), CENTRINGS)
CENTRINGS_OF |= dict.fromkeys(("rollout", "probe"), CENTRINGS[:2])
# The protocol that evaluates a part.
OWN = {part_of(p): p for p in PROTOCOLS}


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


class Part:
    """The targets that one protocol evaluates, and what texts of theirs score.

    Args:
        pool_h: the null's texts (P, d) as that protocol reads them, ``None`` where they are not needed.
    """

    def __init__(self, targets: Targets, name: str, pool_h: Optional[np.ndarray] = None):
        self.targets, self.name, self.rows = targets, name, targets.eval_rows(OWN[name])
        self.v, self.pool, self.mu = targets.v[self.rows], targets.v[targets.pool], targets.mu
        self.own_mu = self.v.mean(axis=0)
        centres = {"raw": None, "cen": self.mu, "own": self.own_mu}
        self.scorers = {kind: Scorer(self.v, self.pool, mu) for kind, mu in centres.items()}
        self.directions_4d = metrics.principal_directions(self.pool, N_DIRECTIONS)
        self.anchor_Md = self.pool[self.scorers["cen"].against_pool.argmax(axis=1)]
        self.null_MP = None if pool_h is None else np.sort(self.scorers["cen"].against(_known(pool_h)), axis=1)

    def place(self, h: np.ndarray) -> dict[str, np.ndarray]:
        """‖h − μ‖ and the coordinates of h (…, d) on the pool's first principal directions."""
        gap = h.astype(np.float64) - self.mu
        return {"norm": np.linalg.norm(gap, axis=-1), "pc": gap @ self.directions_4d.T}

    def texts(self, kind: str, reading: str, h_Mnd: np.ndarray, draws: Sequence[int], tokens, **more) -> pa.Table:
        """Rows of texts, n of each target. Where they lie, and their rank among the null's texts, is kept with the reading
        of the protocol that evaluates the part."""
        columns = {centring: self.scorers[centring].own(h_Mnd) for centring in CENTRINGS_OF[kind]}
        if reading == OWN[self.name].name:
            pairs = zip(self.null_MP, columns["cen"])
            rank = np.stack([len(null) - np.searchsorted(null, own, "left") for null, own in pairs])
            # NaN sorts last: a null that is not known has it at its end.
            unknown = np.isnan(columns["cen"]) | np.isnan(self.null_MP[:, -1:])
            columns["rank"] = np.where(unknown, np.nan, rank)
            columns |= self.place(h_Mnd)
        return block(kind, self.name, reading, self.rows, draws, **columns, tokens=tokens, **more)

    def target(self, reading: str, pool_h: np.ndarray, ks: Sequence[int]) -> pa.Table:
        """A row a target: where it lies, its neighbours and floors, and the null's curve of the texts of ``pool_h``."""
        columns = self.place(self.v) | {"constant_mu": fve(self.mu, self.v)}
        for centring, scorer in self.scorers.items():
            others = metrics.off_diagonal(fve_matrix(self.v, self.v, scorer.mu))
            columns |= {
                f"nearest_{centring}": scorer.nearest,
                f"floor_{centring}": scorer.floor,
                f"nearest_other_{centring}": others.max(axis=1),
                f"pair_floor_{centring}": others.mean(axis=1),
                f"null_{centring}": metrics.exact_k_curve(scorer.against(pool_h), ks),
            }
        if reading == OWN[self.name].name:
            columns["null_left_out"] = metrics.curves_without_blocks(self.scorers["cen"].against(pool_h), ks, N_BLOCKS)
        return block("target", self.name, reading, self.rows, **{k: np.asarray(x)[:, None] for k, x in columns.items()})

    def others(self, reading: str, h_MKd: np.ndarray) -> pa.Table:
        """A row a target: what the rollouts of other targets score, and the rank of its own v for its greedy text."""
        columns = {}
        for kind in ("raw", "cen"):
            greedy, best = self.scorers[kind].others(h_MKd)
            columns |= {f"others_greedy_{kind}": greedy, f"others_best_{kind}": best}
        ks = metrics.k_values(h_MKd.shape[1] - 1)
        columns["others_curve"] = self.scorers["cen"].others_curve(h_MKd[:, 1:], ks)
        columns["greedy_rank"] = metrics.rank_of_own(h_MKd[:, 0], self.v, self.mu)
        return block("others", self.name, reading, self.rows, **{k: x[:, None] for k, x in columns.items()})

    def pool_texts(self, reading: str, h_Pd: np.ndarray, logp: np.ndarray) -> pa.Table:
        """Rows of the pool's first texts, each scored against every target of the part; with the published reading, of
        the first 512, which the published floor is made of."""
        n, rows = min(POOL_TEXTS, len(h_Pd)), self.targets.pool
        scores, place = self.scorers["cen"].against(h_Pd[:n]).T, self.place(h_Pd[:n])
        columns = {
            "against": [*scores.astype(np.float32)],
            "norm": [*place["norm"]],
            "pc": [*place["pc"].astype(np.float32)],
            "logp": [*logp[:n]],
            "ids": self.targets.sequences(rows[:n]),
        }
        floors, kept = {}, n
        if reading == PUBLISHED.name:
            kept = min(FLOOR_ROWS, len(rows))
            first = self.pool[:kept]
            for centring in ("raw", "cen"):
                others = metrics.off_diagonal(fve_matrix(first, first, self.scorers[centring].mu))
                floors[f"floor_{centring}"] = others.mean(axis=1, keepdims=True)
        columns = {name: x + [None] * (kept - n) for name, x in columns.items()}
        tokens = self.targets.lengths[rows[:kept]][:, None]
        return block("pool", self.name, reading, rows[:kept], tokens=tokens, **columns, **floors)


def of_ceilings(targets: Targets, ceilings: Ceilings, k: int, ablation: Optional[Ablation] = None) -> Evidence:
    """What notebook 03 scores: targets, sources, paraphrases, last tokens and the pool's texts.

    ``k``: draws that best-of-K is taken of, for which the null is wanted. Without ``ablation`` the readings between the
    two protocols are left out. Of protocols that the ceilings do not hold, nothing is made.
    """
    held = {name: ceilings.texts[p.name] for name, p in OWN.items() if p.name in ceilings.texts}
    parts = {name: Part(targets, name, texts.pool_h) for name, texts in held.items()}
    facts = {
        "sizes": {"M": targets.n_eval, "pool": targets.pool_size},
        "mu_norm": {
            "pool": float(np.linalg.norm(targets.mu)),
            **{name: float(np.linalg.norm(part.own_mu)) for name, part in parts.items()},
        },
        "null_pool": {},
        "null_k": {},
    }
    tables, replay, paraphrase = [], {}, {}
    for name, texts in ceilings.texts.items():
        null_Pd = _known(texts.pool_h)
        ks = sorted({*metrics.k_values(len(null_Pd)), k, N_PARAPHRASES})
        facts["null_pool"][name], facts["null_k"][name] = len(null_Pd), ks
        replay[name], paraphrase[name] = texts.replay, texts.paraphrase
        tables += [part.target(name, null_Pd, ks) for part in parts.values()]
        own = parts[part_of(BY_NAME[name])]
        lengths = np.minimum(TAIL_LENGTHS, targets.lengths[own.rows][:, None])
        tables.append(
            own.texts("tail", name, texts.tail, TAIL_LENGTHS, lengths, ids=_tails(targets, own.rows, lengths))
        )
        if ceilings.pool_logp is not None:
            pool_h = texts.pool_h if name == PUBLISHED.name else own.pool
            tables.append(own.pool_texts(name, pool_h, ceilings.pool_logp))
    replay |= ceilings.ladder
    if ablation is not None:
        replay, paraphrase = replay | ablation.replay, paraphrase | ablation.paraphrase
    # In an order of their own: artefacts that are read back have another than those just made.
    for reading, h_Md in sorted(replay.items()):
        part = parts[part_of_reading(reading)]
        ids = {"ids": targets.sequences(part.rows)} if reading in BY_NAME else {}
        tables.append(part.texts("source", reading, h_Md[:, None], [0], targets.lengths[part.rows][:, None], **ids))
    drawn = {name: texts.drawn for name, texts in ceilings.texts.items()} | (ablation.drawn if ablation else {})
    written = {_prompted(reading): texts for reading, texts in drawn.items()}
    for reading, h_Mnd in sorted(paraphrase.items()):
        part, texts = parts[part_of_reading(reading)], written[_prompted(reading)]
        once = {"ids": texts.sequences, "logp": texts.logp} if reading in drawn else {}
        tables.append(part.texts("paraphrase", reading, h_Mnd, range(N_PARAPHRASES), texts.lengths, **once))
    return Evidence(pa.concat_tables(tables), facts)


def of_rollouts(
    targets: Targets,
    rollouts: Rollouts,
    ceilings: Ceilings,
    probe: ProbeTexts,
    loss: Optional[SourceLoss] = None,
    ceiling: str = "paraphrase_bestof8",
) -> Evidence:
    """What notebook 04 scores: rollouts, what others' rollouts score, the probe's texts, and losses of the sources.

    ``ceiling``: the row of notebook 03 that ρ takes as ceiling in ``published``.
    """
    tables, n = [], max(PROBE_LENGTHS)
    for name, protocol in OWN.items():
        part = Part(targets, name, ceilings.texts[protocol.name].pool_h)
        own = rollouts.at(part.rows)
        for reading, as_read in BY_NAME.items():
            h_MKd = own.h(as_read)
            more = _first_reading(part, own, h_MKd) if as_read == protocol else {}
            tables.append(part.texts("rollout", reading, h_MKd, range(own.k + 1), own.lengths, **more))
            tables.append(part.others(reading, h_MKd))
            h_Mnd, ids_Mn = probe.h(as_read, part.rows), probe.at(part.rows)
            ids = (
                {"ids": [row[n - j :].tolist() for row in ids_Mn for j in PROBE_LENGTHS]} if as_read == protocol else {}
            )
            lengths = np.tile(PROBE_LENGTHS, (len(part.rows), 1))
            tables.append(part.texts("probe", reading, h_Mnd, PROBE_LENGTHS, lengths, **ids))
    if loss is not None:
        tables.append(of_losses(loss).table)
    return Evidence(pa.concat_tables(tables), {"K": rollouts.k, "T": rollouts.ids.shape[2], "ceiling": ceiling})


def of_losses(loss: SourceLoss) -> Evidence:
    """Nats of the held-out sources' tokens, by what stands in the AV's slot."""
    lengths = np.isfinite(loss.nats["own"]).sum(axis=1)
    nats = {f"nats_{c}": [row[:t] for row, t in zip(nats_MT, lengths)] for c, nats_MT in loss.nats.items()}
    part, reading = part_of(CORRECTED), CORRECTED.name
    return Evidence(block("source_loss", part, reading, loss.rows, tokens=lengths[:, None], **nats))


def _known(h_Pd: np.ndarray) -> np.ndarray:
    """The rows of texts that are known; where none is (released vectors alone), all of them, which are NaN."""
    known = np.isfinite(h_Pd[:, 0])
    return h_Pd[known] if known.any() else h_Pd


def part_of_reading(reading: str) -> str:
    """The part whose sources and paraphrases a reading is of."""
    return "held_out" if reading == CORRECTED.name or "in_sample" in reading.split("+") else "in_sample"


def _prompted(reading: str) -> tuple[bool, str]:
    """Which paraphrases a reading is of: how they were prompted for, and of which part."""
    return reading == CORRECTED.name or "pad_generate" in reading.split("+"), part_of_reading(reading)


def _tails(targets: Targets, rows: np.ndarray, lengths_Mn: np.ndarray) -> list[list[int]]:
    return [targets.sequence(i)[-n:] for i, lengths in zip(rows, lengths_Mn) for n in lengths]


def _first_reading(part: Part, own: Rollouts, h_MKd: np.ndarray) -> dict:
    """What is kept of rollouts once, with the reading of the protocol that evaluates them."""
    no_greedy = np.full((len(own.rows), 1), np.nan)
    shifts = range(1, min(N_OTHERS, len(own.rows) - 1) + 1)
    return {
        "ids": [own.sequence(m, j) for m in range(len(own.rows)) for j in range(own.k + 1)],
        "logp": np.hstack([no_greedy, own.logp]),
        "logp_published": np.hstack([no_greedy, own.logp_published]),
        "anchor": fve(h_MKd, part.anchor_Md[:, None], part.mu),
        "others": np.stack([fve(h_MKd, np.roll(part.v, -s, axis=0)[:, None], part.mu) for s in shifts], axis=-1),
    }
