"""Tables of "Beyond §11": the tail reader beside the paper's AV, its ablation, its meaning."""

from __future__ import annotations

from typing import Optional

import pandas as pd

from nla_utils.results import RunResults, optional_results
from nla_utils.tables import number, over_seeds, with_interval

ROWS = (
    ("greedy", "adapter_cen_greedy_mean"),
    ("sampled (mean)", "adapter_cen_sampled_mean"),
    ("best-of-K", "adapter_cen_bestofK_mean"),
    ("guided search, at the AV's forward tokens", "guided_cen_mean"),
    ("control: greedy of other targets", "shuffled_v_cen_greedy_mean"),
    ("control: best-of-K of other targets", "shuffled_v_cen_bestofK_mean"),
    ("control: best-of-K of unrelated texts", "unrelated_text_cen_bestofK_mean"),
    ("control: probe decode, last 1", "probe_decode_1_cen_mean"),
    ("control: probe decode, last 8", "probe_decode_8_cen_mean"),
    ("NN-retrieval", "nn_retrieval_cen_mean"),
    ("identification, top-1 of greedy", "greedy_identification_top1"),
    ("identification, mean reciprocal rank", "greedy_identification_mrr"),
)
SEED_ROWS = {
    "greedy": "greedy",
    "nn_retrieval": "NN-retrieval",
    "greedy_minus_nn_retrieval": "greedy − NN-retrieval",
    "bestofK": "best-of-64",
    "tail_oracle_4": "the source's own last 4",
    "bestofK_minus_tail_oracle_4": "best-of-64 − the source's own last 4",
    "guided": "guided search, at the AV's forward tokens",
    "tail_oracle_8": "the source's own last 8",
    "guided_minus_tail_oracle_8": "guided search − the source's own last 8",
    "identification_top1": "identification, top-1 of greedy",
}
SCALED = {
    "reader": "tail reader, greedy",
    "retrieval": "NN-retrieval, same sequences",
    "probe": "probe decode, last 8",
}
MEANING = ("last_token", "last_token_other", "overlap", "overlap_other", "similarity", "similarity_other")


def reader_table(run: RunResults) -> pd.DataFrame:
    """Centred, held out, ``corrected``: AV and tail reader on the same targets."""
    av, reader = run.column("centered_eval", "corrected"), run.data["centered_eval"]["reader"]["corrected"]
    rows = [{"row": label, "the paper's AV": with_interval(av, key), "tail reader": with_interval(reader, key)}
            for label, key in ROWS]  # fmt: skip
    ceilings = run.column("oracle_ceiling", "corrected")
    for n in (1, 2, 4, 8):
        text = with_interval(ceilings, f"tail_oracle_{n}_cen_fve_mean")
        rows.append({"row": f"the source's own last {n}", "the paper's AV": text, "tail reader": text})
    return pd.DataFrame(rows).set_index("row")


def meaning_table(run: RunResults) -> pd.DataFrame:
    """What each text shares with its source, and (``other``) with another target's source."""
    rows = {name: {k: with_interval(record, k) for k in MEANING}
            for name, record in run.data["centered_eval"]["meaning"].items()}  # fmt: skip
    table = pd.DataFrame(rows).T
    table.index.name = "text"
    return table.rename(columns=lambda c: c.replace("_", " "))


def ablation_record(run: RunResults) -> Optional[dict]:
    """The reader's ablation, if it was run (``nla ablate``)."""
    return optional_results(run, "reader_ablation")


def seeds_record(run: RunResults) -> Optional[dict]:
    """The reader's claims over several seeds, if they were repeated (``nla replicate``)."""
    return optional_results(run, "reader_seeds")


def seeds_table(record: dict) -> pd.DataFrame:
    """One column a seed, each with its interval over targets, and the mean and standard deviation over seeds."""
    seeds = record["seeds"].items()
    return over_seeds({label: {seed: (column, key) for seed, column in seeds} for key, label in SEED_ROWS.items()})


def scaling_table(record: dict) -> pd.DataFrame:
    """Reader, retrieval and probe with as many sequences each, on the same held-out targets; greedy, centred."""
    rows = [
        {"sequences": r["train_rows"]} | {label: _mean_with_interval(r[who]) for who, label in SCALED.items()}
        for r in record["scaling"]
    ]
    return pd.DataFrame(rows).set_index("sequences")


def _mean_with_interval(record: dict) -> str:
    return with_interval({"x": record["mean"], "ci95": {"x": record["ci95"]}}, "x")


def ablation_table(record: dict) -> pd.DataFrame:
    """One change at a time from the baseline; greedy, held out, centred."""
    rows = [
        {
            "variant": r["variant"],
            "greedy": _mean_with_interval(r),
            "minus baseline": "{:+.3f} [{:+.3f}, {:+.3f}]".format(r["minus_baseline"], *r["minus_baseline_ci95"]),
            "names the last token": number(r["names_last_token"], 2),
        }
        for r in record["rows"]
    ]
    return pd.DataFrame(rows).set_index("variant")
