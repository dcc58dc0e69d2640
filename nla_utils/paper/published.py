"""The paper's numbers, read from ``paper/published``: data to compare with, never inputs to a measurement."""

from __future__ import annotations

import math
from typing import Any, Iterator, Mapping, Optional

from nla_utils import metrics
from nla_utils.artefacts import read_json
from nla_utils.config import DATA

BACKBONES = ("qwen25_7b", "llama32_3b", "gemma2_2b")
TITLES = {
    "qwen25_7b": "Qwen2.5-7B",
    "llama32_3b": "Llama-3.2-3B",
    "gemma2_2b": "Gemma-2-2B",
    "gpt_oss_20b": "gpt-oss-20b",
}
# Targets and pool of the published evaluations: NN-in-pool and NN-retrieval are the best of as many unrelated texts.
TARGETS, POOL = 200, 2000
# The backbone of §11, whose tables the section regenerates.
SECTION_11 = "gemma2_2b"


def published(name: str) -> dict:
    """The published figures of one backbone; raises ``ArtefactError`` if the file is missing."""
    return read_json(DATA / "paper" / "published" / f"{name}.json")


def look_up(record: dict, path: str) -> Optional[Any]:
    """Value at a dotted path, ``None`` where the paper does not give one."""
    for key in path.split("."):
        if not isinstance(record, dict) or key not in record:
            return None
        record = record[key]
    return record


def k_curve(name: str, kind: str = "cen") -> dict[int, float]:
    """Published K-curve; where the paper averages two runs, so does this."""
    record = published(name)["k_curve"]
    if f"runs_{kind}" in record:
        runs = record[f"runs_{kind}"]
        return {int(k): sum(r[k] for r in runs) / len(runs) for k in runs[0]}
    return {int(k): v for k, v in record[kind].items()}


def ceiling(name: str) -> tuple[float, float]:
    """(floor, ceiling), centred, as ρ uses them."""
    record = published(name)
    rows = record["ceilings"]
    return rows["random_floor"]["cen"], rows[record["ceiling_used"]]["cen"]


def card() -> dict:
    """§11's model card: its tables and statements as text, digit for digit."""
    return published(f"{SECTION_11}_card")


def null_at(points: Mapping[int, float], k: int) -> float:
    """The best of k unrelated texts, centred: read off the straight line against log K through ``points``,
    ``{number of texts: their best}``."""
    slope, intercept, _ = metrics.slope_per_doubling(list(points), list(points.values()))
    return slope * math.log2(k) + intercept


def published_null(name: str, k: int) -> tuple[float, float]:
    """(best of k unrelated texts, best of k rollouts), centred, from what the paper itself prints.

    NN-in-pool among 200 and NN-retrieval from 2,000 are the best of 199 and of 2,000 unrelated texts: two
    points of a line against log K, read off at k. Unlike the rollouts those texts are encoded behind BOS,
    and the first point uses the 200 targets' own mean.
    """
    record = published(name)
    points = {TARGETS - 1: look_up(record, "ceilings.nn_in_pool.cen"), POOL: look_up(record, "centred_eval.nn_retrieval.cen")}
    return null_at(points, k), look_up(record, "centred_eval.best_of_k.cen")


def later_nulls() -> Iterator[tuple[str, int, float, float]]:
    """(backbone, k, best of k unrelated texts, best of k rollouts), centred, of the paper's later ports.

    They print no NN-in-pool, so the line runs from one text (the floor) to NN-retrieval from the pool. A null curve
    bends down against log K, so it lies above that line between its ends, and the difference is an upper bound.
    """
    gpt_oss, gemma_4 = published("gpt_oss_20b"), published("gemma4_31b")
    parts = ((TITLES["gpt_oss_20b"], gpt_oss), ("gemma-4-31B-it", gemma_4["it"]), ("gemma-4-31B", gemma_4["base"]))
    for title, record in parts:
        anchors, curve = record["ceilings"], record["k_curve"]["cen"]
        k = max(map(int, curve))
        points = {1: anchors["random_floor"]["cen"], anchors["pool"]: anchors["nn_retrieval"]["cen"]}
        yield title, k, null_at(points, k), curve[str(k)]
