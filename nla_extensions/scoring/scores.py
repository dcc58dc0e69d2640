"""Scores of anyone's texts: how close each comes to the vector that it was written for, beside unrelated texts at equal
K, the texts of the other vectors, and the nearest text of the pool. Texts are read and compared as §11's are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Callable, Optional, Sequence

import numpy as np
import pandas as pd
import torch

from nla_extensions.comparison.measure import LEAST, SHARED, twins
from nla_extensions.scoring.files import blocks, check_vectors, ids_of
from nla_extensions.scoring.found import LEVEL, NULLS, Measured, Scores
from nla_extensions.scoring.pool import Pool, pool_of
from nla_extensions.scoring.reading import Reading, notes_of_texts, warnings_of
from nla_utils import metrics
from nla_utils.config import RunConfig
from nla_utils.encoding import nats_per_token
from nla_utils.errors import ConfigError, nearest
from nla_utils.evidence import N_BLOCKS
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.loading import load_backbone
from nla_utils.metrics import fve, fve_matrix, mean_direction
from nla_utils.protocol import CORRECTED, PROTOCOLS
from nla_utils.store import Progress, code_version, library_versions

# Texts that are read together, and other vectors that a vector's texts are scored against.
BLOCK, MOST_OTHERS = 4096, 256
# A source's own last tokens, as texts.
LAST = (1, 2, 4, 8, 16)
# So close, an activation of the pool is the vector's own.
SAME = 1 - 1e-6


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
        searched: the texts were optimised against this score, or chosen by it from more than these: there are then no
            bits and no p-values.
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
            f"a vector has {most} texts, the pool holds {len(pool.v)}; `nla pool --backbone {backbone.name} --layer "
            f"{backbone.layer} --n {4 * most}`, with the same --dtype, prints a folder with more: give it as --pool"
        )
    notes += notes_of_texts(ids, backbone, max(map(len, pool.ids)) if max_over_tokens else None)
    if len(v_Md) == 1:
        notes.append("one vector: there are no intervals, no texts of others, and nothing to identify it among")
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
