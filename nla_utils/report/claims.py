"""The paper's claims as data, the test that each must pass, and the verdicts on runs.

Verdicts follow the one rule of :mod:`nla_utils.report.claims`; the verdicts of one run's scorecard, under both
protocols, are one family. Published numbers come without intervals, so they are shown beside the test and not judged.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Callable, Hashable, Mapping, Optional, Sequence, TypeVar

import pandas as pd

from nla_utils import metrics, rows
from nla_utils.report import claims, tables
from nla_utils.report.results import SECTION_11, TITLES, RunResults, k_curve, largest, look_up, published
from nla_utils.report.tables import number, signed, with_interval
from nla_utils.rows import Row

YES, NO, UNDECIDED = "yes", "no", "not decided"
# A value without an interval is shown and not judged; what was not measured is a dash.
VALUE_ONLY, UNMEASURED = "value only", "–"
LEVEL = 0.05
NORMAL = NormalDist()
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Claimed:
    """A figure, its 95 % interval ``ci95`` (low, high), and what is claimed: that it lies between ``low`` and ``high``.

    "Above 0" has one bound. "Equal", "zero" and "no better than" have two, a distance Δ written down beforehand.
    """

    value: Optional[float]
    ci95: Optional[Sequence[Optional[float]]]
    low: float = -math.inf
    high: float = math.inf

    @property
    def is_judged(self) -> bool:
        """Whether there is an interval to judge by."""
        return self.value is not None and self.ci95 is not None and None not in self.ci95

    @property
    def p(self) -> float:
        """Two-sided p-value of the value against the bound that is hardest to tell from it.

        Inside two bounds that is the larger of two one-sided tests (equivalence), outside it is the bound crossed.
        """
        return max(self._p_at(bound) for bound in (self.low, self.high) if math.isfinite(bound))

    def _p_at(self, bound: float) -> float:
        if self.value == bound:
            return 1.0
        facing = self.value - self.ci95[0] if self.value > bound else self.ci95[1] - self.value
        if facing <= 0:
            return 0.0
        return 2 * NORMAL.cdf(-abs(self.value - bound) / facing * NORMAL.inv_cdf(1 - LEVEL / 2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the i-th smallest of m (from 0) times m − i, never falling, at most 1."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for i, j in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - i) * p_values[j]))
        adjusted[j] = largest
    return adjusted


def decide(family: Mapping[Key, Claimed]) -> dict[Key, str]:
    """The verdict on each figure of a table. Figures without an interval get none and do not count as members."""
    judged = [key for key, figure in family.items() if figure.is_judged]
    adjusted = dict(zip(judged, holm([family[key].p for key in judged])))
    return {key: _word(figure, adjusted.get(key)) for key, figure in family.items()}


def _word(figure: Claimed, p: Optional[float]) -> str:
    if p is None:
        return UNMEASURED if figure.value is None else VALUE_ONLY
    if p > LEVEL:
        return UNDECIDED
    return YES if figure.low < figure.value < figure.high else NO


PROTOCOLS = ("published", "corrected")


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


CLAIMS = tuple(
    Claim(**{**e, "row": getattr(rows, e["row"]), "stated": tuple(e.get("stated", ()))}) for e in read("claim")
)


def stated_value(claim: Claim, name: str) -> Optional[float]:
    """The claim's quantity in a published record, ``None`` where the paper prints too little."""
    if not claim.stated:
        return None
    curve = k_curve(name)
    derived = {
        "k_curve.r_squared": metrics.slope_per_doubling(list(curve), list(curve.values()))[2],
        "k_curve.best_of_8": curve[8],
    }
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
    return decide(
        {(c.id, p): claimed(results.column(c.row.file, p), c.row.cen, c.low, c.high) for c in CLAIMS for p in PROTOCOLS}
    )


def scorecard(results: RunResults) -> pd.DataFrame:
    """Every claim: the published value, ours under both protocols, and the verdicts."""
    table, words = [], verdicts(results)
    for claim in CLAIMS:
        stated = stated_value(claim, SECTION_11)
        row = {"claim": claim.sentence, "where": claim.where, "quantity": f"{claim.quantity}: {claim.test}"}
        row[f"published, {TITLES[SECTION_11]} (value only)"] = UNMEASURED if stated is None else f"{stated:+.3f}"
        for protocol, label in zip(PROTOCOLS, ("as published", "corrected")):
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
        {
            "claim": c.sentence,
            "where": c.where,
            "test": f"{c.quantity} {c.test}",
            "a pass means": c.if_true,
            "a fail means": c.if_false,
        }
        for c in CLAIMS
    ]
    return pd.DataFrame(table).set_index("claim")


