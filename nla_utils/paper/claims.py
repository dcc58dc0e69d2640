"""The paper's claims as data, the test that each must pass, and the verdicts on runs.

Verdicts follow the one rule of :mod:`nla_utils.paper.verdicts`; the verdicts of one run's scorecard, under both
protocols, are one family. Published numbers come without intervals, so they are shown beside the test and not judged.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Sequence

import pandas as pd

from nla_utils import metrics
from nla_utils.paper.published import SECTION_11, TITLES, k_curve, look_up, published
from nla_utils.paper.results import RunResults
from nla_utils.paper.tables import number, signed, with_interval
from nla_utils.paper.verdicts import UNMEASURED, VALUE_ONLY, Claimed, decide
from nla_utils.scores import rows
from nla_utils.scores.rows import Row

PROTOCOLS = ("paper", "corrected")


@dataclass(frozen=True)
class Claim:
    """One claim. ``low`` and ``high`` bound the values of the quantity for which it is true.

    ``where`` is the part of §11 that makes it, or ``control`` for what it should have tested. ``row`` is where the
    quantity stands in the results; ``stated`` are the paths in a published record that it is (or is the difference of),
    none where the paper prints too little. ``if_true`` and ``if_false`` say what a pass and a fail mean.
    """

    id: str
    where: str
    sentence: str
    quantity: str
    row: Row
    if_true: str = ""
    if_false: str = ""
    low: float = -math.inf
    high: float = math.inf
    stated: tuple[str, ...] = ()

    @property
    def test(self) -> str:
        """The condition, for the reader."""
        if self.low == -math.inf:
            return f"< {self.high:g}"
        if self.low == -self.high:
            return f"within ±{self.high:g}"
        return f"> {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"


def read(kind: str) -> list[dict]:
    """The entries of one kind, ``claim`` or ``question``, in ``claims.toml`` beside this file."""
    return tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))[kind]


CLAIMS = tuple(Claim(**{**e, "row": getattr(rows, e["row"]), "stated": tuple(e.get("stated", ()))}) for e in read("claim"))


def stated_value(claim: Claim, name: str) -> Optional[float]:
    """The claim's quantity in a published record, ``None`` where the paper prints too little."""
    if not claim.stated:
        return None
    curve = k_curve(name)
    derived = {
        "k_curve.r_squared": metrics.slope_per_doubling(list(curve), list(curve.values()))[2], "k_curve.best_of_8": curve[8],
    }  # fmt: skip
    values = [derived.get(path) or look_up(published(name), path) for path in claim.stated]
    return values[0] if len(values) == 1 else values[0] - values[1]


def claimed(column: dict, key: str, low: float = -math.inf, high: float = math.inf) -> Claimed:
    """A figure of one protocol's column with the bounds of a claim about it."""
    return Claimed(column.get(key), column["ci95"].get(key), low, high)


def cell(column: dict, key: str, word: str) -> str:
    """The verdict and what it is about, ``yes: +0.035 [+0.024, +0.046]``."""
    if word == UNMEASURED:
        return UNMEASURED
    return f"{word}: {number(column[key]) if word == VALUE_ONLY else signed(column, key)}"


def verdicts(results: RunResults) -> dict[tuple[str, str], str]:
    """The verdict on every claim and control of a run, by its id and the protocol: one family."""
    return decide({
        (c.id, p): claimed(results.column(c.row.file, p), c.row.cen, c.low, c.high) for c in CLAIMS for p in PROTOCOLS
    })  # fmt: skip


def scorecard(results: RunResults) -> pd.DataFrame:
    """Every claim: the published value, ours under both protocols, and the verdicts."""
    table, words = [], verdicts(results)
    for claim in CLAIMS:
        stated = stated_value(claim, SECTION_11)
        row = {"claim": claim.sentence, "where": claim.where, "quantity": f"{claim.quantity}: {claim.test}"}
        row[f"published, {TITLES[SECTION_11]} (value only)"] = UNMEASURED if stated is None else f"{stated:+.3f}"
        for protocol, label in zip(PROTOCOLS, ("paper protocol", "corrected")):
            row[label] = cell(results.column(claim.row.file, protocol), claim.row.cen, words[claim.id, protocol])
        table.append(row)
    return pd.DataFrame(table).set_index("claim")


def decided(asked: Sequence[Claim], column: dict) -> pd.DataFrame:
    """The verdicts on some claims from one protocol's column, ``asked`` being one family."""
    words = decide({c.id: claimed(column, c.row.cen, c.low, c.high) for c in asked})
    table = [{"claim": c.sentence, "test": c.test, "in this run": cell(column, c.row.cen, words[c.id])} for c in asked]
    return pd.DataFrame(table).set_index("claim")


def short_scorecard(results: RunResults) -> pd.DataFrame:
    """Every claim with the test it must pass, its published value, and ours under both protocols with the verdicts."""
    full = scorecard(results).drop(columns=["where", "quantity"])
    full.insert(0, "test", [c.test for c in CLAIMS])
    controls = {c.sentence for c in CLAIMS if c.where == "control"}
    return full.rename(index=lambda sentence: f"control: {sentence}" if sentence in controls else sentence)


def claims_table() -> pd.DataFrame:
    """The claims as data: where each stands, its test, and what a pass and a fail mean."""
    table = [
        {"claim": c.sentence, "where": c.where, "test": f"{c.quantity} {c.test}", "a pass means": c.if_true,
         "a fail means": c.if_false} for c in CLAIMS
    ]  # fmt: skip
    return pd.DataFrame(table).set_index("claim")


def gap_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The claim that the centred gap (paraphrase − floor) is a property of the backbone: one row a run."""
    table = [
        (r.title, *(with_interval(r.column("oracle_ceiling", p), rows.GAP.cen) for p in PROTOCOLS)) for r in everything
    ]
    return pd.DataFrame(table, columns=["run", *PROTOCOLS]).set_index("run")
