"""Metrics against closed forms, brute force, and their properties."""

import itertools

import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import spearmanr

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
