"""The paper's claims as data, the test that each must pass, and the verdicts on published numbers and runs.

A verdict follows from an interval: *stands* where all of it passes, *falls* where all of it fails, *not decided
at this n* otherwise. Published numbers come without per-target data, so they are judged by their value alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import pandas as pd

from nla_utils import metrics
from nla_utils.published import TITLES, k_curve, look_up, published
from nla_utils.results import RunResults

STANDS, FALLS, UNDECIDED, UNMEASURED = "stands", "falls", "not decided at this n", "–"


@dataclass(frozen=True)
class Claim:
    """One claim. ``low`` and ``high`` bound the values of the quantity for which it is true.

    ``asked_by`` is ``paper`` for what §11 says, ``control`` for what it should have tested. ``key`` is the
    quantity's key in the results file ``file``; ``stated`` computes it from a published record, or is
    ``None`` where the paper prints too little.
    """

    id: str
    asked_by: str
    sentence: str
    quantity: str
    file: str
    key: str
    low: float = -math.inf
    high: float = math.inf
    stated: Optional[Callable[[str], float]] = None

    @property
    def test(self) -> str:
        """The condition, for the reader."""
        if self.low == -math.inf:
            return f"< {self.high:g}"
        return f"> {self.low:g}" if self.high == math.inf else f"between {self.low:g} and {self.high:g}"


def _difference(a: str, b: str) -> Callable[[str], float]:
    return lambda name: look_up(published(name), a) - look_up(published(name), b)


def _value(path: str) -> Callable[[str], float]:
    return lambda name: look_up(published(name), path)


def _r_squared(name: str) -> float:
    curve = k_curve(name)
    return metrics.slope_per_doubling(list(curve), list(curve.values()))[2]


def _best_of_8_gap(name: str) -> float:
    return k_curve(name)[8] - look_up(published(name), "ceilings.paraphrase_best_of_8.cen")


CLAIMS: tuple[Claim, ...] = (
    Claim("best_of_k_beats_paraphrase", "paper", "The best of K rollouts exceeds the paraphrase ceiling.",
          "best-of-K − paraphrase best-of-8", "centered_eval", "adapter_cen_bestofK_minus_paraphrase_bestof8", low=0,
          stated=_difference("centred_eval.best_of_k.cen", "ceilings.paraphrase_best_of_8.cen")),
    Claim("raw_greedy_below_floor", "paper", "Raw, greedy text lies below the random floor.",
          "raw greedy − raw floor", "centered_eval", "adapter_raw_greedy_minus_random_floor", high=0,
          stated=_difference("centred_eval.greedy.raw", "ceilings.random_floor.raw")),
    Claim("centred_floor_is_half", "paper", "Centred, the random floor is one half whatever ‖μ‖.",
          "centred floor", "oracle_ceiling", "random_floor_cen_fve_mean", low=0.49, high=0.51,
          stated=_value("ceilings.random_floor.cen")),
    Claim("k_curve_log_linear", "paper", "The K-curve is a straight line against log K.",
          "R² of the mean curve", "rerank_eval", "slope_per_doubling_cen_r2", low=0.98, stated=_r_squared),
    Claim("logp_rerank_is_greedy", "paper", "Choosing by log-probability is no better than greedy.",
          "logp-rerank − greedy", "rerank_eval", "logp_rerank_cen_mean_minus_adapter_cen_greedy_mean", high=0.02,
          stated=_value("rerank.logp.vs_greedy_cen")),
    Claim("spearman_is_zero", "paper", "Log-probability does not rank rollouts by their score.",
          "Spearman, mean", "rerank_eval", "spearman_logp_vs_oracle_cen_mean", low=-0.1, high=0.1,
          stated=_value("rerank.spearman_logp_vs_oracle_cen.mean")),
    Claim("nn_anchor_beats_greedy", "paper", "The NN-anchor rerank is well above greedy.",
          "NN-anchor rerank − greedy", "rerank_eval", "nn_anchor_rerank_cen_mean_minus_adapter_cen_greedy_mean", low=0,
          stated=_difference("rerank.nn_anchor.cen", "k_curve.greedy.cen")),
    Claim("retrieval_beats_greedy", "paper", "Looking up the nearest stored text beats greedy.",
          "greedy − NN-retrieval", "centered_eval", "adapter_cen_greedy_mean_minus_nn_retrieval_cen_mean", high=0,
          stated=_difference("centred_eval.greedy.cen", "centred_eval.nn_retrieval.cen")),
    Claim("greedy_beats_other_greedy", "control", "Greedy text fits its own target better than other targets.",
          "greedy − greedy of others", "centered_eval",
          "adapter_cen_greedy_mean_minus_shuffled_v_cen_greedy_mean", low=0),
    Claim("best_of_k_beats_unrelated", "control", "The best of K rollouts beats the best of K unrelated texts.",
          "best-of-K − unrelated best-of-K", "centered_eval",
          "adapter_cen_bestofK_mean_minus_unrelated_text_cen_bestofK_mean", low=0),
    Claim("best_of_k_beats_others", "control", "The best of K rollouts beats the best of K of other targets' rollouts.",
          "best-of-K − others' best-of-K", "centered_eval",
          "adapter_cen_bestofK_mean_minus_shuffled_v_cen_bestofK_mean", low=0),
    Claim("best_of_8_beats_paraphrase", "control", "At equal K, rollouts beat paraphrases.",
          "best-of-8 − paraphrase best-of-8", "centered_eval", "adapter_cen_bestof8_minus_paraphrase_bestof8", low=0,
          stated=_best_of_8_gap),
    Claim("slope_beats_null", "control", "The K-curve is steeper than that of unrelated texts.",
          "slope − slope of unrelated texts", "rerank_eval", "slope_per_doubling_cen_minus_unrelated_text", low=0),
    Claim("text_identifies_v", "control", "Greedy text ranks its own activation among M better than chance.",
          "mean reciprocal rank − chance", "centered_eval", "greedy_identification_mrr_minus_chance", low=0),
)  # fmt: skip


def verdict(claim: Claim, low: float, high: float) -> str:
    """Verdict on an interval [low, high] of the claim's quantity."""
    if claim.low < low and high < claim.high:
        return STANDS
    return FALLS if high <= claim.low or low >= claim.high else UNDECIDED


