"""``paper/tail_reader.md``, from JSON alone: the tail reader beside the AV, taken apart, and on targets drawn anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Iterable, Optional, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nla_extensions.pages import page
from nla_utils import rows
from nla_utils.report import figures
from nla_utils.report.claims import COMPARISON, Claim, judge
from nla_utils.report.figures import NULL_GREY, colour, in_two_lines, panels, style, styled
from nla_utils.report.pages import FigureSpec, Page, Table
from nla_utils.report.results import COMMITTED, RunResults, find_results, largest, without_variants
from nla_utils.report.tables import bits_of, number, over_seeds, signed, with_interval
from nla_utils.rows import Row

# Results files: of notebook 07, of `nla ablate`, of `nla replicate`.
FILES = RESULTS, ABLATION_RESULTS, SEEDS_RESULTS = "tail_reader", "reader_ablation", "reader_seeds"
GUIDED = Row("guided search, at the AV's forward tokens", "guided_cen_mean")
GUIDED_MINUS_TAIL = Row("guided search − the source's own last 8", "guided_minus_tail_oracle_8")
BEST_MINUS_TAIL = Row("best-of-K − the source's own last 4", "bestofK_minus_tail_oracle_4")
MINUS_AV = Row("reader − AV, greedy", "reader_minus_av_cen_greedy")
BEST_MINUS_AV = Row("reader − AV, best-of-K", "reader_minus_av_cen_bestofK")
GUIDED_MINUS_BEST = Row("guided search − best-of-K", "guided_minus_bestofK")
ROWS = (
    *(rows.GREEDY, rows.SAMPLED, rows.BEST, GUIDED, rows.OTHERS_GREEDY, rows.OTHERS_BEST, rows.UNRELATED),
    *(rows.PROBE[1], rows.PROBE[8], rows.RETRIEVAL, rows.IDENTIFIED, rows.RECIPROCAL_RANK),
)
DIFFERENCES = (
    *(rows.GREEDY_MINUS_RETRIEVAL, MINUS_AV, BEST_MINUS_AV),
    *(BEST_MINUS_TAIL, GUIDED_MINUS_BEST, GUIDED_MINUS_TAIL),
)
SEED_ROWS = (
    replace(rows.GREEDY, key="greedy"),
    replace(rows.RETRIEVAL, key="nn_retrieval"),
    replace(rows.GREEDY_MINUS_RETRIEVAL, key="greedy_minus_nn_retrieval"),
    Row("best-of-64", "bestofK"),
    Row("the source's own last 4", "tail_oracle_4"),
    Row("best-of-64 − the source's own last 4", BEST_MINUS_TAIL.key),
    replace(GUIDED, key="guided"),
    Row("the source's own last 8", "tail_oracle_8"),
    GUIDED_MINUS_TAIL,
    Row("identification, top-1 of greedy", "identification_top1"),
)
# What is grown with more sequences: how tables call it, its line, and how much darker than the backbone's colour it is.
SCALED = {
    "reader": ("tail reader, greedy", "o-", 0),
    "retrieval": ("NN-retrieval, same sequences", "s:", -0.4),
    "probe": ("probe decode, last 8", "^--", -0.7),
}
SHARED = ("last_token", "last_token_other", "overlap", "overlap_other", "similarity", "similarity_other")
# Judged in the reader's own column of the results, under the corrected protocol.
CLAIMS = tuple(
    Claim(sentence, "beside §11", row, low, id=sentence)
    for sentence, row, low in (
        ("Greedy text beats the nearest of the pool's texts.", rows.GREEDY_MINUS_RETRIEVAL, 0.0),
        ("Greedy text beats the greedy text of the run's AV.", MINUS_AV, 0.0),
        ("Greedy text beats a linear probe's guess.", rows.GREEDY_MINUS_PROBE, 0.0),
        ("Greedy text fits its own target better than other targets.", rows.GREEDY_MINUS_OTHERS, 0.0),
        ("The best of K draws beats the best of K unrelated texts.", rows.BEST_MINUS_UNRELATED, 0.0),
        ("The best of K draws beats the best of K of the run's AV.", BEST_MINUS_AV, 0.0),
        ("The best of K draws beats the source's own last 4 tokens.", BEST_MINUS_TAIL, 0.0),
        ("Guided search comes within 0.05 of the source's own last 8 tokens.", GUIDED_MINUS_TAIL, -0.05),
        ("Greedy text ranks its own activation first far above chance.", rows.RANK_MINUS_CHANCE, 0.0),
    )
)
# What the first table of the page is about.
FOUND = (
    Claim("tail reader, greedy − NN-retrieval: above 0?", "07", rows.GREEDY_MINUS_RETRIEVAL, 0.0),
    Claim(f"{GUIDED_MINUS_TAIL.label}: above 0?", "07", GUIDED_MINUS_TAIL, 0.0),
)


def reader_column(results: RunResults) -> dict:
    """The reader's numbers, corrected."""
    return results.optional(RESULTS)["reader"]["corrected"]


