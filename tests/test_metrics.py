"""Metrics against closed forms, brute force, and their properties."""

import itertools
import math

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import kstest, spearmanr, ttest_1samp

from nla_utils import metrics

finite = st.floats(-100, 100, allow_nan=False, width=32)
vectors = hnp.arrays(np.float64, (3, 5), elements=finite)
scores = hnp.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 8)), elements=st.floats(0, 1))


def test_fve_of_same_opposite_and_orthogonal_vectors():
    v = np.array([3.0, 4.0])
    assert metrics.fve(v, v) == pytest.approx(1)
    assert metrics.fve(-v, v) == pytest.approx(0)
    assert metrics.fve(np.array([-4.0, 3.0]), v) == pytest.approx(0.5)


def test_fve_centred_moves_the_origin():
    mu = np.array([10.0, 10.0])
    a, b = mu + [1, 0], mu + [-1, 0]
    assert metrics.fve(a, b) > 0.99
    assert metrics.fve(a, b, mu) == pytest.approx(0)


def test_constant_mu_centred_has_no_direction():
    mu = np.array([1.0, 2.0])
    assert metrics.fve(mu, np.array([5.0, 5.0]), mu) == pytest.approx(0.5)


@given(vectors, vectors, finite.filter(lambda x: abs(x) > 1e-3))
def test_fve_is_bounded_and_ignores_scale(h, v, scale):
    base = metrics.fve(h, v)
    assert ((base >= 0) & (base <= 1)).all()
    np.testing.assert_allclose(metrics.fve(abs(scale) * h, v), base, atol=1e-9)


@given(vectors, vectors)
def test_fve_matrix_agrees_with_loops(a, b):
    mu = a.mean(axis=0)
    ours = metrics.fve_matrix(a, b, mu)
    for i in range(len(a)):
        for j in range(len(b)):
            assert ours[i, j] == pytest.approx(naive.fve(a[i], b[j], mu), abs=1e-9)


@settings(max_examples=40)
@given(scores)
def test_exact_k_curve_is_the_mean_over_subsets(s):
    ks = list(range(1, s.shape[1] + 1))
    ours = metrics.exact_k_curve(s, ks)
    for m, row in enumerate(s):
        for j, k in enumerate(ks):
            assert ours[m, j] == pytest.approx(naive.expected_max(row, k), abs=1e-9)


@given(scores, st.randoms())
def test_exact_k_curve_is_monotone_and_ignores_order(s, random):
    ks = list(range(1, s.shape[1] + 1))
    curve = metrics.exact_k_curve(s, ks)
    assert (np.diff(curve, axis=1) >= -1e-9).all()
    order = list(range(s.shape[1]))
    random.shuffle(order)
    np.testing.assert_allclose(metrics.exact_k_curve(s[:, order], ks), curve, atol=1e-12)


def test_exact_k_curve_of_a_large_pool_stays_finite():
    s = np.random.default_rng(0).random((3, 2000))
    curve = metrics.exact_k_curve(s, [1, 64, 2000])
    np.testing.assert_allclose(curve[:, 0], s.mean(axis=1))
    np.testing.assert_allclose(curve[:, 2], s.max(axis=1))


@given(scores)
def test_first_k_curve_ends_at_the_maximum(s):
    ks = metrics.k_values(s.shape[1])
    np.testing.assert_array_equal(metrics.first_k_curve(s, ks)[:, -1], s.max(axis=1))


def test_scores_against_every_other_one_against_loops():
    v = np.random.default_rng(1).normal(size=(7, 4))
    for i in range(7):
        others = [naive.fve(v[i], v[j]) for j in range(7) if j != i]
        assert metrics.off_diagonal(metrics.fve_matrix(v, v))[i].tolist() == pytest.approx(others)


def test_own_mean_pushes_the_floor_below_one_half():
    """Slip self_mu: with μ the mean of the very targets compared, pairs lean apart by 1/(M−1)."""
    v = np.random.default_rng(2).normal(size=(8, 500))
    for mu, expected in ((v.mean(axis=0), 0.5 - 0.5 / 7), (np.zeros(500), 0.5)):
        assert metrics.off_diagonal(metrics.fve_matrix(v, v, mu)).mean() == pytest.approx(expected, abs=0.01)


def test_the_chance_of_a_rank_is_that_of_counting_all_orders():
    stored, k = 5, 2
    # The places of the k texts among all, best first: so many stored texts are ahead of the better one.
    ahead = [min(places) for places in itertools.combinations(range(stored + k), k)]
    for closer in range(stored + 1):
        assert metrics.chance_of_rank(closer, stored, k) == pytest.approx(np.mean([a <= closer for a in ahead]))
    assert metrics.chance_of_rank(0, 512, 64) == pytest.approx(64 / (512 + 64))


def test_slope_of_a_straight_line():
    slope, intercept, r2 = metrics.slope_per_doubling([1, 2, 4, 8], np.array([0.5, 0.52, 0.54, 0.56]))
    assert (slope, intercept, r2) == (pytest.approx(0.02), pytest.approx(0.5), pytest.approx(1))


