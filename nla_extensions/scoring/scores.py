"""Scores of anyone's texts: how close each comes to the vector that it was written for, beside unrelated texts at equal
K, the texts of the other vectors, and the nearest text of the pool. Texts are read and compared as §11's are."""

from __future__ import annotations

import dataclasses
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Optional, Sequence

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nla_extensions.comparison.measure import LEAST, SHARED, twins
from nla_extensions.scoring.files import blocks, check_vectors, ids_of
from nla_extensions.scoring.page import cell
from nla_extensions.scoring.pool import Pool, pool_of
from nla_utils import metrics
from nla_utils.config import RunConfig
from nla_utils.encoding import nats_per_token
from nla_utils.errors import ConfigError, nearest
from nla_utils.evidence import N_BLOCKS
from nla_utils.lm.backbone import Backbone, pad
from nla_utils.lm.loading import load_backbone
from nla_utils.metrics import fve, fve_matrix, mean_direction
from nla_utils.protocol import CORRECTED, PROTOCOLS
from nla_utils.report.tables import bits_cell
from nla_utils.store import Progress, atomic_write, code_version, library_versions

# Texts that are read together, and other vectors that a vector's texts are scored against.
BLOCK, MOST_OTHERS = 4096, 256
# A source's own last tokens, as texts.
LAST = (1, 2, 4, 8, 16)
LEVEL = 0.05
# Share of vectors unlike the pool's that is worth a word.
ODD = 0.1
# So close, an activation of the pool is the vector's own.
SAME = 1 - 1e-6
# p-values by their null: what it is called, and what its number of texts or writers is.
NULLS = {"law": ("rank among unrelated texts", "P"), "writer": ("texts of other vectors", "J")}
# The key of what is said once, among the metadata of the Parquet file.
RECORD = b"nla_scores"


@dataclass(frozen=True)
class Measured:
    """A row of the table: numbers per vector (M,), and of what they stand beside; ``key`` is the name in JSON."""

    key: str
    label: str
    own_M: np.ndarray
    against: str = ""
    other_M: Optional[np.ndarray] = None

    def record(self) -> dict:
        """Means with their 95 % intervals over vectors, and of the paired difference."""
        found = {"label": self.label, "against": self.against or None} | _mean("value", self.own_M)
        if self.other_M is not None:
            found |= _mean("null", self.other_M) | _mean("difference", self.own_M - self.other_M)
        return found


def _mean(name: str, values_M: np.ndarray) -> dict:
    value, ends = metrics.mean(values_M) if np.isfinite(values_M).any() else (np.nan, [np.nan, np.nan])
    # One vector has no interval.
    known = len(values_M) > 1 and np.isfinite(ends).all()
    return {name: float(value) if np.isfinite(value) else None, f"{name}_ci95": ends if known else None}


