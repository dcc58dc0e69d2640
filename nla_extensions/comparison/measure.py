"""Ways of reading side by side: how close their texts come to v, how fluent they are, and whether they hold anything of
v that its last words do not. Everything is scored as ``corrected`` scores it, on sources drawn anew."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Callable, Optional

import numpy as np

from nla_extensions.comparison import texts as of
from nla_extensions.comparison.cases import SHARED, Cases, draw_cases
from nla_extensions.comparison.directions import read_directions, vectors
from nla_extensions.comparison.texts import Texts
from nla_extensions.release.api import NLA
from nla_extensions.release.methods import DRAWING
from nla_utils.encoding import nats_per_token
from nla_utils.errors import ArtefactError
from nla_utils.evidence import Scorer
from nla_utils.metrics import fve
from nla_utils.scores import Column
from nla_utils.store import RunFolder, json_hash, read_record, write_record

# Nats a token are worth so much score to the guided search.
FLUENCIES = (0.005, 0.01, 0.02, 0.04, 0.08)
# A source's own last tokens, as texts to read: what a black box that sees the source could say.
ORACLES = (4, SHARED, 2 * SHARED)


class Kept:
    """What is measured is kept in a file as soon as it is there, so that a comparison that was cut goes on where it was.

    Raises ``ArtefactError`` where the file is of another comparison.
    """

    def __init__(self, path: Path, plan: dict):
        self.path, self.plan, self.parts = path, plan, {}
        if path.exists():
            record = read_record(path)
            if record["plan"] != plan:
                raise ArtefactError(f"{path} is left from another comparison; delete it and rerun")
            self.parts = record["parts"]

    def get(self, name: str, make: Callable[[], list[dict]]) -> list[dict]:
        """The rows of a part, made if they are not kept."""
        if name not in self.parts:
            self.parts[name] = make()
            write_record(self.path, {"plan": self.plan, "parts": self.parts})
        return self.parts[name]


def compare(nla: NLA, n: int, n_rollouts: int, n_directions: int, seed: int, unfinished: Path) -> dict:
    """The record of a comparison on ``n`` sources and their twins, all ways at the forward tokens of ``n_rollouts`` of the
    AV: ``rows`` (one a way of reading), ``directions``, and how alike the twins are.

    ``unfinished`` is the file that keeps what is there, for the caller to remove once it has written the record.
    """
    cases, budget = draw_cases(nla, n, seed), of.budget_of(nla, n_rollouts)
    asked = {"n": n, "forward_tokens": budget, "seed": seed, "shared_tokens": SHARED}
    conditions = RunFolder(unfinished, nla.backbone.identity(), device=nla.backbone.device.type).conditions
    identity = {**conditions, **nla.bundle.made_from, "directions": n_directions}
    kept = Kept(unfinished, {**asked, "of": json_hash(identity)})
    rows = [row for name, make in _ways(nla, cases, budget, seed).items() for row in kept.get(name, make)]
    directions = [
        row
        for kind, v_nd in vectors(nla, n_directions).items()
        for row in kept.get(kind, lambda: read_directions(nla, kind, v_nd, budget, seed))
    ]
    alike = fve(cases.v[:n], cases.twin_v[:n], nla.bundle.mu)
    return {**asked, "twins_alike": float(alike.mean()), "rows": rows, "directions": directions}


def _ways(nla: NLA, cases: Cases, budget: int, seed: int) -> dict[str, Callable[[], list[dict]]]:
    """By name how each row is made; what the reader draws is drawn once for all that go on from it."""
    n, v_Ld = cases.n, cases.v
    draw = functools.cache(lambda method: of.draw(nla, method, v_Ld, budget, seed))

    def priced(fluency: float) -> Texts:
        start = draw("reader")
        return of.guided(nla, Texts("reader", start.ids[:n], start.h[:n]), v_Ld[:n], budget, fluency)

    ways: dict[str, Callable[[], Texts]] = {method: functools.partial(draw, method) for method in DRAWING}
    ways["guided"] = lambda: of.guided(nla, draw("reader"), v_Ld, budget)
    ways["retrieved"] = lambda: of.retrieved(nla, v_Ld)
    ways["source"] = lambda: of.single(nla, "the source", cases.sources)
    for k in ORACLES:
        ways[f"last {k}"] = lambda k=k: of.single(nla, f"the source's last {k}", [s[-k:] for s in cases.sources])
    rows = {name: lambda make=make: [_row(nla, cases, make())] for name, make in ways.items()}
    for fluency in FLUENCIES:
        rows[f"price {fluency:g}"] = lambda fluency=fluency: [_row(nla, cases, priced(fluency), fluency)]
    return rows


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
        for end, true_nd in cases.ends_h.items():
            mine_nd = nla.backbone.encode([text[-end:] for text in ids], start=True)
            column.add(f"{name}_minus_last_{end}", fve(mine_nd, cases.v[:n], mu) - fve(true_nd, cases.v[:n], mu))
        if len(own_LK) == 2 * n:
            h_Ld = texts.h[np.arange(2 * n), at_L]
            column.add(f"{name}_names_twin", _named(score_L, fve(h_Ld, cases.twin_v, mu)))
    return column


def _named(own_L: np.ndarray, twin_L: np.ndarray) -> np.ndarray:
    """For each source the share of the two of it and its twin whose text is closer to its own; a tie counts half (n,).

    A text that says nothing of what stands before the shared end is right for one of the two, whatever it says.
    """
    hit_L = (own_L > twin_L) + 0.5 * (own_L == twin_L)
    return hit_L.reshape(2, -1).mean(axis=0)
