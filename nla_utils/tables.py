"""DataFrames of published and reproduced numbers, and their Markdown and LaTeX."""

from __future__ import annotations

import statistics
from typing import Mapping, Optional, Sequence

import pandas as pd

from nla_utils.published import BACKBONES, TITLES, k_curve, look_up, published, published_null
from nla_utils.results import RunResults

# (label, published path, key in our results); {kind} is raw or cen.
CEILING_ROWS = (
    ("replay", "ceilings.replay.{kind}", "replay_{kind}_fve_mean"),
    ("NN-in-pool", "ceilings.nn_in_pool.{kind}", "nn_in_pool_{kind}_fve_mean"),
    ("NN in the large pool", "", "nn_large_pool_{kind}_fve_mean"),
    ("paraphrase best-of-8", "ceilings.paraphrase_best_of_8.{kind}", "paraphrase_bestof8_{kind}_fve_mean"),
    ("paraphrase, all", "ceilings.paraphrase_all.{kind}", "paraphrase_all_{kind}_fve_mean"),
    ("random floor", "ceilings.random_floor.{kind}", "random_floor_{kind}_fve_mean"),
    ("control: unrelated text best-of-8", "", "unrelated_text_bestof8_{kind}_fve_mean"),
    *((f"tail oracle, last {n}", "", f"tail_oracle_{n}_{{kind}}_fve_mean") for n in (1, 2, 4, 8, 16, 32)),
)
EVAL_ROWS = (
    ("greedy", "centred_eval.greedy.{kind}", "adapter_{kind}_greedy_mean"),
    ("sampled (mean)", "centred_eval.sampled_mean.{kind}", "adapter_{kind}_sampled_mean"),
    ("best-of-K", "centred_eval.best_of_k.{kind}", "adapter_{kind}_bestofK_mean"),
    ("mean of the best 5", "centred_eval.top5_of_k.{kind}", "adapter_{kind}_top5_mean"),
    ("NN-retrieval", "centred_eval.nn_retrieval.{kind}", "nn_retrieval_{kind}_mean"),
    ("random floor", "centred_eval.random_floor.{kind}", "random_floor_{kind}_mean"),
    *((f"control: probe decode, last {n}", "", f"probe_decode_{n}_{{kind}}_mean") for n in (1, 2, 4, 8)),
    ("control: unrelated text, one", "", "unrelated_text_{kind}_bestof1_mean"),
    ("control: unrelated text, best-of-K", "", "unrelated_text_{kind}_bestofK_mean"),
    ("control: greedy of other targets", "", "shuffled_v_{kind}_greedy_mean"),
    ("control: best-of-K of other targets", "", "shuffled_v_{kind}_bestofK_mean"),
)
RHO_ROWS = (
    ("greedy", "centred_eval.greedy.rho_cen", "rho_cen_greedy"),
    ("sampled (mean)", "centred_eval.sampled_mean.rho_cen", "rho_cen_sampled"),
    ("best-of-K over paraphrase best-of-8", "centred_eval.best_of_k.rho_cen", "rho_cen_bestofK"),
    ("best-of-8 over paraphrase best-of-8", "", "rho_cen_bestof8"),
    ("NN-retrieval", "centred_eval.nn_retrieval.rho_cen", "rho_cen_nn_retrieval"),
)
RERANK_ROWS = (
    ("greedy", "k_curve.greedy.cen", "adapter_cen_greedy_mean"),
    ("sampled (mean)", "k_curve.sampled_mean.cen", "adapter_cen_sampled_mean"),
    ("logp-rerank", "rerank.logp.cen", "logp_rerank_cen_mean"),
    ("logp-rerank − greedy", "rerank.logp.vs_greedy_cen", "logp_rerank_cen_mean_minus_adapter_cen_greedy_mean"),
    ("NN-anchor rerank", "rerank.nn_anchor.cen", "nn_anchor_rerank_cen_mean"),
    ("NN-anchor itself", "rerank.nn_anchor_baseline_uncentred", "nn_anchor_baseline"),
    ("Spearman(logp, oracle), mean", "rerank.spearman_logp_vs_oracle_cen.mean", "spearman_logp_vs_oracle_cen_mean"),
    ("Spearman, p50", "rerank.spearman_logp_vs_oracle_cen.p50", "spearman_logp_vs_oracle_cen_p50"),
    ("Spearman, p05", "rerank.spearman_logp_vs_oracle_cen.p05", "spearman_logp_vs_oracle_cen_p05"),
    ("Spearman, p95", "rerank.spearman_logp_vs_oracle_cen.p95", "spearman_logp_vs_oracle_cen_p95"),
)