@settings(max_examples=30)
@given(hnp.arrays(np.float64, (3, 6), elements=st.integers(0, 4)), hnp.arrays(np.float64, (3, 6), elements=finite))
def test_spearman_agrees_with_scipy(a, b):
    ours = metrics.spearman_rows(a, b)
    for i in range(3):
        if np.ptp(a[i]) and np.ptp(b[i]):
            assert ours[i] == pytest.approx(spearmanr(a[i], b[i]).statistic, abs=1e-9)
        else:
            assert np.isnan(ours[i])


def test_bootstrap_is_paired_and_repeats():
    a = np.random.default_rng(3).normal(size=40)
    b = a + 1
    np.testing.assert_allclose(metrics.bootstrap_means(b) - metrics.bootstrap_means(a), 1)
    assert metrics.ci95(a) == metrics.ci95(a)


def test_bootstrap_coverage():
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(1000):
        values = rng.beta(8, 6, size=150)
        low, high = np.percentile(metrics.bootstrap_means(values, resamples=1000), [2.5, 97.5])
        hits += low <= 8 / 14 <= high
    assert 930 <= hits <= 970


def test_identification_of_itself_and_of_noise():
    rng = np.random.default_rng(5)
    v = rng.normal(size=(50, 20))
    assert (metrics.rank_of_own(v, v) == 1).all()
    assert (metrics.rank_of_own(rng.normal(size=(50, 20)), v) == 1).mean() < 0.2
    assert not (metrics.rank_of_own(v, np.tile(v[:1], (50, 1))) == 1).any()


def test_rho_at_floor_and_ceiling():
    assert metrics.rho(0.4976, 0.4976, 0.5978) == 0
    assert metrics.rho(0.5978, 0.4976, 0.5978) == pytest.approx(1)


# Bits at K, pool P. Scores of unrelated texts are exponential: the best of k of them has the mean 1 + 1/2 + … + 1/k.


def planted(rng, m, k, pool, targets=3_000):
    """The best of k − 1 unrelated texts and one that is worth m of them, the null's curve without and with blocks left
    out, and how many of the pool are at least as good."""
    null_MP = rng.exponential(size=(targets, pool))
    best_M = rng.exponential(size=(targets, k - 1 + m)).max(axis=1)
    ks = sorted({*metrics.k_values(pool), k})
    left_out = metrics.curves_without_blocks(null_MP, ks, 10).reshape(targets, 10, -1)
    return (best_M, metrics.exact_k_curve(null_MP, ks), left_out, ks, k), (null_MP >= best_M[:, None]).sum(axis=1)


@pytest.mark.parametrize("k", [1, 8, 16])
@pytest.mark.parametrize("m", [1, 4, 32])
def test_a_draw_worth_m_texts_gives_its_bits_by_both_definitions(k, m):
    values, rank_M = planted(np.random.default_rng(100 * k + m), m, k, pool=600)
    expected = math.log2((k - 1 + m) / k)
    ranked = metrics.bits_by_rank((metrics.surprise_of_rank(rank_M, 600), 600, k))
    for found, (low, high) in (metrics.bits_of_means(values), ranked):
        assert found == pytest.approx(expected, abs=0.1)
        assert low <= found <= high and low - 0.05 <= expected <= high + 0.05


def test_half_the_targets_planted_gives_what_each_definition_predicts():
    k, m, pool, rng = 8, 57, 600, np.random.default_rng(5)
    informed, idle = planted(rng, m, k, pool), planted(rng, 1, k, pool)
    score, null, left_out, ks, _ = (
        np.concatenate([a, b]) if isinstance(a, np.ndarray) else a for a, b in zip(informed[0], idle[0])
    )
    harmonic = np.cumsum(1 / np.arange(1, pool + 1))
    worth = np.interp((harmonic[k - 1] + harmonic[k - 2 + m]) / 2, harmonic, np.log2(np.arange(1, pool + 1)))
    assert metrics.bits_of_means((score, null, left_out, ks, k))[0] == pytest.approx(worth - 3, abs=0.1)
    surprise = metrics.surprise_of_rank(np.concatenate([informed[1], idle[1]]), pool)
    log2_x, expected = metrics.expected_surprise(pool)
    both = np.interp(np.log2([k, k - 1 + m]), log2_x, expected).mean()
    worth = np.interp(both, expected, log2_x)
    assert metrics.bits_by_rank((surprise, pool, k))[0] == pytest.approx(worth - 3, abs=0.1)


def test_beyond_the_pool_bits_are_its_limit():
    ks, null = [1, 2, 4, 8], np.array([0.0, 1.0, 1.5, 1.75])
    assert metrics.bits(9.0, ks, null, 2) == metrics.limits_of_bits(2, 8)[1] == 2
    assert metrics.bits(-9.0, ks, null, 2) == metrics.limits_of_bits(2, 8)[0] == -1
    # Where blocks are left out the curve ends earlier.
    assert metrics.bits(9.0, ks, np.array([0.0, 1.0, 1.5, np.nan]), 2) == 1


