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
from nla_utils.paper.published import SECTION_11, TITLES, k_curve, look_up, published
from nla_utils.paper.results import RunResults
from nla_utils.paper.tables import signed, with_interval
from nla_utils.scores import rows
from nla_utils.scores.rows import Row

STANDS, FALLS, UNDECIDED, UNMEASURED = "stands", "falls", "not decided at this n", "–"


@dataclass(frozen=True)
class Claim:
    """One claim. ``low`` and ``high`` bound the values of the quantity for which it is true.

    ``where`` is the part of §11 that makes it, or ``control`` for what it should have tested. ``row`` is where the
    quantity stands in the results; ``stated`` computes it from a published record, or is ``None`` where the paper
    prints too little. ``if_true`` and ``if_false`` say what a pass and a fail mean.
    """

    id: str
    where: str
    sentence: str
    quantity: str
    row: Row
    if_true: str
    if_false: str
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


R_SQUARED = Row("R² of the mean curve", rows.SLOPE.cen + "_r2", file=rows.RERANK_FILE)
CLAIMS: tuple[Claim, ...] = (
    Claim("best_of_k_beats_paraphrase", "§11, ceilings", "The best of K rollouts exceeds the paraphrase ceiling.",
          "best-of-K − paraphrase best-of-8", rows.BEST_MINUS_PARAPHRASE,
          "the best text found comes closer than the model's own paraphrases; at unequal K that is no merit of the AV",
          "K rollouts do not reach eight paraphrases", low=0,
          stated=_difference("centred_eval.best_of_k.cen", "ceilings.paraphrase_best_of_8.cen")),
    Claim("raw_greedy_below_floor", "§11, centring", "Raw, greedy text lies below the random floor.",
          "raw greedy − raw floor", rows.RAW_GREEDY_MINUS_FLOOR,
          "raw scores reward the shared offset of re-encoded text, so they cannot rank verbalizers",
          "on this backbone raw scores are not upside down", high=0,
          stated=_difference("centred_eval.greedy.raw", "ceilings.random_floor.raw")),
    Claim("centred_floor_is_half", "§11, centring", "Centred, the random floor is one half whatever ‖μ‖.",
          "centred floor", rows.FLOOR,
          "centred scores of unrelated pairs mean the same on every backbone",
          "the floor has to be measured for each set of targets", low=0.49, high=0.51,
          stated=_value("ceilings.random_floor.cen")),
    Claim("k_curve_log_linear", "§11, K-curve", "The K-curve is a straight line against log K.",
          "R² of the mean curve", R_SQUARED,
          "each doubling of K buys the same; so it does for texts that never saw v, see the control of the slope",
          "the curve bends within the K measured", low=0.98, stated=_r_squared),
    Claim("logp_rerank_is_greedy", "§11, reranks", "Choosing by log-probability is no better than greedy.",
          "logp-rerank − greedy", rows.LOGP_MINUS_GREEDY,
          "the AV's confidence does not find its good rollouts", "confidence is of use as a rerank", high=0.02,
          stated=_value("rerank.logp.vs_greedy_cen")),
    Claim("spearman_is_zero", "§11, reranks", "Log-probability does not rank rollouts by their score.",
          "Spearman, mean", rows.SPEARMAN,
          "likely text is not closer text", "likely text is closer (or farther), if not by much", low=-0.1, high=0.1,
          stated=_value("rerank.spearman_logp_vs_oracle_cen.mean")),
    Claim("nn_anchor_beats_greedy", "§11, reranks", "The NN-anchor rerank is well above greedy.",
          "NN-anchor rerank − greedy", rows.ANCHOR_MINUS_GREEDY,
          "a neighbour of v finds better rollouts; it is a look at v by another name",
          "a neighbour of v does not help to choose", low=0,
          stated=_difference("rerank.nn_anchor.cen", "k_curve.greedy.cen")),
    Claim("retrieval_beats_greedy", "§11, open problem", "Looking up the nearest stored text beats greedy.",
          "greedy − NN-retrieval", rows.GREEDY_MINUS_RETRIEVAL,
          "the AV says less about v than a stored text does: the open problem",
          "the AV's greedy text is closer than anything stored", high=0,
          stated=_difference("centred_eval.greedy.cen", "centred_eval.nn_retrieval.cen")),
    Claim("greedy_beats_other_greedy", "control", "Greedy text fits its own target better than other targets.",
          "greedy − greedy of others", rows.GREEDY_MINUS_OTHERS,
          "greedy text depends on v", "greedy text is one text for everybody, as far as the score can tell", low=0),
    Claim("greedy_beats_probe", "control", "Greedy text beats a linear probe's guess of the last tokens.",
          "greedy − probe decode", rows.GREEDY_MINUS_PROBE,
          "the AV adds to what ridge regression reads", "ridge regression reads more of v than the AV writes", low=0),
    Claim("best_of_k_beats_unrelated", "control", "The best of K rollouts beats the best of K unrelated texts.",
          "best-of-K − unrelated best-of-K", rows.BEST_MINUS_UNRELATED,
          "rollouts are worth more than as many texts drawn blindly", "best-of-K is what selection alone gives", low=0),
    Claim("best_of_k_beats_others", "control", "The best of K rollouts beats the best of K of other targets' rollouts.",
          "best-of-K − others' best-of-K", rows.BEST_MINUS_OTHERS,
          "the rollouts depend on v", "rollouts made for another target do as well", low=0),
    Claim("best_of_8_beats_paraphrase", "control", "At equal K, rollouts beat paraphrases.",
          "best-of-8 − paraphrase best-of-8", rows.BEST_8_MINUS_PARAPHRASE,
          "the AV beats the model's own paraphrases", "the excess over the ceiling came from K alone", low=0,
          stated=_best_of_8_gap),
    Claim("slope_beats_null", "control", "The K-curve is steeper than that of unrelated texts.",
          "slope − slope of unrelated texts", rows.SLOPE_MINUS_UNRELATED,
          "more rollouts pay more than more unrelated texts", "the slope is that of choosing among texts", low=0),
    Claim("held_out_equals_in_sample", "control", "Targets that were trained on fare no better than held-out ones.",
          "in-sample − held-out margin of greedy over others' greedy", rows.IN_SAMPLE_GREEDY,
          "evaluating on training targets did not inflate these rows", "the rows are inflated by training targets",
          low=-0.02, high=0.02),
    Claim("text_identifies_v", "control", "Greedy text ranks its own activation among M better than chance.",
          "mean reciprocal rank − chance", rows.RANK_MINUS_CHANCE,
          "the text carries information about which v it came from", "the text does not tell the targets apart", low=0),
)  # fmt: skip