def number(value: Optional[float], digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(column: dict, key: str, digits: int = 3) -> str:
    """``0.576 [0.561, 0.592]``, or a dash where the column has no such row."""
    if column.get(key) is None:
        return "–"
    text = number(column[key], digits)
    interval = column["ci95"].get(key)
    if interval and None not in interval:
        text += f" [{number(interval[0], digits)}, {number(interval[1], digits)}]"
    return text


def mean_sd(values: Sequence[float], style: str = ".3f") -> str:
    """Mean ± standard deviation, of n − 1."""
    return f"{statistics.mean(values):{style}} ± {statistics.stdev(values):.3f}"


def over_seeds(rows: Mapping[str, Mapping[int, tuple[dict, str]]]) -> pd.DataFrame:
    """``{label: {seed: (column, key)}}`` as a table: each seed with its interval over targets, and mean ± standard
    deviation over seeds."""
    table = []
    for label, by_seed in rows.items():
        values = [column[key] for column, key in by_seed.values()]
        row = {"row": label, **{f"seed {seed}": with_interval(*where) for seed, where in by_seed.items()}}
        row["over seeds, mean ± sd"] = mean_sd(values)
        table.append(row)
    return pd.DataFrame(table).set_index("row")


def _side_by_side(rows, run: RunResults, name: str, reference: str, kind: str) -> pd.DataFrame:
    theirs = published(reference)
    paper, corrected = run.column(name, "paper"), run.column(name, "corrected")
    table = []
    for label, path, key in rows:
        stated = look_up(theirs, path.format(kind=kind)) if path else None
        ours = key.format(kind=kind)
        table.append(
            {
                "row": label,
                f"published, {TITLES[reference]}": number(stated),
                "paper protocol": with_interval(paper, ours),
                "corrected": with_interval(corrected, ours),
            }
        )
    return pd.DataFrame(table).set_index("row")


def ceilings_table(run: RunResults, reference: str, kind: str) -> pd.DataFrame:
    """Ceilings (§11; PROTOCOL.md §5): published · paper protocol · corrected."""
    return _side_by_side(CEILING_ROWS, run, "oracle_ceiling", reference, kind)


def evaluation_table(run: RunResults, reference: str, kind: str) -> pd.DataFrame:
    """Centred evaluation (PROTOCOL.md §4)."""
    rows = list(EVAL_ROWS)
    if kind == "raw":
        rows.append(("control: constant μ", "", "constant_mu_raw_mean"))
    return _side_by_side(rows, run, "centered_eval", reference, kind)


def rho_table(run: RunResults, reference: str) -> pd.DataFrame:
    """ρ_cen; ``corrected`` divides by a ceiling drawn as often as the row."""
    return _side_by_side(RHO_ROWS, run, "centered_eval", reference, "cen")


def rerank_table(run: RunResults, reference: str) -> pd.DataFrame:
    """Cheap reranks and Spearman (PROTOCOL.md §6)."""
    return _side_by_side(RERANK_ROWS, run, "rerank_eval", reference, "cen")


def k_curve_table(run: RunResults, reference: str) -> pd.DataFrame:
    """Centred K-curve: published · first-K under ``paper`` · exact under ``corrected`` · its nulls."""
    stated = k_curve(reference)
    paper, corrected = run.column("rerank_eval", "paper"), run.column("rerank_eval", "corrected")
    columns = (
        ("paper protocol", paper, "kcurve_oracle_top1_cen"),
        ("control: unrelated text, paper protocol", paper, "kcurve_unrelated_text_cen"),
        ("corrected", corrected, "kcurve_oracle_top1_cen"),
        ("control: unrelated text, corrected", corrected, "kcurve_unrelated_text_cen"),
        ("control: other targets' rollouts, corrected", corrected, "kcurve_shuffled_v_cen"),
    )
    ks = sorted(set(stated) | set(paper["ks"]))
    table = []
    for k in ks:
        row = {"K": k, f"published, {TITLES[reference]}": number(stated.get(k))}
        for label, column, key in columns:
            row[label] = _curve_point(column, key, str(k))
        table.append(row)
    slope = {"K": "slope per doubling"}
    slope[f"published, {TITLES[reference]}"] = number(published(reference)["k_curve"]["stated_slope_per_doubling_cen"])
    for label, column, key in columns:
        suffix = {"kcurve_oracle_top1_cen": "cen", "kcurve_unrelated_text_cen": "unrelated_text_cen",
                  "kcurve_shuffled_v_cen": "shuffled_v_cen"}[key]  # fmt: skip
        slope[label] = with_interval(column, f"slope_per_doubling_{suffix}")
    return pd.DataFrame([*table, slope]).set_index("K")


def _curve_point(column: dict, key: str, k: str) -> str:
    if k not in column[key]:
        return "–"
    low, high = column["ci95"][key][k]
    return f"{column[key][k]:.3f} [{low:.3f}, {high:.3f}]"


def headline_table(run: RunResults, reference: str) -> pd.DataFrame:
    """The numbers of §11's summary: published · paper protocol · corrected."""
    theirs = published(reference)
    names = {"ceil": "oracle_ceiling", "eval": "centered_eval", "rank": "rerank_eval"}
    rows = (
        ("‖μ‖", "centred_eval.mu_norm", "eval", "mu_norm", 1),
        ("replay, centred", "ceilings.replay.cen", "ceil", "replay_cen_fve_mean", 3),
        ("paraphrase ceiling (best-of-8), centred", "ceilings.paraphrase_best_of_8.cen", "ceil",
         "paraphrase_bestof8_cen_fve_mean", 3),
        ("random floor, raw", "ceilings.random_floor.raw", "ceil", "random_floor_raw_fve_mean", 3),
        ("random floor, centred", "ceilings.random_floor.cen", "ceil", "random_floor_cen_fve_mean", 3),
        ("greedy, raw", "centred_eval.greedy.raw", "eval", "adapter_raw_greedy_mean", 3),
        ("greedy, centred", "centred_eval.greedy.cen", "eval", "adapter_cen_greedy_mean", 3),
        ("control: greedy of other targets, centred", "", "eval", "shuffled_v_cen_greedy_mean", 3),
        ("control: probe decode of the last 8, centred", "", "eval", "probe_decode_8_cen_mean", 3),
        ("best-of-K, centred", "centred_eval.best_of_k.cen", "eval", "adapter_cen_bestofK_mean", 3),
        ("control: best-of-K of unrelated text, centred", "", "eval", "unrelated_text_cen_bestofK_mean", 3),
        ("control: best-of-K of other targets, centred", "", "eval", "shuffled_v_cen_bestofK_mean", 3),
        ("NN-retrieval, centred", "centred_eval.nn_retrieval.cen", "eval", "nn_retrieval_cen_mean", 3),
        ("slope per doubling of K, centred", "k_curve.stated_slope_per_doubling_cen", "rank",
         "slope_per_doubling_cen", 3),
        ("control: slope of unrelated text", "", "rank", "slope_per_doubling_unrelated_text_cen", 3),
        ("logp-rerank, centred", "rerank.logp.cen", "rank", "logp_rerank_cen_mean", 3),
        ("NN-anchor rerank, centred", "rerank.nn_anchor.cen", "rank", "nn_anchor_rerank_cen_mean", 3),
    )  # fmt: skip
    table = [
        {
            "row": label,
            f"published, {TITLES[reference]}": number(look_up(theirs, path) if path else None, digits),
            "paper protocol": with_interval(run.column(names[file], "paper"), key, digits),
            "corrected": with_interval(run.column(names[file], "corrected"), key, digits),
        }
        for label, path, file, key, digits in rows
    ]
    return pd.DataFrame(table).set_index("row")


def backbones_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """The published three beside every run, one column each; runs under the paper protocol."""
    rows = (
        ("layer / blocks", None, None, None),
        ("‖μ‖", "centred_eval.mu_norm", "centered_eval", "mu_norm"),
        ("random floor, raw", "ceilings.random_floor.raw", "oracle_ceiling", "random_floor_raw_fve_mean"),
        ("random floor, centred", "ceilings.random_floor.cen", "oracle_ceiling", "random_floor_cen_fve_mean"),
        ("replay, centred", "ceilings.replay.cen", "oracle_ceiling", "replay_cen_fve_mean"),
        ("paraphrase best-of-8, centred", "ceilings.paraphrase_best_of_8.cen", "oracle_ceiling",
         "paraphrase_bestof8_cen_fve_mean"),
        ("NN-in-pool, centred", "ceilings.nn_in_pool.cen", "oracle_ceiling", "nn_in_pool_cen_fve_mean"),
        ("centred gap (paraphrase − floor)", "ceilings.gap_cen", "oracle_ceiling", "gap_cen"),
        ("greedy, centred", "centred_eval.greedy.cen", "centered_eval", "adapter_cen_greedy_mean"),
        ("best-of-K, centred", "centred_eval.best_of_k.cen", "centered_eval", "adapter_cen_bestofK_mean"),
        ("K", "centred_eval.K", "centered_eval", "K"),
        ("NN-retrieval, centred", "centred_eval.nn_retrieval.cen", "centered_eval", "nn_retrieval_cen_mean"),
        ("slope per doubling", "k_curve.stated_slope_per_doubling_cen", "rerank_eval", "slope_per_doubling_cen"),
        ("Spearman(logp, oracle)", "rerank.spearman_logp_vs_oracle_cen.mean", "rerank_eval",
         "spearman_logp_vs_oracle_cen_mean"),
    )  # fmt: skip
    table: dict[str, dict[str, str]] = {}
    for name in BACKBONES:
        record = published(name)
        table[f"{TITLES[name]}, published"] = {
            label: f"{record['layer']} / {record['num_layers']}" if path is None
            else _plain(look_up(record, path)) for label, path, _, _ in rows
        }  # fmt: skip
    for run in runs:
        facts = run.data["targets"]
        table[f"{run.title}, paper protocol"] = {
            label: f"{facts['identity']['layer']} / {facts['num_layers']}" if file is None
            else _plain(run.column(file, "paper").get(key)) for label, _, file, key in rows
        }  # fmt: skip
    return pd.DataFrame(table)


def published_null_table() -> pd.DataFrame:
    """Published best-of-64 beside the best of 64 unrelated texts, interpolated from the paper's own rows."""
    rows = []
    for name in BACKBONES:
        k = published(name)["centred_eval"]["K"]
        null, rollouts = published_null(name, k)
        rows.append({"backbone": TITLES[name], "K": str(k), "best of K rollouts": number(rollouts),
                     "best of K unrelated texts": number(null), "difference": f"{rollouts - null:+.3f}"})  # fmt: skip
    return pd.DataFrame(rows).set_index("backbone")


def _plain(value) -> str:
    if isinstance(value, int):
        return str(value)
    return number(value, 1 if value is not None and abs(value) >= 2 else 3)


def markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(disable_numparse=True) + "\n"


def latex(table: pd.DataFrame, caption: str, label: str) -> str:
    """A booktabs table; needs ``\\usepackage{booktabs}``."""
    escaped = table.rename(columns=_tex, index=_tex).map(_tex)
    escaped.index.name = _tex(escaped.index.name or "")
    return escaped.to_latex(caption=_tex(caption), label=label, column_format="l" + "r" * len(table.columns))


TEX = {
    "&": r"\&", "%": r"\%", "_": r"\_", "<": "$<$", ">": "$>$", "‖": r"$\|$", "μ": r"$\mu$", "ρ": r"$\rho$",
    "−": "$-$", "–": "--", "·": r"$\cdot$", "²": "$^2$", "₂": "$_2$", "§": r"\S{}", "’": "'",
    "→": r"$\rightarrow$", "λ": r"$\lambda$", "…": r"\ldots{}", "±": r"$\pm$",
}  # fmt: skip


def _tex(text: object) -> str:
    return "".join(TEX.get(c, c) for c in str(text))