def test_the_curve_of_a_pool_is_unbiased_up_to_all_of_it():
    pool, log2_k = 64, np.log2(np.arange(1, 65))
    harmonic = np.cumsum(1 / np.arange(1, pool + 1))
    # What the i-th smallest of the pool's scores is on average; the curve is linear in them.
    ordered = (harmonic[-1] - np.append(harmonic[:-1][::-1], 0))[None]
    curve = metrics.exact_k_curve(ordered, range(1, pool + 1))[0]
    assert np.abs(np.interp(curve, harmonic, log2_k) - log2_k).max() < 0.001


@given(st.integers(2, 9), st.data())
def test_the_law_of_ranks_is_that_of_counting_all_orders(pool, data):
    """Of pool + x texts in random order: how many of the pool's come before the best of the x."""
    x = data.draw(st.integers(1, min(pool, 6)))
    log2_x, expected = metrics.expected_surprise(pool)
    orders = itertools.combinations(range(pool + x), x)
    mean = np.mean([metrics.surprise_of_rank(min(chosen), pool) for chosen in orders])
    assert np.interp(math.log2(x), log2_x, expected) == pytest.approx(mean, abs=2e-3)


def test_ranks_do_not_change_with_a_monotone_change_of_the_score():
    rng = np.random.default_rng(3)
    null, best = rng.normal(size=(40, 100)), rng.normal(size=40) + 1
    ranks = [(f(null) >= f(best)[:, None]).sum(axis=1) for f in (lambda x: x, np.exp, lambda x: x**3)]
    found = [metrics.bits_by_rank((metrics.surprise_of_rank(r, 100), 100, 1)) for r in ranks]
    assert found[0] == found[1] == found[2]


def test_bits_of_nothing_are_not_known():
    unknown = np.full(3, np.nan)
    assert math.isnan(metrics.bits_by_rank((unknown, 10, 1))[0])
    assert math.isnan(metrics.bits_of_means((unknown, np.ones((3, 2)), np.ones((3, 10, 2)), [1, 2], 1))[0])


# Log-probability


def test_shuffled_orders_are_those_of_chance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 12)), rng.normal(size=(5, 12))
    null = metrics.permuted_spearman(a, b, n=4_000)
    assert null.std() == pytest.approx(1 / math.sqrt(11), rel=0.02) and abs(null.mean()) < 0.01
    p = metrics.p_of_null(null[:200, 0], null[200:, 0])
    assert 0.01 < kstest(p, "uniform").pvalue
    assert metrics.p_of_null(9.0, null[:, 0]) == pytest.approx(1 / 4_001)


def test_between_targets_is_the_planted_variance():
    rng = np.random.default_rng(1)
    k, m = 64, 4_000
    effect = rng.choice([-0.5, 0.5], size=m)
    logp = rng.normal(size=(m, k))
    score = effect[:, None] * logp + math.sqrt(0.75) * rng.normal(size=(m, k))
    assert metrics.between_targets(metrics.spearman_rows(logp, score), k) == pytest.approx(0.23, abs=0.02)
    alone = metrics.spearman_rows(logp, rng.normal(size=(m, k)))
    assert metrics.between_targets(alone, k) == pytest.approx(0, abs=0.002)


def test_signs_are_learned_from_the_other_targets():
    x, rho = np.array([1.0, -2.0, 3.0, 4.0]), np.array([0.5, -0.5, 0.5, -0.9])
    # The last target alone is of the other opinion, which does not count for itself.
    assert metrics.signs_of_others(x, rho).tolist() == [1, -1, 1, 1]
    assert metrics.signs_of_others(np.ones(2), np.array([1.0, -1.0])).tolist() == [-1, 1]
    assert metrics.signs_of_others(np.ones(3), np.array([0.1, 0.2, -0.2])).tolist() == [1, -1, 1]


def test_the_interval_of_trainings_is_students():
    found = metrics.t_interval([0.1, 0.2, 0.3])
    assert found == pytest.approx(ttest_1samp([0.1, 0.2, 0.3], 0).confidence_interval(), rel=1e-9)


@given(hnp.arrays(np.float64, (4, 6), elements=st.floats(-1, 1)), st.integers(1, 6))
def test_bits_of_many_curves_are_those_of_each_by_interpolation(x, known):
    """Curves that end early included; numpy's interpolation is the reference."""
    ks, null_RJ, score_R = [1, 2, 4, 8, 16, 50], np.sort(x, axis=1), x[:, 0] * 1.5
    null_RJ[::2, known:] = np.nan
    found = metrics.bits(score_R, ks, null_RJ, 4)
    for bits, score, null_J in zip(found, score_R, null_RJ):
        given_J = np.isfinite(null_J)
        expected = np.interp(score, null_J[given_J], np.log2(ks)[given_J]) - 2
        assert bits == pytest.approx(expected, abs=1e-9) and metrics.bits(score, ks, null_J, 4) == bits


@pytest.mark.filterwarnings("error")
def test_the_mean_of_nothing_known_is_nan_without_a_warning():
    assert math.isnan(metrics.mean(np.full(3, np.nan))[0]) and metrics.mean(np.array([1.0, np.nan]))[0] == 1.0
