"""The paper's claims as data, the test that each must pass, and the verdicts on runs.

A table's verdicts are one family (:func:`decide`). Published numbers come without intervals, so they are shown beside
the test and not judged.
"""

from __future__ import annotations

import math
import statistics
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Hashable, Mapping, Optional, Sequence, TypeVar

import pandas as pd
from scipy.special import stdtr, stdtrit

from nla_utils import metrics, rows
from nla_utils.report.results import PROTOCOLS, RunResults, k_curve, largest, look_up, published, published_curve
from nla_utils.report.tables import bits_cell, family_columns, number, published_column, signed, stated, with_interval
from nla_utils.rows import Row

YES, NO, UNDECIDED = "yes", "no", "not decided"
# Across backbones, where some say yes and others no.
DIFFERS = "it differs"
# A value without an interval is shown and not judged; what was not measured is a dash.
VALUE_ONLY, UNMEASURED = "value only", number(None)
LEVEL = 0.05
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Claimed:
    """A figure, its 95 % interval ``ci95`` (low, high), and what is claimed: that it lies between ``low`` and ``high``.

    "Above 0" has one bound. "Equal", "zero" and "no better than" have two, a distance Δ written down beforehand. Where
    the interval is Student's, ``df`` are its degrees of freedom.
    """

    value: Optional[float]
    ci95: Optional[Sequence[Optional[float]]]
    low: float = -math.inf
    high: float = math.inf
    df: float = math.inf

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
        return 2 * float(stdtr(self.df, -abs(self.value - bound) / facing * stdtrit(self.df, 1 - LEVEL / 2)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values in the order given: the i-th smallest of m (from 0) times m − i, never falling, ≤ 1."""
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


def claimed(column: dict, key: str, low: float = -math.inf, high: float = math.inf) -> Claimed:
    """A figure of one protocol's column with the bounds of a claim about it."""
    return Claimed(column.get(key), column["ci95"].get(key), low, high)


def cell(column: dict, key: str, word: str, sign: str = "+") -> str:
    """The verdict and what it is about, ``yes: +0.035 [+0.024, +0.046]``."""
    if word == UNMEASURED:
        return UNMEASURED
    return f"{word}: {with_interval(column, key, sign='' if word == VALUE_ONLY else sign)}"


@dataclass(frozen=True)
class Claim:
    """A claim that is true, or a question that is answered yes, where the figure of ``row`` lies between ``low`` and
    ``high``.

    ``where`` is the part of §11 that makes it, ``control`` for what it should have tested, or the notebook that answers
    it. ``stated`` are the paths in a published record that it is (or is the difference of), none where the paper prints
    too little. ``if_true`` and ``if_false`` say what a pass and a fail mean.
    """

    sentence: str
    where: str
    row: Row
    low: float = -math.inf
    high: float = math.inf
    protocol: str = "corrected"
    id: str = ""
    if_true: str = ""
    if_false: str = ""
    stated: Sequence[str] = ()

    @property
    def named(self) -> str:
        """The sentence, marked where it is a control."""
        return f"control: {self.sentence}" if self.where == "control" else self.sentence

    @property
    def test(self) -> str:
        """The condition, for the reader."""
        if self.low == -math.inf:
            return f"< {self.high:g}"
        if self.low == -self.high:
            return f"within ±{self.high:g}"
        return f"> {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"


def judge(family: Mapping[Key, tuple[Claim, dict]]) -> dict[Key, str]:
    """The verdict on each claim from a column that has its row, with the figure, as :func:`cell` shows it: a score
    (of a bound above 0) without a sign."""
    words = decide({key: claimed(column, c.row.cen, c.low, c.high) for key, (c, column) in family.items()})
    return {key: cell(column, c.row.cen, words[key], "" if c.low > 0 else "+") for key, (c, column) in family.items()}


def _read_claims() -> tuple[Claim, ...]:
    entries = tomllib.loads(Path(__file__).with_name("claims.toml").read_text(encoding="utf-8"))["claim"]
    return tuple(Claim(**{**entry, "row": getattr(rows, entry["row"])}) for entry in entries)


CLAIMS = _read_claims()


def stated_value(claim: Claim, name: str) -> Optional[float]:
    """The claim's quantity in a published record, ``None`` where the paper prints too little."""
    if not claim.stated:
        return None
    curve = k_curve(name)
    derived = {
        "null.margin": published_curve(name).margin,
        "k_curve.r_squared": metrics.slope_per_doubling(list(curve), list(curve.values()))[2],
        "k_curve.best_of_8": curve[8],
    }
    first, *less = (derived.get(path) or look_up(published(name), path) for path in claim.stated)
    return first - less[0] if less else first


def _stated(claim: Claim, name: str) -> str:
    """:func:`stated_value` as text, with a sign where :func:`judge` gives ours one."""
    return number(stated_value(claim, name), sign="" if claim.low > 0 else "+")


def verdicts(results: RunResults) -> dict[tuple[str, str], str]:
    """The verdict on every claim and control of a run, by its id and the protocol: one family."""
    return decide(
        {(c.id, p): claimed(results.of(c.row, p), c.row.cen, c.low, c.high) for c in CLAIMS for p in PROTOCOLS}
    )


def small_runs(everything: Sequence[RunResults]) -> str:
    """How many runs with less training than the paper's have a *yes* on either null, each by its own family of
    verdicts."""
    words = [verdicts(r) for r in everything if r.undertrained and not r.av]
    unrelated, others = (
        sum(of_run[f"best_of_k_beats_{null}", "corrected"] == YES for of_run in words)
        for null in ("unrelated", "others")
    )
    return (
        f"of {len(words)} such runs, of any layer and seed, {unrelated or 'none'} have a yes against unrelated texts, "
        f"and {others or 'none'} against rollouts of other targets"
    )


def verdict_counts(results: RunResults) -> str:
    """How many of §11's own claims got which verdict, corrected: ``yes 4 · no 2 · not decided 1 · value only 1``."""
    found = verdicts(results)
    words = [found[c.id, "corrected"] for c in CLAIMS if c.where != "control"]
    return " · ".join(f"{word} {words.count(word)}" for word in (YES, NO, UNDECIDED, VALUE_ONLY))


def scorecard(results: RunResults) -> pd.DataFrame:
    """Every claim with the test it must pass, its published value, and ours under both protocols with the verdicts."""
    table, cells = {}, judge({(c.id, p): (c, results.of(c.row, p)) for c in CLAIMS for p in PROTOCOLS})
    table["test"] = {c.named: c.test for c in CLAIMS}
    table[f"{published_column(results)} (value only)"] = {c.named: _stated(c, results.counterpart) for c in CLAIMS}
    for p, label in zip(PROTOCOLS, ("as published", "corrected")):
        table[label] = {c.named: cells[c.id, p] for c in CLAIMS}
    return pd.DataFrame(table).rename_axis("claim")


def across(words: Sequence[str]) -> str:
    """The verdict across backbones (PROTOCOL.md §12): yes or no where all say so, "it differs" where some say yes and
    others no, otherwise not decided. What no run judges is value only."""
    if len(set(words)) == 1:
        return words[0]
    if set(words) <= {VALUE_ONLY, UNMEASURED}:
        return VALUE_ONLY
    return DIFFERS if {YES, NO} <= set(words) else UNDECIDED


def families_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """The scorecards of one run a family side by side, corrected: each behind what is published of that family, and the
    verdict across them with the number of runs that say yes."""

    def printed(name: str) -> dict[str, str]:
        return {c.named: _stated(c, name) for c in CLAIMS}

    made = pd.DataFrame(family_columns(runs, printed, lambda r: scorecard(r)["corrected"]))
    for claim, cells in made[[r.label for r in runs]].iterrows():
        words = [text.split(":")[0] for text in cells]
        counted = f" ({words.count(YES)} of {len(words)})" if {YES, NO, UNDECIDED} & set(words) else ""
        made.loc[claim, "across these runs (yes in)"] = across(words) + counted
    return made.rename({c.named: f"{c.named} ({c.test})" for c in CLAIMS}).rename_axis("claim")


def family_counts(runs: Sequence[RunResults]) -> str:
    """In how many of the runs §11's own claims, and the controls, are yes, corrected."""
    words, said = [verdicts(r) for r in runs], []
    for what, is_control in (("§11's own claims", False), ("the controls", True)):
        asked = [c.id for c in CLAIMS if (c.where == "control") == is_control]
        yes = [[of[key, "corrected"] for of in words].count(YES) for key in asked]
        everywhere, nowhere = yes.count(len(runs)), yes.count(0)
        some = len(yes) - everywhere - nowhere
        said.append(f"of {what} {everywhere} are yes in all runs, {some} in some and {nowhere} in none")
    return "; ".join(said)


def decided(asked: Sequence[Claim], column: dict) -> pd.DataFrame:
    """The verdicts on some claims from one protocol's column, ``asked`` being one family."""
    cells = judge({c.id: (c, column) for c in asked})
    table = [(c.sentence, c.test, cells[c.id]) for c in asked]
    return pd.DataFrame(table, columns=["claim", "test", "in this run"]).set_index("claim")


def claims_table() -> pd.DataFrame:
    """The claims as data: where each stands, its test, and what a pass and a fail mean."""
    table = [(c.sentence, c.where, f"{c.row.label} {c.test}", c.if_true, c.if_false) for c in CLAIMS]
    return pd.DataFrame(table, columns=["claim", "where", "test", "a pass means", "a fail means"]).set_index("claim")


def gap_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The claim that the centred gap (paraphrase − floor) is a property of the backbone: one row a run."""
    table = [(r.title, *(with_interval(r.of(rows.GAP, p), rows.GAP.cen) for p in PROTOCOLS)) for r in everything]
    return pd.DataFrame(table, columns=["run", *PROTOCOLS]).set_index("run")


# The first table


# What is asked of every backbone, chosen by what §11 claims and should have tested, not by the answer.
QUESTIONS = (
    Claim("Does the same text score 1 (within 0.02), as published?", "03", rows.REPLAY, 0.98, 1.02, "published"),
    Claim("Does it, corrected?", "03", rows.REPLAY, 0.98, 1.02),
    Claim(
        "Is the best of K rollouts closer than the best of 8 paraphrases (§11's headline)?",
        "04",
        rows.BEST_MINUS_PARAPHRASE,
        0.0,
    ),
    Claim("Is the best of K rollouts closer than the best of K unrelated texts?", "04", rows.BEST_MINUS_UNRELATED, 0.0),
    Claim("Is greedy text closer to its own v than other targets' greedy text?", "04", rows.GREEDY_MINUS_OTHERS, 0.0),
    Claim("Is greedy text closer than what a linear probe reads off v?", "04", rows.GREEDY_MINUS_PROBE, 0.0),
    Claim("Is greedy text closer than the nearest stored text?", "04", rows.GREEDY_MINUS_RETRIEVAL, 0.0),
    Claim(
        "Does its own v make a source more likely than another's v, in nats a token?",
        "04",
        rows.NATS_OTHER_MINUS_OWN,
        0.0,
    ),
    Claim("Does its own v make a source more likely than μ, in nats a token?", "04", rows.NATS_MEAN_MINUS_OWN, 0.0),
)
STUDY = "training_study"
ITERATION = "expert_iteration"
COMPARISON = "comparison"
# The parts of a study where reading v is easy.
EASY = ("positive control", "by heart")
# The kinds of vector that say whether the score is gamed, the last as it should be.
VECTORS = ("Gaussian", "difference of two means", "an activation")
FIRST = "question (held out, centred)"


def variance_explained(results: RunResults, row: Row) -> float:
    """1 − E‖ĥ − v̂‖² / E‖v̂ − m‖² of a row, corrected; ĥ and v̂ at norm 1, m the mean of the pool's at norm 1.

    All three inner products that it takes are in the results: of h with v, of v with the pool, and within the pool.
    """
    with_v, with_pool = (2 * results.value(r, "raw") - 1 for r in (row, rows.FLOOR))
    within_pool = results.targets["unrelated_cosine_raw_mean"]
    return 1 - (2 - 2 * with_v) / (1 - 2 * with_pool + within_pool)


def three_scales(results: RunResults, row: Row) -> str:
    """A row as centred ½(1 + cos), as plain centred cosine, and as variance explained."""
    score = results.value(row)
    return f"{score:.3f} · {2 * score - 1:.3f} · {variance_explained(results, row):.2f}"


def _pair(a: Row, b: Row, kind: str) -> Callable[[RunResults], str]:
    """Two figures of one column, shown without a verdict: results have no interval of their difference."""
    return lambda r: f"{VALUE_ONLY}: {' against '.join(number(r.value(row, kind)) for row in (a, b))}"


def gamed(results: RunResults) -> str:
    """What the guided search scores on vectors of three kinds; in brackets the chance that the best of as many
    unrelated texts scores less."""
    record = results.optional(COMPARISON)
    if record is None:
        return UNMEASURED
    found = {row["kind"]: row for row in record["directions"] if row["method"] == "guided"}
    return " · ".join(f"{number(found[k]['score'])} ({found[k]['percentile']:.0%})" for k in VECTORS)


def bits_of_best(results: RunResults) -> str:
    """Bits at K of the best of K; ``≈`` marks what is read off a few points of the null, without an interval."""
    (found, ends, p), k = results.bits_curve, results.of(rows.BEST)["K"]
    return f"{'' if ends else '≈ '}{bits_cell(found[k], ends and ends[k], k, p)}, K = {k}"


# What is shown beside the verdicts, by question: figures that no rule judges, and the notebook.
VALUES: dict[str, tuple[Callable[[RunResults], str], str]] = {
    "Is the best of K rollouts closer than the nearest stored text?": (_pair(rows.BEST, rows.RETRIEVAL, "cen"), "04"),
    "Raw, is the best of K rollouts closer than μ, which says nothing?": (
        _pair(rows.BEST, rows.CONSTANT_MU, "raw"),
        "04",
    ),
    "What is the best of K worth, in bits: doublings of K unrelated texts?": (bits_of_best, "05"),
    "What does greedy text score: ½(1 + cos) · cosine · variance explained?": (
        lambda r: three_scales(r, rows.GREEDY),
        "04",
    ),
    "Is the score gamed? Guided search on a Gaussian vector · a difference of two means · a real activation": (
        gamed,
        "09",
    ),
    "How do §11's own claims fare in the scorecard?": (verdict_counts, "06"),
}


def _published_answers(name: str) -> dict[str, str]:
    """What is published of a backbone on the questions of the first table, by question; values only."""
    claimed_of = {c.row: c.stated for c in CLAIMS}
    asked = [replace(q, stated=claimed_of.get(q.row, ())) for q in QUESTIONS]
    record, curve, (nearest, _, bits, scales, *_) = published(name)["centred_eval"], published_curve(name), VALUES
    best, retrieved, greedy = (record[row]["cen"] for row in ("best_of_k", "nn_retrieval", "greedy"))
    return {q.sentence: _stated(q, name) for q in asked} | {
        QUESTIONS[0].sentence: number(stated(rows.REPLAY, name=name)),
        nearest: f"{best:.3f} against {retrieved:.3f}",
        bits: f"{bits_cell(curve.bits[curve.k], None, curve.k, max(curve.null))}, K = {curve.k}",
        scales: f"{greedy:.3f} · {2 * greedy - 1:.3f} · {UNMEASURED}",
    }


def findings_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """What is asked of each backbone's largest run, and the answer with its number, family by family behind what is
    published. The verdicts on all of the runs are one family of tests."""
    shown = largest(everything)
    cells = judge({(q, r.label): (q, r.of(q.row, q.protocol)) for q in QUESTIONS for r in shown})

    def ours(r: RunResults) -> dict[str, str]:
        return {q.sentence: cells[q, r.label] for q in QUESTIONS} | {ask: show(r) for ask, (show, _) in VALUES.items()}

    where = {q.sentence: q.where for q in QUESTIONS} | {ask: notebook for ask, (_, notebook) in VALUES.items()}
    table = pd.DataFrame(family_columns(shown, _published_answers, ours) | {"notebook": where})
    return table.reindex(list(where)).fillna(UNMEASURED).rename_axis(FIRST)


def answered(record: dict) -> pd.DataFrame:
    """The verdicts on the questions that one results file answers by itself, one family."""
    name = record["name"]
    alone = RunResults(record["identity"]["backbone"], record["profile"], {name: record}, Path())
    cells = judge({q.sentence: (q, alone.of(q.row, q.protocol)) for q in QUESTIONS if q.row.file == name})
    return pd.DataFrame({"in this run": cells}).rename_axis(FIRST)


def trainings_table(by_seed: Mapping[int, RunResults]) -> pd.DataFrame:
    """What is asked of a backbone, over trainings that each have their own seed and targets: no longer "in this run".

    A yes or no needs three trainings, all on the same side of the bound, and passes by Student's interval over their
    means. All verdicts are one family. Beside it half the width of one run's interval over targets, on average.
    """
    asked, found = {}, {}
    for q in QUESTIONS:
        columns = [r.of(q.row, q.protocol) for r in by_seed.values()]
        values = [column.get(q.row.cen) for column in columns]
        if None not in values:
            ends, n = metrics.t_interval(values), len(values)
            asked[q] = Claimed(statistics.mean(values), ends, q.low, q.high, df=n - 1)
            halves = [(high - low) / 2 for low, high in (column["ci95"][q.row.cen] for column in columns)]
            same = len({q.low < x < q.high for x in values}) == 1
            found[q] = ends, statistics.stdev(values), statistics.mean(halves), same and n >= 3
    words = decide(asked)
    table = [
        {
            FIRST: q.sentence,
            "over trainings": cell(
                {"all": asked[q].value, "ci95": {"all": ends}}, "all", words[q] if decidable else UNDECIDED
            ),
            "standard deviation of a training": number(sd),
            "± of one run, over targets": number(half),
        }
        for q, (ends, sd, half, decidable) in found.items()
    ]
    return pd.DataFrame(table).set_index(FIRST)


# What an AV reads of v


def reading_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """Nats a token of the held-out sources behind their own v, and what it saves; greedy text and best-of-K beside."""
    other, mean = rows.NATS_OTHER_MINUS_OWN, rows.NATS_MEAN_MINUS_OWN
    shown = {
        "another's − own": other,
        "μ − own": mean,
        "greedy − others' greedy": rows.GREEDY_MINUS_OTHERS,
        "best-of-K − unrelated": rows.BEST_MINUS_UNRELATED,
    }
    table = [
        (r.label, str(r.training["steps"] or UNMEASURED), number(r.source_loss[rows.NATS_OWN.key]))
        + tuple(signed(r.of(row), row.cen) for row in shown.values())
        for r in everything
        if r.source_loss
    ]
    return pd.DataFrame(table, columns=["run", "steps", "own v", *shown]).set_index("run")


def study_table(results: RunResults) -> pd.DataFrame:
    """The variants of a training study, one line each."""
    table = [
        {
            "variant": v["label"],
            "part": v["part"],
            "measured on": v["asked_on"] + (f", sources of {v['tokens']} tokens" if v.get("tokens") else ""),
            "pairs": str(v["pairs"]),
            "steps": str(v["steps"]),
            "rate": f"{v['recipe']['learning_rate']:g}",
            "norm of v": "its own" if v["recipe"]["inject_norm"] is None else f"{v['recipe']['inject_norm']:.1f}",
            "own v": number(v[rows.NATS_OWN.key]),
            "another's − own": signed(v, rows.NATS_OTHER_MINUS_OWN.key),
            "μ − own": signed(v, rows.NATS_MEAN_MINUS_OWN.key),
            "greedy": with_interval(v, rows.GREEDY.cen),
            "greedy − others' greedy": signed(v, rows.GREEDY_MINUS_OTHERS.cen),
            "same as its source": f"{v['greedy_is_source']:.0%}",
        }
        for v in results.optional(STUDY)["variants"]
    ]
    return pd.DataFrame(table).set_index("variant")


def ends_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """What own v saves at the last and at the first token of a source against another's, and against another's whose
    source has the same token there: what is left once that token is the same is not its identity."""
    measured = [r for r in everything if r.value(rows.OF_ENDS[1]) is not None]
    table = {r.label: {row.label: signed(r.of(row), row.key) for row in rows.OF_ENDS} for r in measured}
    return pd.DataFrame(table).rename_axis("nats")


def at_the_ends(everything: Sequence[RunResults]) -> str:
    """What :func:`ends_table` says of runs where own v saves something at the last token and something is left once the
    token is the same, and of the others; the verdicts on a run's four figures are one family."""
    said, others, (last, alike, first, alike_first) = [], [], rows.OF_ENDS
    for r in everything:
        words = decide({row: claimed(r.of(row), row.key, low=0) for row in rows.OF_ENDS})
        if not words[last] == words[alike] == YES:
            others += [f"{r.label}: {words[last]} ({words[alike]})"] if r.value(alike) is not None else []
            continue
        left = r.value(alike) / r.value(last)
        peak = f"about {1 - left:.0%} of the peak at the last token is that token's identity, {left:.0%} is not"
        begin = f"{words[first]} (against sources that begin alike: {words[alike_first]})"
        said.append(f"{r.label}: {peak}. Whether own v saves anything at the first token: {begin}")
    if said and others:
        asked = "Whether it saves anything at the last token of the other runs (and against sources that end alike)"
        said.append(f"{asked}: {', '.join(others)}")
    return ". ".join(said)


def iteration_table(results: RunResults) -> pd.DataFrame:
    """What an AV takes from v and writes, before and after training on texts that a search found."""
    margin = rows.GREEDY_MINUS_OTHERS.cen
    table = [
        {
            "AV, trained on": r["label"],
            "texts": str(r.get("pairs", "–")),
            "their score": number(r.get("teachers_cen")),
            "another's − own": signed(r, rows.NATS_OTHER_MINUS_OWN.key),
            "greedy": with_interval(r, rows.GREEDY.cen),
            "greedy − others' greedy": signed(r, margin),
            "that margin, gained": signed(r, f"{margin}_gained"),
        }
        for r in results.optional(ITERATION)["rounds"]
    ]
    return pd.DataFrame(table).set_index("AV, trained on")


def easy_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The variants of studies where reading v is easy: what such an AV takes from v, its greedy text's score, and how
    many sources it repeats; empty where no run has any."""
    studies = [study_table(r).assign(backbone=r.name) for r in everything if r.optional(STUDY)]
    if not studies:
        return pd.DataFrame()
    table = pd.concat(studies)
    columns = ["backbone", "measured on", "another's − own", "greedy", "same as its source"]
    return table.loc[table["part"].isin(EASY), columns]
