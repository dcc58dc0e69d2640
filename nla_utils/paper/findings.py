"""What is read first of a set of runs: the findings, what the AV takes from v, and a score on three scales."""

from __future__ import annotations

from typing import Callable, Mapping, Sequence

import pandas as pd

from nla_utils.paper import claims, tables
from nla_utils.paper.results import RunResults, largest
from nla_utils.scores import rows
from nla_utils.scores.rows import Row

STUDY = "training_study"
ITERATION = "expert_iteration"
# The parts of a study where reading v is easy.
EASY = ("positive control", "by heart")
YES, NO, UNDECIDED, UNEQUAL = "yes", "no", "not decided", "it differs"


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


def _signed(row: Row) -> Callable[[RunResults], tuple[str, str]]:
    """The answer that an interval gives to "is it above zero?", and the value with the interval."""

    def answer(results: RunResults) -> tuple[str, str]:
        column = results.column(row.file, "corrected")
        low, high = column["ci95"][row.cen]
        return (YES if low > 0 else NO if high <= 0 else UNDECIDED), tables.signed(column, row.cen)

    return answer


def _replay(results: RunResults) -> tuple[str, str]:
    shown = [tables.number(results.column(rows.REPLAY.file, p)[rows.REPLAY.cen]) for p in ("paper", "corrected")]
    published, corrected = (YES if value == tables.number(1) else NO for value in shown)
    return f"{published}; corrected, {corrected}", "; ".join(shown)


def _read(results: RunResults) -> tuple[str, str]:
    column = results.source_loss
    if column is None:
        return "not measured", "–"
    key = rows.NATS_GAINED[0].key
    return (YES if column["ci95"][key][0] > 0 else UNDECIDED), tables.signed(column, key)


QUESTIONS: tuple[tuple[str, str, Callable[[RunResults], tuple[str, str]]], ...] = (
    ("Does the same text score 1, as published?", "03", _replay),
    ("Does its own v make a source likelier than another's, in nats a token?", "04", _read),
    ("Is greedy text closer to its own v than to others'?", "04", _signed(rows.GREEDY_MINUS_OTHERS)),
    ("Are K rollouts worth more than K unrelated texts?", "04", _signed(rows.BEST_MINUS_UNRELATED)),
    ("Is greedy text closer than the nearest stored text?", "04", _signed(rows.GREEDY_MINUS_RETRIEVAL)),
    ("What is greedy text worth: ½(1 + cos) · cosine · variance explained", "04",
     lambda r: ("", three_scales(r, rows.GREEDY))),
)  # fmt: skip


def agreed(found: Mapping[str, tuple[str, str]]) -> str:
    """The answer of all backbones, ``{label: (answer, number)}``, if it is one."""
    answers = {answer for answer, _ in found.values()}
    return answers.pop() if len(answers) == 1 else UNEQUAL


def findings_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """A few questions, the answer where the backbones agree, the numbers of each one's largest run, and the notebook."""
    shown, table = largest(everything), []
    for question, notebook, ask in QUESTIONS:
        found = {r.label: ask(r) for r in shown}
        row = {"question (held out, centred)": question, "answer": agreed(found)}
        table.append({**row, **{label: value for label, (_, value) in found.items()}, "notebook": notebook})
    return pd.DataFrame(table).set_index("question (held out, centred)")


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
    """How many of §11's own claims stand, fall and are not decided, corrected."""
    words = list(claims.verdicts(results).values())
    verbs = {claims.STANDS: "stand", claims.FALLS: "fall", claims.UNDECIDED: "not decided"}
    return ", ".join(f"{verb} {words.count(word)}" for word, verb in verbs.items())