def trained(results: RunResults) -> str:
    """How much the AV of a run was trained, and whether that is less than the paper's."""
    facts, less = results.training, "undertrained: " if results.undertrained else ""
    return f"{less}{facts['train_pairs']:,} pairs, kept at step {facts['best_step']:,} of {facts['steps']:,}"


def findings_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """Greedy text against the nearest stored text and against the AV's, largest run of each backbone. The verdicts of
    the table are one family."""
    shown = {r.label: r for r in largest(everything)}
    cells = judge({(q, label): (q, reader_column(r)) for q in FOUND for label, r in shown.items()})
    table = {}
    for label, results in shown.items():
        reader, av = reader_column(results), results.column(rows.EVALUATION_FILE, "corrected")
        table[label] = {
            "tail reader, greedy": with_interval(reader, rows.GREEDY.cen),
            "the AV of that run, greedy": f"{with_interval(av, rows.GREEDY.cen)}, {trained(results)}",
            "NN-retrieval": with_interval(reader, rows.RETRIEVAL.cen),
            **{q.sentence: cells[q, label] for q in FOUND},
        }
    return pd.DataFrame(table).rename_axis("held out, centred")


def bits_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The reader's texts in doublings of as many unrelated ones, of the runs that kept scores per text."""
    columns = {r.label: r.optional(RESULTS)["reader"]["corrected"] for r in everything}
    table = {label: bits_of(c) for label, c in columns.items() if rows.BITS_BEST.row.cen in c}
    return pd.DataFrame(table).rename_axis("bits")


def trained_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The tail reader and the AV of the paper's size, best of as many texts as the same forward tokens buy, on the
    sources of the comparison."""
    ways = {
        "our AV": "av",
        "tail reader": "reader",
        "tail reader, guided search": "guided",
        "nearest stored text": "retrieved",
    }
    table = {}
    for results in everything:
        record = results.optional(COMPARISON)
        found = {row["method"]: row for row in record["rows"]}
        shown = {"the AV's training": trained(results), "forward tokens": f"{record['forward_tokens']:,}"}
        for name, method in ways.items():
            row = found[method]
            shown[name] = with_interval(row, "best_cen") + (f", best of {row['k']}" if row["k"] > 1 else "")
        table[results.label] = shown
    return pd.DataFrame(table).rename_axis("fresh sources, centred, best text")


def reader_table(results: RunResults) -> pd.DataFrame:
    """Centred, held out, ``corrected``: AV and tail reader on the same targets."""
    av, reader = results.column(rows.EVALUATION_FILE, "corrected"), reader_column(results)
    table = [(row.title, with_interval(av, row.cen), with_interval(reader, row.cen)) for row in ROWS]
    for n in (1, 2, 4, 8):
        tail = with_interval(results.of(rows.TAILS[n]), rows.TAILS[n].cen)
        table.append((f"the source's own last {n}", tail, tail))
    return pd.DataFrame(table, columns=["row", "the AV of the run", "tail reader"]).set_index("row")


def scorecard(results: RunResults) -> pd.DataFrame:
    """The controls applied to the tail reader, and what it set out to beat; held out, ``corrected``; one family."""
    cells = judge({c.id: (c, reader_column(results)) for c in CLAIMS})
    table = [(c.sentence, f"{c.row.label}: {c.test}", cells[c.id]) for c in CLAIMS]
    return pd.DataFrame(table, columns=["claim", "quantity", "tail reader"]).set_index("claim")


def shared_table(results: RunResults) -> pd.DataFrame:
    """What each text shares with its source, and (``other``) with another target's source."""
    shared = results.optional(RESULTS)["meaning"]
    table = pd.DataFrame({name: {k: with_interval(r, k) for k in SHARED} for name, r in shared.items()}).T
    return table.rename_axis("text").rename(columns=lambda c: c.replace("_", " "))


