"""``paper/comparison.md``: the ways of reading side by side, from JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_extensions.pages import page
from nla_utils.report.claims import COMPARISON as RESULTS
from nla_utils.report.claims import claimed, decide
from nla_utils.report.figures import NULL_GREY, WIDTH, colour, measured, name_points, style, styled
from nla_utils.report.pages import FigureSpec, Page, Table
from nla_utils.report.results import COMMITTED, RunResults, find_results
from nla_utils.report.tables import number, signed, with_interval

# What a reader is shown for a method.
SHOWN = {
    "av": "our AV",
    "reader": "tail reader",
    "guided": "tail reader, guided",
    "lens": "logit lens",
    "patchscope": "Patchscope",
    "retrieved": "nearest stored text",
}
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


def shown(method: str) -> str:
    """A way of reading as tables and figures name it."""
    return SHOWN.get(method, method)


def findings_table(records: Mapping[str, dict]) -> pd.DataFrame:
    """Some questions and each backbone's verdict with its number; ``records`` by the label of the run. The verdicts of
    the table are one family."""
    rows = {(label, row["method"]): row for label, record in records.items() for row in record["rows"]}
    asked = {(ask, label): (rows[label, method], key, low) for ask, method, key, low in QUESTIONS for label in records}
    words = decide({place: claimed(*figure) for place, figure in asked.items()})
    table = pd.DataFrame(index=pd.Index([ask for ask, *_ in QUESTIONS], name="question"), columns=list(records))
    for (ask, label), (row, key, low) in asked.items():
        value = signed(row, key) if low == 0 else with_interval(row, key, 2)
        table.loc[ask, label] = f"{words[ask, label]}: {value}"
    return table


def ways_table(record: dict) -> pd.DataFrame:
    """Score, margin over other sources' texts, and fluency of the likeliest text and of the best."""
    table = []
    for row in _without_price(record):
        cells = {
            "way of reading": shown(row["method"]),
            "K": str(row["k"]),
            "likeliest": with_interval(row, "greedy_cen"),
            "− others'": signed(row, "greedy_minus_others"),
            "best of K": with_interval(row, "best_cen"),
            "best − others' best": signed(row, "best_minus_others"),
            "nats a token, likeliest": number(row["greedy_nats"], 2),
            "nats a token, best": number(row["best_nats"], 2),
        }
        if row["k"] == 1:
            cells |= dict.fromkeys(("K", "likeliest", "− others'", "nats a token, likeliest"), "–")
        table.append(cells)
    return pd.DataFrame(table).set_index("way of reading")


def ends_table(record: dict) -> pd.DataFrame:
    """How often a text is closer to its own source than to its twin, and the best text's last n tokens less the
    source's."""
    table = []
    for row in _without_price(record):
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


def _without_price(record: dict) -> list[dict]:
    """The ways of reading, each once: the guided search at no price."""
    return [row for row in record["rows"] if "fluency" not in row]


def price_table(record: dict) -> pd.DataFrame:
    """Score and nats of the guided search at each price."""
    table = [
        (f"{row.get('fluency', 0):g}", with_interval(row, "best_cen"), with_interval(row, "best_nats", 2))
        for row in record["rows"]
        if row["method"].startswith("guided")
    ]
    return pd.DataFrame(table, columns=["λ, score a nat", "score", "nats a token"]).set_index("λ, score a nat")


def directions_table(record: dict) -> pd.DataFrame:
    """Score of the best text for each kind of vector, and the chance that as many unrelated texts score less."""
    found: dict[str, dict[str, str]] = {}
    for row in record["directions"]:
        cell = f"{with_interval(row, 'score')} ({row['percentile']:.0%})"
        found.setdefault(shown(row["method"]), {})[row["kind"]] = cell
    return pd.DataFrame(found).T.rename_axis("way of reading")


@styled
def figure_9(everything: Sequence[RunResults]) -> Figure:
    """Centred score against nats a token: each way's likeliest text and its best, and the search at every price."""
    n = len(everything)
    fig, axes = plt.subplots(n, 1, figsize=(WIDTH, 3.7 * n), layout="constrained", sharey=True, squeeze=False)
    for ax, results in zip(axes[:, 0], everything):
        style(ax, "nats a token of the text itself (less is more fluent)", "centred fve_nrm", results.label)
        _draw_frontier(ax, results.optional(RESULTS)["rows"], colour(results.backbone))
    return fig


def _draw_frontier(ax: Axes, ways: Sequence[dict], color: str) -> None:
    searched, labels = [w for w in ways if w["method"].startswith("guided")], []
    ax.plot([w["best_nats"] for w in searched], [w["best_cen"] for w in searched], "-", color=color)
    for way in ways:
        priced, written = way in searched[1:], way["k"] > 1
        tint = color if written or way in searched else NULL_GREY
        best, greedy = ((way[f"{name}_nats"], way[f"{name}_cen"]) for name in ("best", "greedy"))
        bars = [measured([(way, f"best_{key}")])[1] for key in ("nats", "cen")]
        size = 2.5 if priced else 5
        ax.errorbar(*best, xerr=bars[0], yerr=bars[1], fmt="o", markersize=size, color=tint, elinewidth=0.6)
        if written:
            ax.plot(*zip(greedy, best), ":", color=tint, linewidth=0.8)
            ax.plot(*greedy, "o", markersize=5, color=tint, markerfacecolor="white")
        if not priced:
            labels.append((shown(way["method"]) + (f", best of {way['k']}" if written else ""), *best, tint))
    ax.margins(x=0.12, y=0.08)
    name_points(ax, labels)


FRONTIER = FigureSpec(
    "fig9_fluency",
    figure_9,
    "How close a text comes to v against what its words cost the language model. Filled: the best of as many texts as "
    "the budget buys; hollow, joined to it: the likeliest text. The line is the guided search, paying more for fluent "
    "words from right to left. Grey: texts that nobody wrote for v. Upper left is best. Bars are 95 % intervals over "
    "sources.",
)


def tables_of_run(results: RunResults) -> list[Table]:
    """The tables of one comparison."""
    record = results.optional(RESULTS)
    made = (
        ("ways", "Ways of reading at the same forward tokens", ways_table(record)),
        ("ends", "Beyond the last words", ends_table(record)),
        ("price", "The guided search, paying for fluent words", price_table(record)),
        ("directions", "Directions that are no activation of a text", directions_table(record)),
    )
    return [Table(f"{results.stem}-{end}", caption, frame, of=results.label) for end, caption, frame in made]


def comparison_page(roots: Iterable[Path] = (COMMITTED,)) -> Page:
    """The page of the results below ``roots``."""
    everything = find_results(roots)
    shown = [r for r in everything if r.optional(RESULTS)]
    facts = {r.label: r.optional(RESULTS) for r in shown}
    found = {"findings": Table("comparison-findings", "What was found", findings_table(facts))}
    of_runs = {r.label: tables_of_run(r) for r in shown}
    return page("comparison", everything, (RESULTS,), shown, {FRONTIER: shown}, found, of_runs, facts=facts)
