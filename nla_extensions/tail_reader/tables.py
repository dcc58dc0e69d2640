"""Tables and claims of the tail reader: beside the paper's AV, taken apart, repeated on targets drawn anew."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from nla_utils import rows
from nla_utils.report.claims import Claim, cell, claimed, decide
from nla_utils.report.results import RunResults
from nla_utils.report.tables import number, over_seeds, with_interval
from nla_utils.rows import Row

# Results files: of notebook 07, of `nla ablate`, of `nla replicate`.
RESULTS, ABLATION_RESULTS, SEEDS_RESULTS = "tail_reader", "reader_ablation", "reader_seeds"
GUIDED = Row("guided search, at the AV's forward tokens", "guided_cen_mean")
GUIDED_MINUS_TAIL = Row("guided search − the source's own last 8", "guided_minus_tail_oracle_8")
BEST_MINUS_TAIL = Row("best-of-K − the source's own last 4", "bestofK_minus_tail_oracle_4")
MINUS_AV = Row("reader − AV, greedy", "reader_minus_av_cen_greedy")
BEST_MINUS_AV = Row("reader − AV, best-of-K", "reader_minus_av_cen_bestofK")
GUIDED_MINUS_BEST = Row("guided search − best-of-K", "guided_minus_bestofK")
ROWS = (
    rows.GREEDY,
    rows.SAMPLED,
    rows.BEST,
    GUIDED,
    rows.OTHERS_GREEDY,
    rows.OTHERS_BEST,
    rows.UNRELATED,
    rows.PROBE[1],
    rows.PROBE[8],
    rows.RETRIEVAL,
    rows.IDENTIFIED,
    rows.RECIPROCAL_RANK,
)
DIFFERENCES = (
    rows.GREEDY_MINUS_RETRIEVAL,
    MINUS_AV,
    BEST_MINUS_AV,
    BEST_MINUS_TAIL,
    GUIDED_MINUS_BEST,
    GUIDED_MINUS_TAIL,
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
SCALED = {"reader": "tail reader, greedy", "retrieval": "NN-retrieval, same sequences", "probe": "probe decode, last 8"}
SHARED = ("last_token", "last_token_other", "overlap", "overlap_other", "similarity", "similarity_other")


def _claim(name: str, sentence: str, row: Row, low: float = 0.0) -> Claim:
    return Claim(sentence, "beside §11", row, low, id=name)


# Judged in the reader's own column of the results, under the corrected protocol.
CLAIMS: tuple[Claim, ...] = (
    _claim("reader_beats_retrieval", "Greedy text beats the nearest of the pool's texts.", rows.GREEDY_MINUS_RETRIEVAL),
    _claim("reader_beats_av", "Greedy text beats the greedy text of the run's AV.", MINUS_AV),
    _claim("reader_beats_probe", "Greedy text beats a linear probe's guess.", rows.GREEDY_MINUS_PROBE),
    _claim(
        "reader_beats_other", "Greedy text fits its own target better than other targets.", rows.GREEDY_MINUS_OTHERS
    ),
    _claim(
        "reader_best_beats_unrelated",
        "The best of K draws beats the best of K unrelated texts.",
        rows.BEST_MINUS_UNRELATED,
    ),
    _claim("reader_best_beats_av", "The best of K draws beats the best of K of the run's AV.", BEST_MINUS_AV),
    _claim("reader_best_beats_tail_4", "The best of K draws beats the source's own last 4 tokens.", BEST_MINUS_TAIL),
    _claim(
        "guided_nears_tail_8",
        "Guided search comes within 0.05 of the source's own last 8 tokens.",
        GUIDED_MINUS_TAIL,
        low=-0.05,
    ),
    _claim("reader_identifies", "Greedy text ranks its own activation first far above chance.", rows.RANK_MINUS_CHANCE),
)


def reader_column(results: RunResults, protocol: str = "corrected") -> dict:
    """The reader's numbers of one protocol."""
    return results.optional(RESULTS)["reader"][protocol]


def trained(results: RunResults) -> str:
    """How much the AV of a run was trained, and whether that is less than the paper's."""
    facts = results.data["training"]
    return f"{'undertrained: ' if results.undertrained else ''}{facts['train_pairs']:,} pairs, {facts['steps']:,} steps"


def reader_table(results: RunResults) -> pd.DataFrame:
    """Centred, held out, ``corrected``: AV and tail reader on the same targets."""
    av, reader, ceilings = (
        results.column("centered_eval", "corrected"),
        reader_column(results),
        results.column("oracle_ceiling", "corrected"),
    )
    table = [(row.title, with_interval(av, row.cen), with_interval(reader, row.cen)) for row in ROWS]
    tails = [(f"the source's own last {n}", with_interval(ceilings, rows.TAILS[n].cen)) for n in (1, 2, 4, 8)]
    table += [(label, text, text) for label, text in tails]
    return pd.DataFrame(table, columns=["row", "the AV of the run", "tail reader"]).set_index("row")


def scorecard(results: RunResults) -> pd.DataFrame:
    """The controls applied to the tail reader, and what it set out to beat; held out, ``corrected``; one family."""
    column = reader_column(results)
    words = decide({c.id: claimed(column, c.row.cen, c.low, c.high) for c in CLAIMS})
    table = [
        {
            "claim": c.sentence,
            "quantity": f"{c.row.label}: {c.test}",
            "tail reader": cell(column, c.row.cen, words[c.id]),
        }
        for c in CLAIMS
    ]
    return pd.DataFrame(table).set_index("claim")


def shared_table(results: RunResults) -> pd.DataFrame:
    """What each text shares with its source, and (``other``) with another target's source."""
    shared = results.optional(RESULTS)["meaning"]
    table = pd.DataFrame({name: {k: with_interval(r, k) for k in SHARED} for name, r in shared.items()}).T
    table.index.name = "text"
    return table.rename(columns=lambda c: c.replace("_", " "))


def seeds_table(record: dict) -> pd.DataFrame:
    """One column a seed, each with its interval over targets, and the mean and standard deviation over seeds."""
    seeds = record["seeds"].items()
    return over_seeds({row.label: {seed: (column, row.cen) for seed, column in seeds} for row in SEED_ROWS})


def growth_table(record: dict) -> pd.DataFrame:
    """Reader, retrieval and probe with as many sequences each, on the same held-out targets; greedy, centred."""
    table = [
        {"sequences": r["train_rows"]} | {label: _mean_with_interval(r[who]) for who, label in SCALED.items()}
        for r in record["scaling"]
    ]
    return pd.DataFrame(table).set_index("sequences")


def _mean_with_interval(record: dict) -> str:
    return with_interval({"x": record["mean"], "ci95": {"x": record["ci95"]}}, "x")


def ablation_table(record: dict) -> pd.DataFrame:
    """One change at a time from the baseline; greedy, held out, centred."""
    table = [
        {
            "variant": r["variant"],
            "greedy": _mean_with_interval(r),
            "minus baseline": "{:+.3f} [{:+.3f}, {:+.3f}]".format(r["minus_baseline"], *r["minus_baseline_ci95"]),
            "names the last token": number(r["names_last_token"], 2),
        }
        for r in record["rows"]
    ]
    return pd.DataFrame(table).set_index("variant")
