"""Tables of a comparison, from its JSON alone."""

from __future__ import annotations

import pandas as pd

from nla_utils.paper.tables import number, signed, with_interval

RESULTS = "comparison"


def _written(record: dict) -> list[dict]:
    """The ways of reading, each once: the guided search at no price."""
    return [row for row in record["rows"] if "fluency" not in row]


def ways_table(record: dict) -> pd.DataFrame:
    """Score, margin over other sources' texts, and fluency of the likeliest text and of the best."""
    table = []
    for row in _written(record):
        alone = row["k"] == 1
        table.append({
            "way of reading": row["method"], "K": "–" if alone else str(row["k"]),
            "likeliest": "–" if alone else with_interval(row, "greedy_cen"),
            "− others'": "–" if alone else signed(row, "greedy_minus_others"),
            "best of K": with_interval(row, "best_cen"), "best − others' best": signed(row, "best_minus_others"),
            "nats a token, likeliest": "–" if alone else number(row["greedy_nats"], 2),
            "nats a token, best": number(row["best_nats"], 2),
        })  # fmt: skip
    return pd.DataFrame(table).set_index("way of reading")


def ends_table(record: dict) -> pd.DataFrame:
    """How often a text is closer to its own source than to its twin, and the best text's last n tokens less the source's."""
    table = []
    for row in _written(record):
        minus = {key.rsplit("_", 1)[1]: key for key in row if key.startswith("best_minus_last_")}
        table.append({
            "way of reading": row["method"],
            "right of two twins, likeliest": "–" if row["k"] == 1 else with_interval(row, "greedy_names_twin", 2),
            "right of two twins, best": with_interval(row, "best_names_twin", 2),
            **{f"best − source's last {n}": signed(row, key) for n, key in minus.items()},
        })  # fmt: skip
    return pd.DataFrame(table).set_index("way of reading")


def price_table(record: dict) -> pd.DataFrame:
    """Score and nats of the guided search at each price."""
    table = [
        {"λ, score a nat": f"{row.get('fluency', 0):g}", "score": with_interval(row, "best_cen"),
         "nats a token": with_interval(row, "best_nats", 2)}
        for row in record["rows"] if row["method"].startswith("guided")
    ]  # fmt: skip
    return pd.DataFrame(table).set_index("λ, score a nat")


def directions_table(record: dict) -> pd.DataFrame:
    """Score of the best text for each kind of vector, and the chance that as many unrelated texts score less."""
    found: dict[str, dict[str, str]] = {}
    for row in record["directions"]:
        cell = f"{with_interval(row, 'score')} ({row['percentile']:.0%})"
        found.setdefault(row["method"], {})[row["kind"]] = cell
    table = pd.DataFrame(found).T
    table.index.name = "way of reading"
    return table