def gap_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The claim that the centred gap (paraphrase − floor) is a property of the backbone: one row a run."""
    table = [
        (r.title, *(with_interval(r.column("oracle_ceiling", p), rows.GAP.cen) for p in PROTOCOLS)) for r in everything
    ]
    return pd.DataFrame(table, columns=["run", *PROTOCOLS]).set_index("run")


STUDY = "training_study"
ITERATION = "expert_iteration"
# The parts of a study where reading v is easy.
EASY = ("positive control", "by heart")
COMPARISON = "comparison"
# The kinds of vector that say whether the score is gamed, the last as it should be.
VECTORS = ("Gaussian", "difference of two means", "an activation")
FIRST = "question (held out, centred)"


def variance_explained(results: RunResults, row: Row) -> float:
    """1 − E‖ĥ − v̂‖² / E‖v̂ − m‖² of a row, corrected; ĥ and v̂ at norm 1, m the mean of the pool's at norm 1.

    All three inner products that it takes are in the results: of h with v, of v with the pool, and within the pool.
    """
    with_v, with_pool = (2 * results.column(r.file, "corrected")[r.raw] - 1 for r in (row, rows.FLOOR))
    within_pool = results.data["targets"]["unrelated_cosine_raw_mean"]
    return 1 - (2 - 2 * with_v) / (1 - 2 * with_pool + within_pool)


def three_scales(results: RunResults, row: Row) -> str:
    """A row as centred ½(1 + cos), as plain centred cosine, and as variance explained."""
    score = results.column(row.file, "corrected")[row.cen]
    return f"{score:.3f} · {2 * score - 1:.3f} · {variance_explained(results, row):.2f}"


@dataclass(frozen=True)
class Question:
    """A question of the first table, from ``claims.toml``: yes where the figure lies between ``low`` and ``high``."""

    ask: str
    row: Row
    notebook: str
    low: float = -math.inf
    high: float = math.inf
    protocol: str = "corrected"
    source_loss: bool = False

    def column(self, results: RunResults) -> dict:
        """The column of a run's results that has the figure; empty where it was not measured."""
        found = results.source_loss if self.source_loss else results.column(self.row.file, self.protocol)
        return found or {"ci95": {}}

    def claimed(self, results: RunResults) -> Claimed:
        """The figure with its interval and the bounds."""
        return claims.claimed(self.column(results), self.row.cen, self.low, self.high)

    def cell(self, results: RunResults, word: str) -> str:
        """The verdict, and the figure: a difference with its sign."""
        column, key = self.column(results), self.row.cen
        return claims.cell(column, key, word) if self.low == 0 else f"{word}: {tables.with_interval(column, key)}"


def _read_questions() -> tuple[Question, ...]:
    return tuple(Question(**{**entry, "row": getattr(rows, entry["row"])}) for entry in claims.read("question"))


QUESTIONS = _read_questions()


def _pair(a: Row, b: Row, kind: str) -> Callable[[RunResults], str]:
    """Two figures of one column, shown without a verdict: results have no interval of their difference."""

    def shown(results: RunResults) -> str:
        values = (tables.number(results.column(row.file, "corrected")[row.at(kind)]) for row in (a, b))
        return f"{VALUE_ONLY}: {' against '.join(values)}"

    return shown


def gamed(results: RunResults) -> str:
    """What the guided search scores on vectors of three kinds; in brackets the chance that the best of as many unrelated
    texts scores less."""
    record = results.optional(COMPARISON)
    if record is None:
        return UNMEASURED
    found = {row["kind"]: row for row in record["directions"] if row["method"] == "guided"}
    return " · ".join(f"{tables.number(found[k]['score'])} ({found[k]['percentile']:.0%})" for k in VECTORS)


# What is shown beside the verdicts, by question: figures that no rule judges.
VALUES: tuple[tuple[str, str, Callable[[RunResults], str]], ...] = (
    ("Is the best of K rollouts closer than the nearest stored text?", "04", _pair(rows.BEST, rows.RETRIEVAL, "cen")),
    (
        "Raw, is the best of K rollouts closer than μ, which says nothing?",
        "04",
        _pair(rows.BEST, rows.CONSTANT_MU, "raw"),
    ),
    (
        "What does greedy text score: ½(1 + cos) · cosine · variance explained?",
        "04",
        lambda r: three_scales(r, rows.GREEDY),
    ),
    (
        "Is the score gamed? Guided search on a Gaussian vector · a difference of two means · a real activation",
        "09",
        gamed,
    ),
    ("How do §11's own claims fare in the scorecard?", "06", lambda r: verdict_counts(r)),
)


def findings_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """What is asked of each backbone's largest run, and the answer with its number. The verdicts on all of them are one
    family."""
    shown = largest(everything)
    words = decide({(q.ask, r.label): q.claimed(r) for q in QUESTIONS for r in shown})
    table = [
        {FIRST: q.ask, **{r.label: q.cell(r, words[q.ask, r.label]) for r in shown}, "notebook": q.notebook}
        for q in QUESTIONS
    ]
    table += [{FIRST: ask, **{r.label: show(r) for r in shown}, "notebook": notebook} for ask, notebook, show in VALUES]
    return pd.DataFrame(table).set_index(FIRST)


