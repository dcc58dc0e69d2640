"""Ways of reading side by side: how close their texts come to v, how fluent they are, and whether they hold anything of
v that its last words do not. Everything is scored as ``corrected`` scores it, on sources drawn anew, each with a twin
that ends alike; and on vectors that are no activation of a text: a way of reading that scores well on those is gaming
the score."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Sequence

import numpy as np

from nla_extensions.release.api import NLA
from nla_extensions.release.verbalizers import VERBALIZERS
from nla_extensions.tail_reader.rollouts import GUIDED_BATCH, guided_search
from nla_utils.encoding import Texts, nats_per_token, read
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.evidence import Scorer
from nla_utils.lm.sampling import SamplingSettings, row_streams
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import CORRECTED
from nla_utils.scores import Column
from nla_utils.store import Progress, RunFolder, json_hash, read_record, write_record
from nla_utils.targets import draw_sequences

# Tokens that a source and its twin share, at the end; before them each has at least as many again, twice.
SHARED = 8
LEAST = 3 * SHARED
# How many last tokens of a text and of its source are compared.
ENDS = (1, 2, 4, 8, 16)
# A source's own last tokens, as texts to read: what a black box that sees the source could say.
ORACLES = (4, SHARED, 2 * SHARED)
# Draws of the reader that the guided search starts from, and what a nat a token may cost it in score.
GUIDED_DRAWS = 64
PRICES = {f"guided, λ = {price:g}": price for price in (0.005, 0.01, 0.02, 0.04, 0.08)}


@dataclass
class Cases:
    """``sources`` (2 n token sequences) and ``v`` (2 n, d): n sources drawn from the start token, then their twins.

    A twin is the next source's text up to its last 8 tokens, and then this source's last 8. ``ends_h``: activations of
    the sources' own last tokens (n, d), by how many of :data:`ENDS`.
    """

    sources: list[list[int]]
    v: np.ndarray
    ends_h: dict[int, np.ndarray]

    @property
    def n(self) -> int:
        return len(self.sources) // 2

    @property
    def twin_v(self) -> np.ndarray:
        """The activation of each source's other one (2 n, d)."""
        return np.roll(self.v, self.n, axis=0)


def draw_cases(nla: NLA, n: int, seed: int) -> Cases:
    """n sources of at least 24 tokens, sampled as the targets of §11 are, and their twins. Raises ``ConfigError`` for
    fewer than two, or where the AV's texts are too short to have twins."""
    backbone, settings = nla.backbone, SamplingSettings(max_new_tokens=nla.bundle.av.config.max_new_tokens)
    if n < 2:
        raise ConfigError(f"n is {n}; a source has its twin's beginning from another, so at least 2 are needed")
    if settings.max_new_tokens < LEAST:
        raise ConfigError(f"this AV writes {settings.max_new_tokens} tokens; sources with twins have at least {LEAST}")
    drawn: list[list[int]] = []
    first, size = 0, min(2 * n, backbone.sample_batch)
    while len(drawn) < n:
        samples = draw_sequences(backbone, settings, row_streams(seed, "compare", range(first, first + size)))
        drawn += [s for s in map(samples.sequence, range(size)) if len(s) >= LEAST]
        first += size
    sources = drawn[:n] + twins(drawn[:n])
    ends_h = {end: backbone.encode([s[-end:] for s in drawn[:n]], start=True) for end in ENDS}
    return Cases(sources, backbone.encode(sources, start=True), ends_h)


def twins(sources: Sequence[list[int]]) -> list[list[int]]:
    """For each source another that ends in the same 8 tokens and differs before."""
    return [other[:-SHARED] + own[-SHARED:] for own, other in zip(sources, [*sources[1:], sources[0]])]


