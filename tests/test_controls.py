"""On data where v and text are independent each control returns the null: p-values over simulations are uniform."""

import numpy as np
import pytest
from scipy.stats import kstest, ttest_1samp

from nla_utils import metrics
from nla_utils.evidence import Scorer
from nla_utils.metrics import fve

M, K, D, POOL, SIMULATIONS = 40, 4, 24, 800, 400


def draw(rng, effect=0.0):
    """v (M, D), rollouts (M, 1 + K, D) and a pool of texts; ``effect`` mixes v into its own rollouts."""
    v = rng.normal(size=(M, D))
    h = rng.normal(size=(M, 1 + K, D)) + effect * v[:, None]
    return v, h, rng.normal(size=(POOL, D))


def against_others(v, h, pool):
    greedy, best = Scorer(v, pool).others(h)
    score = fve(h, v[:, None])
    return score[:, 0] - greedy, score[:, 1:].max(axis=1) - best


def against_unrelated(v, h, pool):
    null = metrics.exact_k_curve(Scorer(v, pool).against(pool), [1, K])
    score = fve(h, v[:, None])
    return score[:, 0] - null[:, 0], score[:, 1:].max(axis=1) - null[:, 1]


def identification(v, h, pool):
    reciprocal = 1 / metrics.rank_of_own(h[:, 0], v)
    return reciprocal - (1 / np.arange(1, M + 1)).mean(), reciprocal - (1 / np.arange(1, M + 1)).mean()


CONTROLS = [against_others, against_unrelated]


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("row", [0, 1], ids=["greedy", "bestofK"])
def test_p_values_are_uniform_where_text_does_not_depend_on_v(control, row):
    rng = np.random.default_rng(11)
    p_values = [ttest_1samp(control(*draw(rng))[row], 0).pvalue for _ in range(SIMULATIONS)]
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_identification_is_at_chance_where_text_does_not_depend_on_v():
    rng = np.random.default_rng(12)
    gaps = [identification(*draw(rng))[0].mean() for _ in range(SIMULATIONS)]
    assert ttest_1samp(gaps, 0).pvalue > 0.01


@pytest.mark.parametrize("control", [*CONTROLS, identification])
def test_a_planted_effect_is_found(control):
    rng = np.random.default_rng(13)
    for difference in control(*draw(rng, effect=0.4)):
        assert metrics.ci95(difference)[0] > 0
