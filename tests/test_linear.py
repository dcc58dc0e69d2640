"""Streaming least squares and what the tail reader is solved from."""

import functools

import numpy as np
import pytest
import torch

from nla_extensions.tail_reader.reader import ReaderSums, sliding_gram, whitening


def test_streamed_least_squares_equals_the_whole_at_once():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 6)) + 0.3, rng.normal(size=(400, 3)) - 0.2
    y = y + x @ rng.normal(size=(6, 3))
    equations = ReaderSums(1, torch.zeros(3), torch.zeros(6), vocabulary=1)
    for part in np.array_split(np.arange(400), 7):
        equations.add(torch.from_numpy(x[part]).float(), torch.from_numpy(y[part]).float())
    b, intercept = equations.solve(0.0)
    expected = np.linalg.lstsq(np.c_[x, np.ones(400)], y, rcond=None)[0]
    np.testing.assert_allclose(b, expected[:-1], atol=1e-4)
    np.testing.assert_allclose(intercept, expected[-1], atol=1e-4)
    residual = y - np.c_[x, np.ones(400)] @ expected
    np.testing.assert_allclose(equations.residual_covariance(b, 0.0), residual.T @ residual / 400, atol=1e-4)


def test_whitening_gives_unit_covariance():
    a = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    covariance = a @ a.T + torch.eye(5, dtype=torch.float64)
    w = whitening(covariance).double()
    torch.testing.assert_close(w @ covariance @ w.T, torch.eye(5, dtype=torch.float64), atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 5])
def test_the_sliding_gram_is_the_gram(window):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    before, lengths = draw(3), (1, 2, 7, 4)
    rows, ends = [], []
    for length in lengths:
        sequence = torch.cat([before.expand(window, -1), draw(length, 3)])
        rows += [sequence[t + 1 : t + 1 + window].flip(0).flatten() for t in range(length)]
        ends.append(len(rows) - 1)
    x = torch.stack(rows)
    found = sliding_gram(x[:, :3].T @ x, x[ends].T @ x[ends], len(lengths), before)
    torch.testing.assert_close(found, x.T @ x)