def seeds_table(record: dict) -> pd.DataFrame:
    """One column a seed, each with its interval over targets, and the mean and standard deviation over seeds."""
    seeds = record["seeds"].items()
    return over_seeds({row.label: {seed: (column, row.cen) for seed, column in seeds} for row in SEED_ROWS})


def growth_table(record: dict) -> pd.DataFrame:
    """Reader, retrieval and probe with as many sequences each, on the same held-out targets; greedy, centred."""
    table = [
        {"sequences": r["train_rows"]}
        | {label: with_interval(_column(r[who]), "mean") for who, (label, *_) in SCALED.items()}
        for r in record["scaling"]
    ]
    return pd.DataFrame(table).set_index("sequences")


def ablation_table(record: dict) -> pd.DataFrame:
    """One change at a time from the baseline; greedy, held out, centred."""
    table = [
        {
            "variant": r["variant"],
            "greedy": with_interval(_column(r), "mean"),
            "minus baseline": signed(_column(r, "minus_baseline", "minus_baseline_ci95"), "minus_baseline"),
            "names the last token": number(r["names_last_token"], 2),
        }
        for r in record["rows"]
    ]
    return pd.DataFrame(table).set_index("variant")


def _column(record: dict, key: str = "mean", ci95: str = "ci95") -> dict:
    """A column of one figure, which is kept with its interval beside it, not by its key."""
    return {key: record[key], "ci95": {key: record[ci95]}}


def tables_of_run(results: RunResults) -> list[Table]:
    """The tail reader's tables for one run; those of the ablation and the seeds where they were run."""
    # Drawn on another machine, or again, targets differ even for the same seed.
    targets, older = results.optional(RESULTS)["made_from"]["targets"], ""
    if targets not in results.training["made_from"].values():
        older = "; the reader's figures are of an older run's targets, the AV's of this run's: "
        older += "not to be compared row by row"
    made = [
        ("reader", f"The tail reader and the AV of the run ({trained(results)}){older}", reader_table(results)),
        ("reader-scorecard", "Scorecard", scorecard(results)),
        ("shared", "What the texts share with their sources", shared_table(results)),
    ]
    for name, end, caption, make in (
        (ABLATION_RESULTS, "reader-ablation", "One change at a time", ablation_table),
        (ABLATION_RESULTS, "reader-growth", "With more sequences", growth_table),
        (SEEDS_RESULTS, "reader-seeds", "Repeated on targets drawn anew", seeds_table),
    ):
        if record := results.optional(name):
            same = targets in record["made_from"].values()
            caption += "" if same else " (other targets than in the tables above)"
            made.append((end, caption, make(record)))
    return [Table(f"{results.stem}-{end}", caption, frame, of=results.label) for end, caption, frame in made]


def draw_compute(ax: Axes, curves: dict[str, list[dict]], color: str, title: str) -> None:
    """Draw centred score against forward tokens: AV, its null, the reader, and the reader's guided search."""
    looks = {
        "AV": (color, "o:"),
        "unrelated text": (NULL_GREY, "s--"),
        "reader": (color, "o-"),
        "reader, guided": ("black", ".-"),
    }
    labels = []
    for name, points in curves.items():
        tokens, (tint, line), middle = [p["tokens"] for p in points], looks[name], len(points) // 2
        y, error = figures.measured([(_column(p), "mean") for p in points])
        ax.plot(tokens, y, line, color=tint, markersize=3)
        ax.fill_between(tokens, y - error[0], y + error[1], color=tint, alpha=0.12, linewidth=0)
        labels.append((name, tokens[middle], y[middle], tint))
    ax.set_xscale("log")
    style(ax, "forward tokens a target (log)\nAV: a token is paid twice, written and read", "centred fve_nrm", title)
    figures.name_points(ax, labels)