@dataclass
class Scores:
    """What :func:`score` found: ``rows`` of the table; ``bits`` at ``k`` (value, interval, by rank), ``None`` where
    texts were searched for; the exact curve ``curve`` (J, 2) at ``ks``, of the texts and of unrelated ones; ``texts``,
    a row each; ``vectors``, a row each, with p-values; ``notes``: what a reader should know of them."""

    method: str
    about: dict
    provenance: dict
    k: int
    counts: list[int]
    rows: list[Measured]
    bits: Optional[dict]
    ks: list[int]
    curve: np.ndarray
    curve_ci95: np.ndarray
    texts: pd.DataFrame
    vectors: pd.DataFrame
    discoveries: dict
    notes: list[str] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """Rows with their nulls and paired differences, 95 % intervals over vectors in brackets."""
        rows = [row.record() for row in self.rows]
        shown = {"value": "value", "null": "beside it", "difference": "difference"}
        cells = [{name: cell(row, which) for which, name in shown.items()} for row in rows]
        made = pd.DataFrame(cells, index=pd.Index([row["label"] for row in rows], name=self.method))
        return made.assign(**{"which is": [row["against"] or "–" for row in rows]})

    def record(self) -> dict:
        """All of it but texts and provenance, as JSON holds it."""
        return {
            "method": self.method,
            **self.about,
            "K": self.k,
            "uneven": len(set(self.counts)) > 1,
            "rows": {row.key: row.record() for row in self.rows},
            "bits": self.bits,
            "curve": {"k": self.ks, "texts": self.curve[:, 0].tolist(), "unrelated": self.curve[:, 1].tolist()},
            "vectors": self.vectors.to_dict("list"),
            "discoveries": self.discoveries,
            "notes": self.notes,
        }

    def to_parquet(self, path: str | Path) -> None:
        """One row a text, with its vector's p-values; what is said once is JSON among the file's metadata. Raises
        ``ArtefactError`` where it cannot be written, as :meth:`to_html` does."""
        table = pa.Table.from_pandas(self.texts.merge(self.vectors, on="id"), preserve_index=False)
        record = json.dumps(self.provenance | self.record(), ensure_ascii=False, allow_nan=False)
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, RECORD: record}), buffer)
        atomic_write(Path(path), buffer.getvalue())

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: the table, the curve, and texts of the worst vector, the best and five others."""
        picture = io.StringIO()
        self.plot().savefig(picture, format="svg")
        best = self.texts[self.texts["best"]]
        order = best["score"].to_numpy().argsort()
        others = np.random.default_rng(0).permutation(order[1:-1])[:5]
        chosen = {"the worst": order[:1], "the best": order[-1:], "at random": others}
        shown = [(why, best.iloc[i].to_dict()) for why, at in chosen.items() for i in at[: len(order)]]
        source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
        values = {"table": self.table().to_html(border=0), "bits": self.bits_line(), "plot": picture.getvalue()}
        page = jinja2.Template(source, autoescape=True).render(scores=self, shown=shown, **values)
        atomic_write(Path(path), page.encode())

    def bits_line(self) -> str:
        """Bits at k, pool P, and what they can at most be, in one line."""
        if self.bits is None:
            return "the texts were searched for: no bits, no p-values"
        p, b = self.about["P"], self.bits
        by_rank = "" if b["by_rank"] is None else f", {b['by_rank']:.1f} by rank"
        said = bits_cell(b["value"], b["ci95"], self.k, p)
        return f"bits at {self.k}, {p:,} unrelated texts: {said}{by_rank}; at most {b['limits'][1]:.1f}"

    def p_lines(self) -> list[str]:
        """How many vectors have a text that is not chance, and how large the null would have to be for one."""
        lines = []
        for name, found in self.discoveries.items():
            null, what = NULLS[name]
            counts = f"{found['BH']} (Benjamini–Hochberg), {found['BY']} (Benjamini–Yekutieli)"
            lines.append(
                f"p by {null}: {counts} of {self.about['M']} at a false discovery rate of {LEVEL}; the smallest p is "
                f"{found['smallest']:.2g}, a single discovery needs {what} ≥ {found[f'{what}_for_one']:,}"
            )
        return lines

    def plot(self):
        """The K-curve beside that of unrelated texts, as a matplotlib figure."""
        from nla_utils.report import figures as of

        @of.styled
        def draw():
            fig, ax = of.plt.subplots(figsize=(of.WIDTH / 2, 2.6), layout="constrained")
            for j, (label, color) in enumerate(((self.method, of.COLOURS["gemma3-270m"]), ("unrelated", of.NULL_GREY))):
                ax.plot(self.ks, self.curve[:, j], "o-", color=color)
                ax.fill_between(self.ks, *self.curve_ci95[:, j].T, color=color, alpha=0.2, lw=0)
                ax.annotate(label, (self.ks[-1], self.curve[-1, j]), xytext=(4, 0), textcoords="offset points")
            of.log2_k_axis(ax, self.ks)
            of.style(ax, "K", "centred score, best of K")
            of.plt.close(fig)
            return fig

        return draw()


@torch.inference_mode()
def score(
    texts: Sequence,
    v: np.ndarray,
    backbone: str | Backbone = RunConfig.backbone,
    *,
    layer: Optional[int] = None,
    pool: Optional[str | Path | Pool] = None,
    protocol: str = CORRECTED.name,
    names: Optional[Sequence[str]] = None,
    method: str = "texts",
    sources: Optional[Sequence] = None,
    directions: bool = False,
    searched: bool = False,
    max_over_tokens: bool = False,
    encoder: Optional[Callable[[list[list[int]]], np.ndarray]] = None,
) -> Scores:
    """Score texts against the vectors (M, d) that they were written for.

    Args:
        texts: for each vector a text, or a list of K (not all need have the same K); a text is a string or token ids.
        backbone: a registry name, hub id or folder; or one that is loaded, which ``layer`` then changes.
        pool: a folder of ``nla pool`` or of a finished run, a :class:`Pool`, or drawn and kept in the cache.
        protocol: ``corrected``, or ``published``: texts and the null are read without the start token.
        sources: the text that each vector was taken from: its last tokens and its twin are then in the table.
        directions: the vectors are no activations but directions from μ (of an SAE's decoder, of steering).
        searched: the writer looked at v: there are then no bits and no p-values.
        max_over_tokens: a text is read at every token, and the best counts; the null has as many tokens.
        encoder: gives activations (N, d) of token ids in place of the model: a trained reconstructor.

    Raises ``ConfigError`` for what does not fit, ``ArtefactError`` for a pool that does not.
    """
    known = {p.name: p for p in PROTOCOLS}
    if protocol not in known:
        raise ConfigError(f"protocol {protocol!r}: {nearest(protocol, known)}")
    if encoder is not None and max_over_tokens:
        raise ConfigError("an encoder reads a text as a whole: max_over_tokens is for the backbone alone")
    if not isinstance(backbone, Backbone):
        backbone = load_backbone(RunConfig(backbone=backbone, layer=layer))
    elif layer is not None:
        backbone = dataclasses.replace(backbone, layer=layer)
    v, names = np.asarray(v), list(map(str, range(len(v)) if names is None else names))
    v_Md = check_vectors(v, names, backbone.d, backbone.name)
    ids = ids_of(texts, names, backbone)
    source_ids = None if sources is None else [own[0] for own in ids_of(sources, names, backbone)]
    pool = pool_of(pool, backbone)
    notes = []
    if directions:
        norm = np.linalg.norm(pool.v - pool.mu, axis=1).mean()
        v_Md = (pool.mu + v_Md * norm / np.linalg.norm(v_Md, axis=1, keepdims=True)).astype(np.float32)
        notes.append("the vectors are directions, no activations of a text: no text need come close to one")
    else:
        notes += warnings_of(v_Md, pool)
    own_P = (fve_matrix(pool.v, v_Md, pool.mu) > SAME).any(axis=1)
    if own_P.any():
        pool = pool.without(own_P)
        notes.append(f"{own_P.sum()} texts of the pool are sources of vectors; they are left out of it")
    most = max(map(len, ids))
    if most > len(pool.v):
        raise ConfigError(
            f"a vector has {most} texts, the pool holds {len(pool.v)}: `nla pool --n {4 * most}` draws more, into a "
            "folder for --pool"
        )
    begun = [text[:1] == [backbone.start_id] for own in ids for text in own if len(text) > 1]
    if begun and all(begun):
        raise ConfigError(
            f"every text begins with the start token {backbone.start_id}: leave it out, it is put in front"
        )
    if any(begun):
        notes.append(f"{sum(begun)} texts begin with the start token, and are read behind two of them")
    empty = sum(not text for own in ids for text in own)
    if empty:
        notes.append(f"{empty} texts are empty: the start token alone is read in their place")
    if len(v_Md) == 1:
        notes.append("one vector: there are no intervals, no texts of others, and nothing to identify it among")
    longest = max(map(len, pool.ids))
    if max_over_tokens and max(len(text) for own in ids for text in own) > longest:
        notes.append(
            f"some texts are longer than the pool's, of up to {longest} tokens: for those the null is too weak"
        )
    reading = Reading(backbone, "bos" not in known[protocol].slips, max_over_tokens, encoder)
    about = {"protocol": protocol, "M": len(v_Md), "P": len(pool.v), **pool.about}
    about |= {"read_by": "an encoder" if encoder else "the backbone", "max_over_tokens": max_over_tokens}
    provenance = {"identity": backbone.identity(), "code": code_version(), "libraries": library_versions()}
    provenance["device"] = backbone.device.type
    found = _Comparison(reading, pool, v_Md, ids, names)
    rows = found.rows() + (found.rows_of_sources(source_ids) if source_ids else [])
    rows += [found.row_of_directions()] if directions else []
    p_values, discoveries = ({}, {}) if searched else found.p_values()
    curve_MJ2 = np.stack([found.curve, found.null_curve[:, [found.null_ks.index(k) for k in found.ks]]], axis=2)
    return Scores(
        method=method,
        about=about,
        provenance=provenance,
        k=found.k,
        counts=found.counts,
        rows=rows,
        bits=None if searched else found.bits(),
        ks=found.ks,
        curve=curve_MJ2.mean(axis=0),
        curve_ci95=np.array([[metrics.ci95(x_M) for x_M in pair_2M] for pair_2M in curve_MJ2.transpose(1, 2, 0)]),
        texts=pd.concat(found.texts, ignore_index=True),
        vectors=pd.DataFrame({"id": names, **{f"p_{name}": p_M for name, p_M in p_values.items()}}),
        discoveries=discoveries,
        notes=notes,
    )


@dataclass(frozen=True)
class Reading:
    """How texts become activations: with the start token or without, at the last token or at the one that scores best,
    by the backbone or by an ``encoder``."""

    backbone: Backbone
    start: bool
    every_token: bool = False
    encoder: Optional[Callable[[list[list[int]]], np.ndarray]] = None

    @property
    def differs(self) -> bool:
        """Whether a text of the pool is read as anything but its own activation."""
        return not self.start or self.every_token or self.encoder is not None

    def states(self, texts: Sequence[list[int]]) -> list[np.ndarray]:
        """h (T, d) float32 of each text: at its last token (T = 1), or at all. Equal texts are read once."""
        place = {tuple(text): i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}
        unique = list(map(list, place))
        if self.encoder is not None:
            h_Ud = np.asarray(self.encoder(unique), dtype=np.float32)
            if h_Ud.shape != (len(unique), self.backbone.d) or not np.isfinite(h_Ud).all():
                raise ConfigError(
                    f"the encoder gave {h_Ud.shape}, or NaN; it must be ({len(unique)}, {self.backbone.d})"
                )
            found: Sequence = h_Ud[:, None]
        elif self.every_token:
            found = self._all_tokens(unique)
        else:
            rows = unique if self.start else [text or [self.backbone.start_id] for text in unique]
            found = self.backbone.encode(rows, start=self.start)[:, None]
        return [found[place[tuple(text)]] for text in texts]

    def _all_tokens(self, texts: list[list[int]]) -> list[np.ndarray]:
        """At every token, the start token aside unless it is all there is."""
        head = [self.backbone.start_id] if self.start else []
        rows = [head + text or [self.backbone.start_id] for text in texts]
        order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), [np.empty(0)] * len(rows)
        for batch in np.array_split(order, -(-len(rows) // 32)):
            ids_BT, mask_BT = pad([rows[i] for i in batch], self.backbone.pad_id, "right")
            h_BTd = self.backbone.hidden_at_layer(input_ids=ids_BT.to(self.backbone.device)).float().cpu().numpy()
            for i, h_Td, n in zip(batch, h_BTd, mask_BT.sum(dim=1).tolist()):
                found[i] = h_Td[min(len(head), n - 1) : n].copy()
        return found


# What is told of a text against its vector.
NAMED = ("score", "score_cen1", "cosine", "variance_explained")


class _Comparison:
    """One pass over the texts, block by block; of activations only the best text's of each vector is kept.

    ``best`` and ``null``: by name the best text's numbers (M,), and those of the best of as many unrelated texts, on
    average. ``first``: the best of each vector's first k texts, k the smallest number of texts; ``others`` (M, J): the
    same of J other vectors' texts, scored against this one. ``closer``: how many texts of the pool equal or beat the
    best one (M,).
    """

    def __init__(self, reading: Reading, pool: Pool, v_Md: np.ndarray, ids: list[list[list[int]]], names: list[str]):
        self.reading, self.pool, self.v, self.ids, self.mu = reading, pool, v_Md, ids, pool.mu
        self.counts, m = [len(own) for own in ids], len(v_Md)
        self.k, self.n_others = min(self.counts), min(MOST_OTHERS, m - 1)
        self.ks, self.null_ks = metrics.k_values(self.k), sorted({*metrics.k_values(len(pool.v)), self.k})
        own_Pd = pool.v[: pool.size]
        self.out, guess_d = metrics.principal_directions(own_Pd, 1)[0], mean_direction(own_Pd)
        self.unexplained_M = ((v_Md / np.linalg.norm(v_Md, axis=1, keepdims=True) - guess_d) ** 2).sum(axis=1)
        self.nearest = fve_matrix(v_Md, own_Pd, self.mu).max(axis=1)
        self.null_states = reading.states(pool.ids) if reading.differs else [v_d[None] for v_d in pool.v]
        self.best, self.null = ({name: np.full(m, np.nan) for name in (*NAMED, "nats")} for _ in range(2))
        self.mean, self.floor, self.first = (np.empty(m) for _ in range(3))
        self.chosen, self.closer, self.best_h = np.empty(m, dtype=int), np.empty(m, dtype=int), np.empty_like(v_Md)
        self.others = np.empty((m, self.n_others))
        self.curve, self.null_curve = np.empty((m, len(self.ks))), np.empty((m, len(self.null_ks)))
        self.left_out = np.empty((m, N_BLOCKS, len(self.null_ks)))
        self.texts: list[pd.DataFrame] = []
        for block in Progress(list(blocks(self.counts, BLOCK)), desc="reading texts", unit="block"):
            states = iter(reading.states([text for own in ids[block] for text in own]))
            null = self._null_scores(block)
            for b, i in enumerate(range(*block.indices(m))):
                null_P = {name: x_BP[b] for name, x_BP in null.items()}
                self._add(i, names[i], [next(states) for _ in ids[i]], null_P)
        self.best["nats"] = nats_per_token(reading.backbone, [own[j] for own, j in zip(ids, self.chosen)])

    def _numbers(self, block: slice, h_Pd: np.ndarray) -> dict[str, np.ndarray]:
        """What P activations give against each vector of a block (B, P), by name."""
        cosine_BP = 2 * fve_matrix(self.v[block], h_Pd) - 1
        explained_BP = 1 - (2 - 2 * cosine_BP) / self.unexplained_M[block, None]
        score_BP, cen1_BP = (fve_matrix(self.v[block], h_Pd, self.mu, out) for out in (None, self.out))
        return dict(zip(NAMED, (score_BP, cen1_BP, cosine_BP, explained_BP)))

    def _null_scores(self, block: slice) -> dict[str, np.ndarray]:
        """The same of the pool's texts (B, P) for a block of vectors, each text at the token that scores best."""
        if not self.reading.every_token:
            return self._numbers(block, np.concatenate(self.null_states))
        found = []
        for i in range(*block.indices(len(self.v))):
            # As many tokens as the vector's own texts have on average.
            n = max(1, round(np.mean([len(text) for text in self.ids[i]])))
            states = [h_Td[:n] for h_Td in self.null_states]
            found.append(self._numbers(slice(i, i + 1), self._at_best(i, states)))
        return {name: np.concatenate([x[name] for x in found]) for name in NAMED}

    def _at_best(self, i: int, states: Sequence[np.ndarray]) -> np.ndarray:
        """The activation (K, d) of each text at the token that scores best for vector i."""
        ends = np.cumsum([len(h_Td) for h_Td in states])
        h_Sd = np.concatenate(states)
        if len(h_Sd) == len(states):
            return h_Sd
        score_S = fve(h_Sd, self.v[i], self.mu)
        return h_Sd[[first + score_S[first:end].argmax() for first, end in zip([0, *ends], ends)]]

    def _add(self, i: int, name: str, states: list[np.ndarray], null_P: dict[str, np.ndarray]) -> None:
        h_Kd, n = self._at_best(i, states), len(states)
        own_K = {name: x_1K[0] for name, x_1K in self._numbers(slice(i, i + 1), h_Kd).items()}
        j = self.chosen[i] = int(own_K["score"].argmax())
        order = np.argsort(null_P["score"])
        ordered = null_P["score"][order]
        rank_K = len(ordered) - np.searchsorted(ordered, own_K["score"], "left")
        self.closer[i], weights_P = rank_K[j], metrics.expected_max_weights(len(order), n)
        for key in NAMED:
            self.best[key][i], self.null[key][i] = own_K[key][j], weights_P @ null_P[key][order]
        if self.pool.nats is not None:
            self.null["nats"][i] = weights_P @ self.pool.nats[order]
        self.mean[i], self.floor[i], self.best_h[i] = own_K["score"].mean(), ordered.mean(), h_Kd[j]
        self.first[i] = own_K["score"][: self.k].max()
        self.curve[i] = metrics.exact_k_curve(own_K["score"][None], self.ks)[0]
        self.null_curve[i] = metrics.exact_k_curve(ordered[None], self.null_ks)[0]
        left_out = metrics.curves_without_blocks(null_P["score"][None], self.null_ks, N_BLOCKS)
        self.left_out[i] = left_out.reshape(N_BLOCKS, -1)
        if self.n_others:
            # This vector's texts against the n vectors before it.
            before = (i - np.arange(1, self.n_others + 1)) % len(self.v)
            against = fve_matrix(self.v[before], np.concatenate(states[: self.k]), self.mu)
            self.others[before, np.arange(self.n_others)] = against.max(axis=1)
        texts = list(map(self.reading.backbone.decode_text, self.ids[i]))
        columns = {"id": name, "draw": range(n), "text": texts, "ids": self.ids[i]}
        columns |= {"tokens": [len(text) for text in self.ids[i]], "best": np.arange(n) == j, "rank": rank_K, **own_K}
        self.texts.append(pd.DataFrame(columns))

    def rows(self) -> list[Measured]:
        """The table's rows that need nothing more."""
        best, null, equal = self.best, self.null, "unrelated texts at equal K"
        found = [
            Measured("mean", "mean", self.mean, "one unrelated text", self.floor),
            Measured("best", "best of K", best["score"], equal, null["score"]),
            Measured(
                "best_cen1",
                "best of K, without the first principal direction",
                best["score_cen1"],
                equal,
                null["score_cen1"],
            ),
            Measured("best_beside_retrieval", "best of K", best["score"], "the nearest text of the pool", self.nearest),
            Measured(
                "variance_explained",
                "variance explained, best",
                best["variance_explained"],
                equal,
                null["variance_explained"],
            ),
            Measured("cosine", "cosine, not centred, best", best["cosine"], equal, null["cosine"]),
            Measured("nats", "nats a token, best", best["nats"], equal, null["nats"]),
        ]
        if self.n_others:
            m, rank_M = len(self.v), metrics.rank_of_own(self.best_h, self.v, self.mu)
            chance = (1 / np.arange(1, m + 1)).mean()
            of_others = f"best of {self.k} of another vector's texts"
            found += [
                Measured("best_beside_others", f"best of {self.k}", self.first, of_others, self.others.mean(axis=1)),
                Measured("identified", "ranks its own vector first", (rank_M == 1) * 1.0, "chance", np.full(m, 1 / m)),
                Measured("reciprocal_rank", "reciprocal rank of its own", 1 / rank_M, "chance", np.full(m, chance)),
            ]
        return found

    def rows_of_sources(self, sources: list[list[int]]) -> list[Measured]:
        """The source's own last tokens as texts, and whether the best text is closer to its source than to a twin that
        ends alike."""
        found, states, score_M = [], self.reading.states, self.best["score"]
        for n in LAST:
            h_Md = np.stack([h_Td[-1] for h_Td in states([source[-n:] for source in sources])])
            of = f"the source's own last {n}"
            found.append(Measured(f"best_beside_last_{n}", "best of K", score_M, of, fve(h_Md, self.v, self.mu)))
            if n == SHARED:
                shared_Md = h_Md
        if len(sources) > 1 and min(map(len, sources)) >= LEAST:
            twin_Md = self.reading.backbone.encode(twins(sources), start=True)

            def hit(h_Md: np.ndarray) -> np.ndarray:
                return np.heaviside(fve(h_Md, self.v, self.mu) - fve(h_Md, twin_Md, self.mu), 0.5)

            of = f"its last {SHARED} tokens, which both end in"
            found.append(
                Measured("names_twin", "closer to its source than to a twin", hit(self.best_h), of, hit(shared_Md))
            )
        return found

    def row_of_directions(self) -> Measured:
        """The best text against the vector with its coordinates in another order."""
        shuffled_Md = self.mu + np.random.default_rng(0).permuted(self.v - self.mu, axis=1)
        other_M = fve(self.best_h, shuffled_Md, self.mu)
        return Measured(
            "best_beside_shuffled", "best of K", self.best["score"], "the same at shuffled coordinates", other_M
        )

    def bits(self) -> dict:
        """Bits at k, pool P, with interval; by rank where all K are equal."""
        p = len(self.pool.v)
        value, ends = metrics.bits_of_means((self.curve[:, -1], self.null_curve, self.left_out, self.null_ks, self.k))
        limits = list(metrics.limits_of_bits(self.k, p))
        found = {"value": value, "ci95": ends if len(self.v) > 1 else None, "by_rank": None, "limits": limits}
        if len(set(self.counts)) == 1:
            surprise_M = metrics.surprise_of_rank(self.closer, p)
            found["by_rank"] = metrics.bits_by_rank((surprise_M, p, self.k))[0]
        return found

    def p_values(self) -> tuple[dict[str, np.ndarray], dict]:
        """p-values (M,) by their null, and what Benjamini's two methods find among them.

        ``law``: of the rank among the pool's texts, K/(P + K) at least. ``writer``: the same selection among the texts
        of J other vectors, 1/(J + 1) at least (PROTOCOL.md §11).
        """
        m, p = len(self.v), len(self.pool.v)
        p_values = {"law": np.array([metrics.chance_of_rank(r, p, n) for r, n in zip(self.closer, self.counts)])}
        needed = {"law": max(self.counts) * (m / LEVEL - 1), "writer": m / LEVEL - 1}
        if self.n_others:
            found = [metrics.p_of_null(x, null_J) for x, null_J in zip(self.first, self.others)]
            p_values["writer"] = np.array(found, dtype=float)
        discoveries = {}
        for name, p_M in p_values.items():
            bh, by = metrics.discoveries(p_M, LEVEL)
            counts = {"BH": bh, "BY": by, f"{NULLS[name][1]}_for_one": int(np.ceil(needed[name]))}
            discoveries[name] = {"smallest": float(p_M.min()), **counts}
        return p_values, discoveries


def warnings_of(v_Md: np.ndarray, pool: Pool) -> list[str]:
    """What vectors say by their norm, their part along μ and their first principal coordinate if they are not of the
    pool's kind, with the likely cause."""
    mu_d, found = pool.mu.astype(np.float64), []
    norm_M, norm_P = (np.linalg.norm(x, axis=1) for x in (v_Md, pool.v))
    along_M, along_P = (x @ mu_d / n / np.linalg.norm(mu_d) for x, n in ((v_Md, norm_M), (pool.v, norm_P)))
    first_d = metrics.principal_directions(pool.v[: pool.size], 1)[0]
    at_M, at_P = ((x - mu_d) @ first_d for x in (v_Md, pool.v))
    layer = "another layer or model, or read without the start token, or at it"

    def outside(a_M: np.ndarray, a_P: np.ndarray) -> float:
        margin = (a_P.max() - a_P.min()) / 2
        return ((a_M < a_P.min() - margin) | (a_M > a_P.max() + margin)).mean()

    if np.abs(norm_M - 1).max() < 1e-3 < abs(norm_P.mean() - 1):
        found.append("every vector has norm 1: they were divided by their norms")
    elif (share := outside(norm_M, norm_P)) > ODD:
        ratio = np.median(norm_M) / np.median(norm_P)
        found.append(
            f"{share:.0%} of the vectors' norms are unlike the pool's, {ratio:.3g} times as large: scaled, or {layer}"
        )
    if np.median(along_M) < along_P.min() and np.abs(np.median(along_M)) < along_P.min() / 2:
        said = f"the vectors have a cosine of {np.median(along_M):.2f} with μ, the pool's {np.median(along_P):.2f}"
        found.append(
            f"{said}: differences of activations, rows of an SAE's decoder or steering vectors are --directions"
        )
    elif (share := outside(along_M, along_P)) > ODD:
        found.append(f"{share:.0%} of the vectors' cosines with μ are unlike the pool's: {layer}")
    if (share := outside(at_M, at_P)) > ODD:
        said = f"{share:.0%} of the vectors' first principal coordinates are unlike the pool's"
        found.append(f"{said}: {layer}, or of another kind of text")
    return found