def judge(claim: Claim, column: dict) -> tuple[str, str]:
    """(value with interval, verdict) in one protocol's column; a quantity without interval is judged by value."""
    value = column.get(claim.key)
    if value is None:
        return UNMEASURED, UNMEASURED
    if claim.key not in column["ci95"]:
        return f"{value:.3f}", verdict(claim, value, value)
    low, high = column["ci95"][claim.key]
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]", verdict(claim, low, high)


def judge_published(claim: Claim, name: str) -> tuple[str, str]:
    """(value, verdict) of a published backbone, by its value alone."""
    if claim.stated is None:
        return UNMEASURED, UNMEASURED
    value = claim.stated(name)
    return f"{value:+.3f}", verdict(claim, value, value)


def scorecard(run: RunResults, reference: str) -> pd.DataFrame:
    """Every claim: the published value, ours under both protocols, and the verdicts."""
    rows = []
    for claim in CLAIMS:
        row = {"claim": claim.sentence, "quantity": f"{claim.quantity}: {claim.test}"}
        value, word = judge_published(claim, reference)
        row[f"published, {TITLES[reference]}"] = value if word == UNMEASURED else f"{value} {word}"
        for protocol, label in (("paper", "paper protocol"), ("corrected", "corrected")):
            row[label] = " ".join(dict.fromkeys(judge(claim, run.column(claim.file, protocol))))
        rows.append(row)
    return pd.DataFrame(rows).set_index("claim")


def gap_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """The claim that the centred gap (paraphrase − floor) is a property of the backbone: one row a run."""
    return pd.DataFrame(
        [
            {"run": r.title, **{
                p: "{:.3f} [{:.3f}, {:.3f}]".format(c["gap_cen"], *c["ci95"]["gap_cen"])
                for p, c in ((p, r.column("oracle_ceiling", p)) for p in ("paper", "corrected"))
            }}
            for r in runs
        ],
        columns=["run", "paper", "corrected"],
    ).set_index("run")  # fmt: skip