def draw(nla: NLA, method: str, v_Md: np.ndarray, budget: int, seed: int) -> Texts:
    """The texts of a way of reading that draws, the likeliest first, then as many draws as the budget has room for, one
    at least."""
    cost = getattr(nla.verbalizer(method), "cost", nla.verbalizer("av").cost)
    k = min(max(1, budget // cost), len(nla.backbone.head_weight))
    together, ids = max(1, nla.backbone.sample_batch // (k + 1)), []
    for first in Progress(range(0, len(v_Md), together), desc=method, unit="batch"):
        part = v_Md[first : first + together]
        ids += nla.write(part, k, method, seed, first).sequences
    return _read(nla, len(v_Md), ids)


def guided(nla: NLA, start: Texts, v_Md: np.ndarray, budget: int, fluency: float = 0.0) -> Texts:
    """The guided search from the reader's first draws, one text for each of the first M activations."""
    bundle, found, first_draws = nla.bundle, [], slice(1 + GUIDED_DRAWS)
    h = {reading: h_MKd[:, first_draws] for reading, h_MKd in start.h.items()}
    start = replace(start, ids=start.ids[:, first_draws], lengths=start.lengths[:, first_draws], h=h)
    for first in Progress(range(0, len(v_Md), GUIDED_BATCH), desc="guided search", unit="batch"):
        part = slice(first, min(first + GUIDED_BATCH, len(v_Md)))
        search = guided_search(bundle.reader, nla.backbone, v_Md[part], bundle.mu, start.take(part), budget, fluency)
        found += search.ids.tolist()
    return single(nla, found)


def retrieved(nla: NLA, v_Md: np.ndarray) -> Texts:
    """The stored text whose activation is nearest: a text that is chosen with v in sight and was written without it."""
    nearest_M = fve_matrix(v_Md, nla.bundle.pool_v, nla.bundle.mu).argmax(axis=1)
    return single(nla, [nla.bundle.pool_texts[i] for i in nearest_M])


def single(nla: NLA, texts: Sequence[Sequence[int]]) -> Texts:
    """One text an activation, which is its likeliest and its best of one."""
    return _read(nla, len(texts), [text for text in texts for _ in range(2)])


def _read(nla: NLA, m: int, sequences: Sequence[Sequence[int]]) -> Texts:
    return read(nla.backbone, Texts.of("rollout", range(m), sequences), CORRECTED)


def compare(
    nla: NLA, n: int, n_rollouts: int, n_directions: int, seed: int, unfinished: Path, more: Sequence[str] = ()
) -> dict:
    """The record of a comparison on ``n`` sources and their twins, all ways, and the verbalizers named in ``more``, at
    the forward tokens of ``n_rollouts`` of the AV: ``rows`` (one a way of reading), ``directions``, and how alike the
    twins are.

    ``unfinished`` is the file that keeps what is there, for the caller to remove once it has written the record. Raises
    ``ArtefactError`` where it is of another comparison.
    """
    cases, budget = draw_cases(nla, n, seed), n_rollouts * nla.verbalizer("av").cost
    asked = {"n": n, "forward_tokens": budget, "seed": seed, "shared_tokens": SHARED} | ({"more": more} if more else {})
    methods = [*VERBALIZERS, *more]
    conditions = RunFolder(unfinished, nla.backbone.identity(), device=nla.backbone.device.type).conditions
    plan = {**asked, "of": json_hash({**conditions, **nla.bundle.made_from, "directions": n_directions})}
    kept = read_record(unfinished) if unfinished.exists() else {"plan": plan, "parts": {}}
    if kept["plan"] != plan:
        raise ArtefactError(f"{unfinished} is left from another comparison; delete it and rerun")
    rows, directions = [], []

    def keep(name: str, make: Callable[[], list[dict]]) -> list[dict]:
        """The rows of a part, made if they are not kept, and kept as soon as they are there."""
        if name not in kept["parts"]:
            kept["parts"][name] = make()
            write_record(unfinished, kept)
        return kept["parts"][name]

    def row(name: str, texts: Texts) -> dict:
        paid = {"fluency": PRICES[name]} if name in PRICES else {}
        return {"method": name, "k": texts.k, **paid, **score(nla, cases, texts).to_json()}

    for name, make in _ways(nla, cases, methods, budget, seed).items():
        rows += keep(name, lambda: [row(name, make())])
    for kind, v_nd in vectors(nla, n_directions).items():
        directions += keep(kind, lambda: read_directions(nla, kind, v_nd, methods, budget, seed))
    alike = fve(cases.v[:n], cases.twin_v[:n], nla.bundle.mu)
    return {**asked, "twins_alike": float(alike.mean()), "rows": rows, "directions": directions}


def _ways(nla: NLA, cases: Cases, methods: Sequence[str], budget: int, seed: int) -> dict[str, Callable[[], Texts]]:
    """By name how each way's texts are made; what the reader draws is drawn once for all that start from it."""
    n, v_Ld, sources = cases.n, cases.v, cases.sources
    drawn = functools.cache(lambda method: draw(nla, method, v_Ld, budget, seed))
    ways: dict[str, Callable[[], Texts]] = {method: functools.partial(drawn, method) for method in methods}
    ways["guided"] = lambda: guided(nla, drawn("reader"), v_Ld, budget)
    ways["retrieved"] = lambda: retrieved(nla, v_Ld)
    ways["the source"] = lambda: single(nla, sources)
    for k in ORACLES:
        ways[f"the source's last {k}"] = lambda k=k: single(nla, [s[-k:] for s in sources])
    for name, price in PRICES.items():
        ways[name] = lambda price=price: guided(nla, drawn("reader"), v_Ld[:n], budget, price)
    return ways


def score(nla: NLA, cases: Cases, texts: Texts) -> Column:
    """Of the likeliest text and of the best of K by score, over the n sources: ``{…}_cen`` and the margin over other
    sources' texts, ``{…}_nats`` a token behind BOS, ``{…}_minus_last_{n}``: the text's last n tokens less the source's
    own, ``{…}_names_twin``: how often the text is closer to its own source than to the twin (one half by chance); left
    out where the twins were not read."""
    n, mu, h_LKd = cases.n, nla.bundle.mu, texts.read_as(CORRECTED)
    own_LK = fve(h_LKd, cases.v[: len(h_LKd), None], mu)
    chosen = {"greedy": np.zeros(len(own_LK), dtype=int), "best": 1 + own_LK[:, 1:].argmax(axis=1)}
    others = Scorer(cases.v[:n], nla.bundle.pool_v, mu).others(h_LKd[:n])
    column = Column("corrected", n)
    for (name, at_L), other_M in zip(chosen.items(), others):
        ids = [texts.sequence(i, at_L[i]) for i in range(n)]
        score_L = own_LK[np.arange(len(own_LK)), at_L]
        column.add(f"{name}_cen", score_L[:n])
        column.add(f"{name}_minus_others", score_L[:n] - other_M)
        column.add(f"{name}_nats", nats_per_token(nla.backbone, ids))
        for end, true_nd in cases.ends_h.items():
            mine_nd = nla.backbone.encode([text[-end:] for text in ids], start=True)
            column.add(f"{name}_minus_last_{end}", fve(mine_nd, cases.v[:n], mu) - fve(true_nd, cases.v[:n], mu))
        if len(own_LK) == 2 * n:
            # A text that says nothing of what stands before the shared end is right for one of the two, whatever it
            # says. A tie counts half.
            twin_L = fve(h_LKd[np.arange(2 * n), at_L], cases.twin_v, mu)
            hit_L = (score_L > twin_L) + 0.5 * (score_L == twin_L)
            column.add(f"{name}_names_twin", hit_L.reshape(2, -1).mean(axis=0))
    return column


def _difference(rng: np.random.Generator, a_Nd: np.ndarray) -> np.ndarray:
    """Between the means of two halves of the activations, drawn anew for each."""
    halves = [rng.permutation(len(a_Nd)) for _ in a_Nd]
    middle = len(a_Nd) // 2
    return np.stack([a_Nd[order[:middle]].mean(axis=0) - a_Nd[order[middle:]].mean(axis=0) for order in halves])


# Vectors that are made from stored activations, measured from their mean, at an activation's distance from it.
KINDS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "an activation": lambda _, a_Nd: a_Nd,
    "mean of two activations": lambda _, a_Nd: (a_Nd + np.roll(a_Nd, 1, axis=0)) / 2,
    "difference of two means": _difference,
    "coordinates shuffled": lambda rng, a_Nd: rng.permuted(a_Nd, axis=1),
    "Gaussian": lambda rng, a_Nd: rng.normal(size=a_Nd.shape),
}


def vectors(nla: NLA, n: int) -> dict[str, np.ndarray]:
    """n vectors of each kind (n, d) float32, μ added, made from the last n stored activations."""
    mu, own = nla.bundle.mu, nla.bundle.pool_v[-n:] - nla.bundle.mu
    norm, found = np.linalg.norm(own, axis=1).mean(), {}
    for kind, make in KINDS.items():
        a_nd = make(np.random.default_rng(0), own)
        scale = 1 if kind == "an activation" else norm / np.linalg.norm(a_nd, axis=1, keepdims=True)
        found[kind] = (mu + a_nd * scale).astype(np.float32)
    return found


def read_directions(
    nla: NLA, kind: str, v_nd: np.ndarray, methods: Sequence[str], budget: int, seed: int
) -> list[dict]:
    """For each way of reading: the score of the best text that the budget buys for vectors of a kind, and the chance
    that the best of as many unrelated texts scores less; means over n vectors with intervals."""
    # Texts that vectors were made from are kept out of what they are compared with.
    kept, records = nla.without_last(len(v_nd)), []
    mu, pool_v = kept.bundle.mu, kept.bundle.pool_v
    drawn = {method: draw(kept, method, v_nd, budget, seed) for method in methods}
    for method, texts in {**drawn, "guided": guided(kept, drawn["reader"], v_nd, budget)}.items():
        score_n = fve(texts.read_as(CORRECTED)[:, 1:], v_nd[:, None], mu).max(axis=1)
        # The guided search has looked at as many texts as it had tokens for.
        k = drawn["reader"].k if method == "guided" else texts.k
        column = Column("corrected", len(v_nd))
        column.add("score", score_n)
        column.add("percentile", (fve_matrix(v_nd, pool_v, mu) < score_n[:, None]).mean(axis=1) ** k)
        records.append({"method": method, "kind": kind, "k": k, **column.to_json()})
    return records
