"""The paper's claims as data, the test that each must pass, and the verdicts on published numbers and runs.

A verdict follows from an interval: *stands* where all of it passes, *falls* where all of it fails, *not decided
at this n* otherwise. Published numbers come without per-target data, so they are judged by their value alone.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

import pandas as pd

from nla_utils import metrics
from nla_utils.paper.published import SECTION_11, TITLES, k_curve, look_up, published
from nla_utils.paper.results import RunResults
from nla_utils.paper.tables import signed, with_interval
from nla_utils.scores import rows
from nla_utils.scores.rows import Row

STANDS, FALLS, UNDECIDED, UNMEASURED = "stands", "falls", "not decided at this n", "–"


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
        return f"> {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"


def _read_claims() -> tuple[Claim, ...]:
    """The claims of ``claims.toml`` beside this file."""
    entries = tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))["claim"]
    return tuple(Claim(**{**e, "row": getattr(rows, e["row"]), "stated": tuple(e.get("stated", ()))}) for e in entries)


CLAIMS = _read_claims()


def stated_value(claim: Claim, name: str) -> float:
    """The claim's quantity in a published record."""
    curve = k_curve(name)
    derived = {
        "k_curve.r_squared": metrics.slope_per_doubling(list(curve), list(curve.values()))[2], "k_curve.best_of_8": curve[8],
    }  # fmt: skip
    values = [derived.get(path) or look_up(published(name), path) for path in claim.stated]
    return values[0] if len(values) == 1 else values[0] - values[1]


def verdict(claim: Claim, low: float, high: float) -> str:
    """Verdict on an interval [low, high] of the claim's quantity."""
    if claim.low < low and high < claim.high:
        return STANDS
    return FALLS if high <= claim.low or low >= claim.high else UNDECIDED


def judge(claim: Claim, column: dict) -> tuple[str, str]:
    """(value with interval, verdict) in one protocol's column; a quantity without interval is judged by value."""
    key = claim.row.cen
    value = column.get(key)
    if value is None:
        return UNMEASURED, UNMEASURED
    if key not in column["ci95"]:
        return f"{value:.3f}", verdict(claim, value, value)
    low, high = column["ci95"][key]
    return signed(column, key), verdict(claim, low, high)


def judge_published(claim: Claim, name: str) -> tuple[str, str]:
    """(value, verdict) of a published backbone, by its value alone."""
    if not claim.stated:
        return UNMEASURED, UNMEASURED
    value = stated_value(claim, name)
    return f"{value:+.3f}", verdict(claim, value, value)


def verdicts(results: RunResults) -> dict[str, str]:
    """Verdict on each of §11's own claims by its id, under the corrected protocol."""
    own = [c for c in CLAIMS if c.where != "control"]
    return {c.id: judge(c, results.column(c.row.file, "corrected"))[1] for c in own}


def scorecard(results: RunResults) -> pd.DataFrame:
    """Every claim: the published value, ours under both protocols, and the verdicts."""
    table = []
    for claim in CLAIMS:
        row = {"claim": claim.sentence, "where": claim.where, "quantity": f"{claim.quantity}: {claim.test}"}
        value, word = judge_published(claim, SECTION_11)
        row[f"published, {TITLES[SECTION_11]}"] = value if word == UNMEASURED else f"{value} {word}"
        for protocol, label in (("paper", "paper protocol"), ("corrected", "corrected")):
            row[label] = " ".join(dict.fromkeys(judge(claim, results.column(claim.row.file, protocol))))
        table.append(row)
    return pd.DataFrame(table).set_index("claim")


def short_scorecard(results: RunResults) -> pd.DataFrame:
    """Every claim, its published value and ours under both protocols, each with the verdict on it."""
    full = scorecard(results).drop(columns=["where", "quantity"])
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
    protocols = ("paper", "corrected")
    table = [
        (r.title, *(with_interval(r.column("oracle_ceiling", p), rows.GAP.cen) for p in protocols)) for r in everything
    ]
    return pd.DataFrame(table, columns=["run", *protocols]).set_index("run")
