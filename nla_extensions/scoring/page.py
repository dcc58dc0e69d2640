"""``paper/scores.md``: our own ways of reading as ``nla score`` scores anyone's, from JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable

import pandas as pd

from nla_extensions.comparison.page import shown
from nla_extensions.pages import page
from nla_utils.report.pages import Page, Table
from nla_utils.report.results import COMMITTED, find_results
from nla_utils.report.tables import bits_cell, with_interval

# The name of the results file.
RESULTS = "scores"
# What a table shows of each method: label, the row's key, and which of its numbers.
SHOWN = (
    ("best of K", "best", "value"),
    ("unrelated texts, best of K", "best", "null"),
    ("difference", "best", "difference"),
    ("the same without the first principal direction", "best_cen1", "difference"),
    ("best − nearest text of the pool", "best_beside_retrieval", "difference"),
    ("best − best of another vector's texts", "best_beside_others", "difference"),
    ("ranks its own vector first", "identified", "value"),
    ("variance explained", "variance_explained", "value"),
    ("of unrelated texts", "variance_explained", "null"),
    ("nats a token", "nats", "value"),
    ("best − the source's own last 4", "best_beside_last_4", "difference"),
    ("closer to its source than to a twin", "names_twin", "value"),
    ("the source's own last 8: closer to it than to the twin", "names_twin", "null"),
)


def cell(row: dict, which: str, sign: str = "") -> str:
    """A number of a row's record (``value``, ``null`` or ``difference``) with its interval, or a dash."""
    return with_interval({which: row.get(which), "ci95": {which: row.get(f"{which}_ci95")}}, which, sign=sign)


def methods_table(record: dict) -> pd.DataFrame:
    """A column for each method: rows with intervals, bits, and what the p-values find."""
    table = {}
    for method in record["methods"]:
        column = {}
        for label, key, which in SHOWN:
            column[label] = cell(method["rows"][key], which, "+" if which == "difference" else "")
        bits, at, m = method["bits"], (method["K"], method["P"]), method["M"]
        column["bits"] = bits_cell(bits["value"], bits["ci95"], *at)
        column["bits by rank"] = bits_cell(bits["by_rank"], None, *at)
        for name, label in (("law", "rank among unrelated texts"), ("writer", "texts of other vectors")):
            found = method["discoveries"][name]
            column[f"discoveries, by {label}"] = f"{found['BH']} of {m} ({found['BY']})"
        table[shown(method["method"])] = column
    return pd.DataFrame(table).rename_axis(f"best of {method['K']}")


def scores_page(roots: Iterable[Path] = (COMMITTED,)) -> Page:
    """The page of the results below ``roots``."""
    everything = find_results(roots)
    with_scores = [r for r in everything if r.optional(RESULTS)]
    facts = {r.label: r.optional(RESULTS)["methods"][0] for r in with_scores}
    of_runs = {
        r.label: [Table(f"{r.stem}-scores", "The same sources, read in four ways", methods_table(r.optional(RESULTS)))]
        for r in with_scores
    }
    return page("scores", everything, (RESULTS,), with_scores, {}, {}, of_runs, facts=facts)
