"""Ways of reading side by side: how close their texts come to v, how fluent they are, and whether they hold anything of
v that its last words do not. Everything is scored as ``corrected`` scores it, on sources drawn anew."""

from __future__ import annotations

from typing import Optional

import numpy as np

from nla_utils.extensions.comparison import texts as of
from nla_utils.extensions.comparison.cases import SHARED, Cases, draw_cases
from nla_utils.extensions.comparison.directions import read_directions
from nla_utils.extensions.comparison.texts import Texts
from nla_utils.extensions.release.api import NLA
from nla_utils.extensions.release.methods import DRAWING
from nla_utils.metrics import fve
from nla_utils.scores.column import Column, Scorer
from nla_utils.stages.encoding import nats_per_token

# Nats a token are worth so much score to the guided search.
FLUENCIES = (0.005, 0.01, 0.02, 0.04, 0.08)
# How many last tokens of a text and of its source are compared.
ENDS = (1, 2, 4, 8, 16)
# A source's own last tokens, as texts to read: what a black box that sees the source could say.
ORACLES = (4, SHARED, 2 * SHARED)


def compare(nla: NLA, n: int, n_rollouts: int, n_directions: int, seed: int) -> dict:
    """The record of a comparison on ``n`` sources and their twins, all ways at the forward tokens of ``n_rollouts`` of the
    AV: ``rows`` (one a way of reading), ``directions``, and how alike the twins are."""
    cases, budget = draw_cases(nla, n, seed), of.budget_of(nla, n_rollouts)
    drawn = {method: of.draw(nla, method, cases.v, budget, seed) for method in DRAWING}
    start = drawn["reader"]
    made = [*drawn.values(), of.guided(nla, start, cases.v, budget)]
    made += [of.retrieved(nla, cases.v), of.single(nla, "the source", cases.sources)]
    made += [of.single(nla, f"the source's last {k}", [s[-k:] for s in cases.sources]) for k in ORACLES]
    rows = [_row(nla, cases, texts) for texts in made]
    for fluency in FLUENCIES:
        few = Texts("reader", start.ids[:n], start.h[:n])
        rows.append(_row(nla, cases, of.guided(nla, few, cases.v[:n], budget, fluency), fluency))
    alike = fve(cases.v[:n], cases.twin_v[:n], nla.bundle.mu)
    return {
        "n": n, "forward_tokens": budget, "seed": seed, "shared_tokens": SHARED, "twins_alike": float(alike.mean()),
        "rows": rows, "directions": read_directions(nla, n_directions, budget, seed),
    }  # fmt: skip


def _row(nla: NLA, cases: Cases, texts: Texts, fluency: Optional[float] = None) -> dict:
    column = score(nla, cases, texts)
    return {"method": texts.name, "k": texts.k, **({"fluency": fluency} if fluency else {}), **column.to_json()}


def score(nla: NLA, cases: Cases, texts: Texts) -> Column:
    """Of the likeliest text and of the best of K by score, over the n sources: ``{…}_cen`` and the margin over other
    sources' texts, ``{…}_nats`` a token behind BOS, ``{…}_minus_last_{n}``: the text's last n tokens less the source's
    own, ``{…}_names_twin``: how often the text is closer to its own source than to the twin (one half by chance); left
    out where the twins were not read."""
    n, mu = cases.n, nla.bundle.mu
    own_LK = fve(texts.h, cases.v[: len(texts.h), None], mu)
    chosen = {"greedy": np.zeros(len(own_LK), dtype=int), "best": 1 + own_LK[:, 1:].argmax(axis=1)}
    others = Scorer(cases.v[:n], nla.bundle.pool_v, mu).others(texts.h[:n])
    column = Column("corrected", n)
    for (name, at_L), other_M in zip(chosen.items(), others):
        ids = [texts.ids[i][at_L[i]] for i in range(n)]
        score_L = own_LK[np.arange(len(own_LK)), at_L]
        column.add(f"{name}_cen", score_L[:n])
        column.add(f"{name}_minus_others", score_L[:n] - other_M)
        column.add(f"{name}_nats", nats_per_token(nla.backbone, ids))
        for end in ENDS:
            column.add(f"{name}_minus_last_{end}", _beyond_the_end(nla, cases, ids, end))
        if len(own_LK) == 2 * n:
            h_Ld = texts.h[np.arange(2 * n), at_L]
            column.add(f"{name}_names_twin", _named(score_L, fve(h_Ld, cases.twin_v, mu)))
    return column


def _beyond_the_end(nla: NLA, cases: Cases, ids: list[list[int]], end: int) -> np.ndarray:
    """Score of each text's last tokens less that of its source's own last tokens, as many of them (n,)."""
    v_nd, mu = cases.v[: cases.n], nla.bundle.mu
    mine, true = (nla.backbone.encode([s[-end:] for s in part], start=True) for part in (ids, cases.sources[: cases.n]))
    return fve(mine, v_nd, mu) - fve(true, v_nd, mu)


def _named(own_L: np.ndarray, twin_L: np.ndarray) -> np.ndarray:
    """For each source the share of the two of it and its twin whose text is closer to its own; a tie counts half (n,).

    A text that says nothing of what stands before the shared end is right for one of the two, whatever it says.
    """
    hit_L = (own_L > twin_L) + 0.5 * (own_L == twin_L)
    return hit_L.reshape(2, -1).mean(axis=0)