@styled
def figure_5(everything: Sequence[RunResults]) -> Figure:
    """Score against forward tokens: the AV, its null, the tail reader and its guided search."""
    chosen = largest(everything)
    fig, axes = panels(len(chosen), figures.WIDTH, 3.6, sharey=True)
    for ax, results in zip(axes, chosen):
        column = results.column(rows.EVALUATION_FILE, "corrected")
        retrieval = column[rows.RETRIEVAL.cen]
        ax.axhline(retrieval, color="black", linewidth=0.8)
        ax.axhspan(*column["ci95"][rows.RETRIEVAL.cen], color="black", alpha=0.08, linewidth=0)
        where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        ax.annotate(rows.RETRIEVAL.label, (0.02, retrieval), (0, -3), fontsize=figures.SMALL, va="top", **where)
        draw_compute(ax, results.optional(RESULTS)["compute"], colour(results.backbone), in_two_lines(results))
        ax.label_outer()
    return fig


@styled
def figure_6(everything: Sequence[RunResults]) -> Figure:
    """Greedy scores against the number of sequences used."""
    fig, axes = panels(len(everything), figures.WIDTH, 3.4, sharey=True)
    ends: list[dict[str, tuple[float, tuple]]] = [{} for _ in everything]
    for ax, results, names in zip(axes, everything, ends):
        scaling = results.optional(ABLATION_RESULTS)["scaling"]
        for i, (who, (label, line, light)) in enumerate(SCALED.items()):
            y, error = figures.measured([(_column(p[who]), "mean") for p in scaling])
            color = figures.shade(colour(results.backbone), light)
            # A few percent apart, so that bars of one size do not cover each other.
            ax.errorbar([p["train_rows"] * 1.05**i for p in scaling], y, error, fmt=line, color=color, capsize=2)
            names[label.split(",")[0]] = (y[-1], color)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:,.0f}")
        style(ax, "sequences used (log₂)", "centred fve_nrm", in_two_lines(results))
        ax.label_outer()
    fig.draw_without_rendering()
    for ax, names in zip(axes, ends):
        figures.name_ends(ax, ax.get_xlim()[1], names)
    return fig


COMPUTE = FigureSpec(
    "fig5_beyond",
    figure_5,
    "Score against forward tokens, held out. The tail reader writes without the language model and pays only to read "
    "its texts again; the AV pays for each token twice, to write it and to read it. The guided search spends what the "
    "AV's best of K does. The AV is the one of the run in the title. Bands are 95 % intervals over targets.",
)
GROWTH = FigureSpec(
    "fig6_reader_scaling",
    figure_6,
    "The tail reader's greedy score, the probe's and NN-retrieval's against the number of sequences that each may use, "
    "on the same held-out targets. Bars are 95 % intervals over targets; points of one size are drawn a little apart.",
)


def reader_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The page of the results below ``roots``; ``own`` (backbone, profile) is a run to show in any case."""
    everything = find_results(roots)
    shown = [r for r in without_variants(everything, own) if r.optional(RESULTS)]
    compared = [r for r in largest(without_variants(everything)) if r.optional(COMPARISON)]
    caption = "Against the AV of the paper's size, at equal forward tokens"
    found = {
        "findings": Table("reader-findings", "What was found", findings_table(shown)),
        "bits": Table("reader-bits", "In bits", bits_table(shown)),
        "trained": Table("reader-trained", caption, trained_table(compared)),
    }
    of_runs = {f"{r.label}: {r.title}": tables_of_run(r) for r in shown}
    drawn = {COMPUTE: shown, GROWTH: [r for r in shown if r.optional(ABLATION_RESULTS)]}
    return page("tail_reader", everything, FILES, shown, drawn, found, of_runs)
