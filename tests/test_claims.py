"""Verdicts: the logic, and that every claim finds its quantity."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_utils.paper import claims
from nla_utils.paper.claims import CLAIMS, FALLS, STANDS, UNDECIDED, judge, judge_published, verdict
from nla_utils.paper.published import BACKBONES, published_null
from nla_utils.paper.results import find_results
from nla_utils.scores.column import Column

ABOVE = next(c for c in CLAIMS if c.id == "greedy_beats_other_greedy")
WITHIN = next(c for c in CLAIMS if c.id == "spearman_is_zero")


@pytest.mark.parametrize("claim, low, high, expected", [
    (ABOVE, 0.01, 0.02, STANDS), (ABOVE, -0.02, -0.01, FALLS), (ABOVE, -0.01, 0.01, UNDECIDED),
    (WITHIN, -0.05, 0.05, STANDS), (WITHIN, 0.15, 0.2, FALLS), (WITHIN, 0.05, 0.15, UNDECIDED),
])  # fmt: skip
def test_verdicts(claim, low, high, expected):
    assert verdict(claim, low, high) == expected


@given(st.floats(-1, 1), st.floats(0, 1))
def test_a_wider_interval_never_decides_more(middle, half):
    for claim in CLAIMS:
        if verdict(claim, middle - half, middle + half) != UNDECIDED:
            assert verdict(claim, middle, middle) == verdict(claim, middle - half, middle + half)


def test_a_planted_effect_is_found_and_none_is_not():
    rng = np.random.default_rng(0)
    found = {}
    for name, effect in (("planted", 0.03), ("none", 0.0)):
        column = Column("corrected", 100)
        column.add(ABOVE.row.cen, rng.normal(effect, 0.05, size=100))
        found[name] = judge(ABOVE, column.to_json())[1]
    assert found == {"planted": STANDS, "none": UNDECIDED}


def test_false_alarms_are_as_rare_as_the_interval_says():
    rng = np.random.default_rng(1)
    alarms = 0
    for _ in range(400):
        values = rng.normal(0, 0.05, size=60)
        low, high = np.percentile(claims.metrics.bootstrap_means(values, resamples=1000), [2.5, 97.5])
        alarms += verdict(ABOVE, low, high) == STANDS
    assert alarms <= 24


def test_every_claim_finds_its_quantity_in_every_committed_run():
    for run in find_results():
        for claim in CLAIMS:
            # What training on a target is worth is asked once, under one encoding.
            both = claim.id != "held_out_equals_in_sample"
            for protocol in ("paper", "corrected") if both else ("corrected",):
                assert claim.row.cen in run.column(claim.row.file, protocol), (run.title, claim.id)


def test_published_numbers_are_judged_where_they_suffice():
    stated = {c.id: judge_published(c, "gemma2_2b") for c in CLAIMS}
    assert stated["best_of_k_beats_paraphrase"] == ("+0.033", STANDS)
    assert stated["best_of_8_beats_paraphrase"] == ("-0.026", FALLS)
    assert stated["greedy_beats_other_greedy"][1] == claims.UNMEASURED
    for name in BACKBONES:
        for claim in CLAIMS:
            judge_published(claim, name)


def test_the_papers_own_null_line_passes_through_its_two_points():
    assert published_null("gemma2_2b", 199)[0] == pytest.approx(0.6533, abs=1e-3)
    assert published_null("gemma2_2b", 2000)[0] == pytest.approx(0.7118, abs=1e-3)
