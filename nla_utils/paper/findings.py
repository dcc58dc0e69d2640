"""What is read first of a set of runs: the findings, what the AV takes from v, and a score on three scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

import pandas as pd

from nla_utils.paper import claims, tables
from nla_utils.paper.results import RunResults, largest
from nla_utils.paper.verdicts import NO, UNDECIDED, UNMEASURED, VALUE_ONLY, YES, Claimed, decide
from nla_utils.scores import rows
from nla_utils.scores.rows import Row

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
    ("Raw, is the best of K rollouts closer than μ, which says nothing?", "04", _pair(rows.BEST, rows.CONSTANT_MU, "raw")),
    ("What does greedy text score: ½(1 + cos) · cosine · variance explained?", "04",
     lambda r: three_scales(r, rows.GREEDY)),
    ("Is the score gamed? Guided search on a Gaussian vector · a difference of two means · a real activation", "09", gamed),
    ("How do §11's own claims fare in the scorecard?", "06", lambda r: verdict_counts(r)),
)  # fmt: skip


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
        table.append({
            "run": r.label, "steps": str(r.data["training"]["steps"]), "own v": tables.number(column[rows.NATS_OWN.key]),
            "another's − own": tables.signed(column, other.key), "μ − own": tables.signed(column, mean.key),
            "greedy − others' greedy": tables.signed(evaluation, rows.GREEDY_MINUS_OTHERS.cen),
            "best-of-K − unrelated": tables.signed(evaluation, rows.BEST_MINUS_UNRELATED.cen),
        })  # fmt: skip
    columns = ["run", "steps", "own v", "another's − own", "μ − own", "greedy − others' greedy", "best-of-K − unrelated"]
    return pd.DataFrame(table, columns=columns).set_index("run")


def study_table(results: RunResults) -> pd.DataFrame:
    """The variants of a training study, one line each."""
    other, mean = (row.key for row in rows.NATS_GAINED[:2])
    table = []
    for v in results.optional(STUDY)["variants"]:
        tokens = f", sources of {v['tokens']} tokens" if v.get("tokens") else ""
        table.append({
            "variant": v["label"], "part": v["part"], "measured on": v["asked_on"] + tokens, "pairs": str(v["pairs"]),
            "steps": str(v["steps"]), "rate": f"{v['recipe']['learning_rate']:g}",
            "norm of v": "its own" if v["recipe"]["inject_norm"] is None else f"{v['recipe']['inject_norm']:.1f}",
            "own v": tables.number(v[rows.NATS_OWN.key]), "another's − own": tables.signed(v, other),
            "μ − own": tables.signed(v, mean), "greedy": tables.with_interval(v, rows.GREEDY.cen),
            "greedy − others' greedy": tables.signed(v, rows.GREEDY_MINUS_OTHERS.cen),
            "same as its source": f"{v['greedy_is_source']:.0%}",
        })  # fmt: skip
    return pd.DataFrame(table).set_index("variant")


def iteration_table(results: RunResults) -> pd.DataFrame:
    """Search made into a policy: what an AV takes from v and writes, before and after training on texts that were found."""
    other, margin = rows.NATS_GAINED[0].key, rows.GREEDY_MINUS_OTHERS.cen
    table = [
        {"AV, trained on": r["label"], "texts": str(r.get("pairs", "–")),
         "their score": tables.number(r.get("teachers_cen")), "another's − own": tables.signed(r, other),
         "greedy": tables.with_interval(r, rows.GREEDY.cen), "greedy − others' greedy": tables.signed(r, margin),
         "that margin, gained": tables.signed(r, f"{margin}_gained")}
        for r in results.optional(ITERATION)["rounds"]
    ]  # fmt: skip
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
    words = [word for (name, protocol), word in claims.verdicts(results).items() if name in own and protocol == "corrected"]
    return " · ".join(f"{word} {words.count(word)}" for word in (YES, NO, UNDECIDED, VALUE_ONLY))
