"""Tables of a comparison, from its JSON alone."""

from __future__ import annotations

from typing import Mapping

import pandas as pd

from nla_utils.report.claims import claimed, decide
from nla_utils.report.tables import number, signed, with_interval

# What a reader is shown for a method.
SHOWN = {
    "av": "the paper's AV",
    "reader": "tail reader",
    "guided": "tail reader, guided",
    "lens": "logit lens",
    "patchscope": "Patchscope",
    "retrieved": "nearest stored text",
}


def shown(method: str) -> str:
    """A way of reading as tables and figures name it."""
    return SHOWN.get(method, method)


# Question, the way of reading that it is asked of, the figure in that way's row, and what it has to be above for a yes.
QUESTIONS = (
    ("Is the reader's likeliest text right of two twins more often than half?", "reader", "greedy_names_twin", 0.5),
    ("Is the AV's?", "av", "greedy_names_twin", 0.5),
    ("Are the guided search's last 4 tokens closer than the source's own?", "guided", "best_minus_last_4", 0.0),
    ("Are those of the AV's best text?", "av", "best_minus_last_4", 0.0),
    ("Is the AV's likeliest text closer to its own source than to others?", "av", "greedy_minus_others", 0.0),
    ("Is that of the logit lens?", "lens", "greedy_minus_others", 0.0),
    ("Is that of a Patchscope?", "patchscope", "greedy_minus_others", 0.0),
)


def findings_table(records: Mapping[str, dict]) -> pd.DataFrame:
    """Some questions and each backbone's verdict with its number; ``records`` by the label of the run. The verdicts of
    the table are one family."""
    rows = {(label, row["method"]): row for label, record in records.items() for row in record["rows"]}
    words = decide(
        {
            (ask, label): claimed(rows[label, method], key, low)
            for ask, method, key, low in QUESTIONS
            for label in records
        }
    )
    table = []
    for ask, method, key, low in QUESTIONS:
        row = {"question": ask}
        for label in records:
            of = rows[label, method]
            row[label] = f"{words[ask, label]}: {signed(of, key) if low == 0 else with_interval(of, key, 2)}"
        table.append(row)
    return pd.DataFrame(table, columns=["question", *records]).set_index("question")


def _written(record: dict) -> list[dict]:
    """The ways of reading, each once: the guided search at no price."""
    return [row for row in record["rows"] if "fluency" not in row]


def ways_table(record: dict) -> pd.DataFrame:
    """Score, margin over other sources' texts, and fluency of the likeliest text and of the best."""
    table = []
    for row in _written(record):
        alone = row["k"] == 1
        table.append(
            {
                "way of reading": shown(row["method"]),
                "K": "–" if alone else str(row["k"]),
                "likeliest": "–" if alone else with_interval(row, "greedy_cen"),
                "− others'": "–" if alone else signed(row, "greedy_minus_others"),
                "best of K": with_interval(row, "best_cen"),
                "best − others' best": signed(row, "best_minus_others"),
                "nats a token, likeliest": "–" if alone else number(row["greedy_nats"], 2),
                "nats a token, best": number(row["best_nats"], 2),
            }
        )
    return pd.DataFrame(table).set_index("way of reading")


def ends_table(record: dict) -> pd.DataFrame:
    """How often a text is closer to its own source than to its twin, and the best text's last n tokens less the source's."""
    table = []
    for row in _written(record):
        minus = {key.rsplit("_", 1)[1]: key for key in row if key.startswith("best_minus_last_")}
        table.append(
            {
                "way of reading": shown(row["method"]),
                "right of two twins, likeliest": "–" if row["k"] == 1 else with_interval(row, "greedy_names_twin", 2),
                "right of two twins, best": with_interval(row, "best_names_twin", 2),
                **{f"best − source's last {n}": signed(row, key) for n, key in minus.items()},
            }
        )
    return pd.DataFrame(table).set_index("way of reading")


def price_table(record: dict) -> pd.DataFrame:
    """Score and nats of the guided search at each price."""
    table = [
        {
            "λ, score a nat": f"{row.get('fluency', 0):g}",
            "score": with_interval(row, "best_cen"),
            "nats a token": with_interval(row, "best_nats", 2),
        }
        for row in record["rows"]
        if row["method"].startswith("guided")
    ]
    return pd.DataFrame(table).set_index("λ, score a nat")


def directions_table(record: dict) -> pd.DataFrame:
    """Score of the best text for each kind of vector, and the chance that as many unrelated texts score less."""
    found: dict[str, dict[str, str]] = {}
    for row in record["directions"]:
        cell = f"{with_interval(row, 'score')} ({row['percentile']:.0%})"
        found.setdefault(shown(row["method"]), {})[row["kind"]] = cell
    table = pd.DataFrame(found).T
    table.index.name = "way of reading"
    return table