def verdict(claim: Claim, low: float, high: float) -> str:
    """Verdict on an interval [low, high] of the claim's quantity."""
    if claim.low < low and high < claim.high:
        return STANDS
    return FALLS if high <= claim.low or low >= claim.high else UNDECIDED


def judge(claim: Claim, column: dict) -> tuple[str, str]:
    """(value with interval, verdict) in one protocol's column; a quantity without interval is judged by value."""
    key = claim.row.cen
    value = column.get(key)
    if value is None:
        return UNMEASURED, UNMEASURED
    if key not in column["ci95"]:
        return f"{value:.3f}", verdict(claim, value, value)
    low, high = column["ci95"][key]
    return signed(column, key), verdict(claim, low, high)


def judge_published(claim: Claim, name: str) -> tuple[str, str]:
    """(value, verdict) of a published backbone, by its value alone."""
    if claim.stated is None:
        return UNMEASURED, UNMEASURED
    value = claim.stated(name)
    return f"{value:+.3f}", verdict(claim, value, value)


def verdicts(results: RunResults) -> dict[str, str]:
    """Verdict on each of §11's own claims by its id, under the corrected protocol."""
    own = [c for c in CLAIMS if c.where != "control"]
    return {c.id: judge(c, results.column(c.row.file, "corrected"))[1] for c in own}


def scorecard(results: RunResults) -> pd.DataFrame:
    """Every claim: the published value, ours under both protocols, and the verdicts."""
    table = []
    for claim in CLAIMS:
        row = {"claim": claim.sentence, "where": claim.where, "quantity": f"{claim.quantity}: {claim.test}"}
        value, word = judge_published(claim, SECTION_11)
        row[f"published, {TITLES[SECTION_11]}"] = value if word == UNMEASURED else f"{value} {word}"
        for protocol, label in (("paper", "paper protocol"), ("corrected", "corrected")):
            row[label] = " ".join(dict.fromkeys(judge(claim, results.column(claim.row.file, protocol))))
        table.append(row)
    return pd.DataFrame(table).set_index("claim")


def claims_table() -> pd.DataFrame:
    """The claims as data: where each stands, its test, and what a pass and a fail mean."""
    table = [
        {"claim": c.sentence, "where": c.where, "test": f"{c.quantity} {c.test}", "a pass means": c.if_true,
         "a fail means": c.if_false} for c in CLAIMS
    ]  # fmt: skip
    return pd.DataFrame(table).set_index("claim")


def gap_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The claim that the centred gap (paraphrase − floor) is a property of the backbone: one row a run."""
    protocols = ("paper", "corrected")
    table = [
        (r.title, *(with_interval(r.column("oracle_ceiling", p), rows.GAP.cen) for p in protocols)) for r in everything
    ]
    return pd.DataFrame(table, columns=["run", *protocols]).set_index("run")
