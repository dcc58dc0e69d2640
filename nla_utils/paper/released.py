"""The released AVs' own numbers, measured here, beside the published ones: row by row, and where they differ."""

from __future__ import annotations

import math
from typing import Iterable

import pandas as pd

from nla_utils.paper.published import BACKBONES, look_up, published
from nla_utils.paper.results import RunResults
from nla_utils.paper.tables import RELEASED, number, with_interval
from nla_utils.scores import rows

COLUMNS = ("published", RELEASED, "difference")


def released_runs(everything: Iterable[RunResults]) -> dict[str, RunResults]:
    """By the name of the published record, the largest run that evaluates the AV which the authors released for its
    backbone; a run of that AV on another backbone is none."""
    found: dict[str, RunResults] = {}
    for results in sorted(everything, key=lambda r: r.data["targets"]["sizes"]["M"]):
        name = results.backbone.replace("-", "_")
        source = (results.data["training"].get("released") or "").removeprefix("hub:").split("@")[0]
        if name in BACKBONES and source in ("released", published(name)["av"]["repo"]):
            found[name] = results
    return found


def released_table(name: str, results: RunResults) -> pd.DataFrame:
    """Published · released AV, our run (``paper`` protocol) · difference, of each row that the paper prints.

    ``differs`` is written behind a difference that two samples of targets do not explain: beyond √(1 + M / the paper's M)
    times the half width of our 95 % interval on its side. Figures without an interval are not judged, nor those of
    another K.
    """
    stated, table = published(name), []
    for row in (*rows.CEILINGS, *rows.EVALUATION, *rows.RHO, *rows.RERANKS, rows.SLOPE):
        both = "{kind}" in row.published_path
        for kind in ("raw", "cen") if both else ("cen",):
            path, column, key = row.published_path.format(kind=kind), results.column(row.file, "paper"), row.at(kind)
            theirs = look_up(stated, path) if path else None
            if theirs is not None:
                label = f"{row.title}, {'raw' if kind == 'raw' else 'centred'}" if both else row.title
                section = stated["k_curve" if path.startswith("rerank") else path.split(".")[0]]
                table.append((label, number(theirs), with_interval(column, key), _difference(theirs, column, key, section)))
    return pd.DataFrame(table, columns=["row", *COLUMNS]).set_index("row")


def _difference(theirs: float, column: dict, key: str, section: dict) -> str:
    ours, k = column.get(key), column.get("K")
    if ours is None:
        return "–"
    if section.get("K") and k != section["K"]:
        return f"not compared: K {section['K']} and {k}"
    text, (low, high) = f"{ours - theirs:+.3f}", column["ci95"].get(key) or (None, None)
    if low is None or high is None:
        return text
    half = high - ours if theirs > ours else ours - low
    return f"{text}, differs" if abs(ours - theirs) > math.sqrt(1 + column["n"] / section["M"]) * half else text