def answered(record: dict) -> pd.DataFrame:
    """The verdicts on the questions that one results file answers by itself, one family."""
    identity, name = record["identity"], record["name"]
    alone = RunResults(identity["backbone"], record["profile"], {name: record}, Path())
    asked = [q for q in QUESTIONS if q.row.file == name]
    words = decide({q.ask: q.claimed(alone) for q in asked})
    return pd.DataFrame([{FIRST: q.ask, "in this run": q.cell(alone, words[q.ask])} for q in asked]).set_index(FIRST)


def reading_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """Nats a token of the held-out sources behind their own v, and what it saves; greedy text and best-of-K beside it."""
    table = []
    for r in everything:
        column = r.source_loss
        if column is None:
            continue
        evaluation, other, mean = r.column("centered_eval", "corrected"), *rows.NATS_GAINED[:2]
        table.append(
            {
                "run": r.label,
                "steps": str(r.data["training"]["steps"]),
                "own v": tables.number(column[rows.NATS_OWN.key]),
                "another's − own": tables.signed(column, other.key),
                "μ − own": tables.signed(column, mean.key),
                "greedy − others' greedy": tables.signed(evaluation, rows.GREEDY_MINUS_OTHERS.cen),
                "best-of-K − unrelated": tables.signed(evaluation, rows.BEST_MINUS_UNRELATED.cen),
            }
        )
    columns = [
        "run",
        "steps",
        "own v",
        "another's − own",
        "μ − own",
        "greedy − others' greedy",
        "best-of-K − unrelated",
    ]
    return pd.DataFrame(table, columns=columns).set_index("run")


def study_table(results: RunResults) -> pd.DataFrame:
    """The variants of a training study, one line each."""
    other, mean = (row.key for row in rows.NATS_GAINED[:2])
    table = []
    for v in results.optional(STUDY)["variants"]:
        tokens = f", sources of {v['tokens']} tokens" if v.get("tokens") else ""
        table.append(
            {
                "variant": v["label"],
                "part": v["part"],
                "measured on": v["asked_on"] + tokens,
                "pairs": str(v["pairs"]),
                "steps": str(v["steps"]),
                "rate": f"{v['recipe']['learning_rate']:g}",
                "norm of v": "its own" if v["recipe"]["inject_norm"] is None else f"{v['recipe']['inject_norm']:.1f}",
                "own v": tables.number(v[rows.NATS_OWN.key]),
                "another's − own": tables.signed(v, other),
                "μ − own": tables.signed(v, mean),
                "greedy": tables.with_interval(v, rows.GREEDY.cen),
                "greedy − others' greedy": tables.signed(v, rows.GREEDY_MINUS_OTHERS.cen),
                "same as its source": f"{v['greedy_is_source']:.0%}",
            }
        )
    return pd.DataFrame(table).set_index("variant")


def iteration_table(results: RunResults) -> pd.DataFrame:
    """Search made into a policy: what an AV takes from v and writes, before and after training on texts that were found."""
    other, margin = rows.NATS_GAINED[0].key, rows.GREEDY_MINUS_OTHERS.cen
    table = [
        {
            "AV, trained on": r["label"],
            "texts": str(r.get("pairs", "–")),
            "their score": tables.number(r.get("teachers_cen")),
            "another's − own": tables.signed(r, other),
            "greedy": tables.with_interval(r, rows.GREEDY.cen),
            "greedy − others' greedy": tables.signed(r, margin),
            "that margin, gained": tables.signed(r, f"{margin}_gained"),
        }
        for r in results.optional(ITERATION)["rounds"]
    ]
    return pd.DataFrame(table).set_index("AV, trained on")


def easy_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The variants of studies where reading v is easy: what such an AV takes from v, its greedy text's score, and how
    many sources it repeats; empty where no run has any."""
    table = []
    for results in (r for r in everything if r.optional(STUDY)):
        full = study_table(results).reset_index()
        shown = full[full["part"].isin(EASY)]
        table += shown.assign(backbone=results.name).to_dict("records")
    columns = ["variant", "backbone", "measured on", "another's − own", "greedy", "same as its source"]
    return pd.DataFrame(table, columns=columns).set_index("variant")


def verdict_counts(results: RunResults) -> str:
    """How many of §11's own claims got which verdict, corrected: ``yes 4 · no 2 · not decided 1 · value only 1``."""
    own = [c.id for c in claims.CLAIMS if c.where != "control"]
    words = [
        word for (name, protocol), word in claims.verdicts(results).items() if name in own and protocol == "corrected"
    ]
    return " · ".join(f"{word} {words.count(word)}" for word in (YES, NO, UNDECIDED, VALUE_ONLY))
