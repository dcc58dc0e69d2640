"""Directions that are no activation: made as they are named, and read like any other."""

import numpy as np
import pytest

from nla_utils import NLA
from nla_utils.extensions.release import bundle as bundles
from nla_utils.extensions.release.directions import KINDS, read_directions, vectors
from nla_utils.stages.targets import describe


@pytest.fixture(scope="module")
def nla(scored_run, readings):
    run, targets, *_ = scored_run
    run.write_results("targets", describe(run, targets), {"targets": targets.sha256})
    return NLA(run.backbone, bundles.load_bundle(run.backbone, run.folder.path))


def test_each_kind_is_what_it_is_called(nla):
    found = vectors(nla, 6)
    mu, own = nla.bundle.mu, nla.bundle.pool_v[-6:]
    np.testing.assert_allclose(found["an activation"], own, rtol=1e-5, atol=1e-5)
    norms = {kind: np.linalg.norm(v - mu, axis=1) for kind, v in found.items()}
    for kind in KINDS:
        assert norms[kind].mean() == pytest.approx(norms["an activation"].mean(), rel=1e-3)
    shuffled = np.sort(found["coordinates shuffled"] - mu, axis=1)
    straight = np.sort(own - mu, axis=1)
    scale = np.linalg.norm(shuffled, axis=1, keepdims=True) / np.linalg.norm(straight, axis=1, keepdims=True)
    np.testing.assert_allclose(shuffled, straight * scale, rtol=1e-3, atol=1e-4)


def test_what_they_are_made_from_is_not_what_they_are_compared_with(nla):
    kept = nla.without_last(6)
    assert len(kept.bundle.pool_texts) == len(kept.bundle.pool_v) == len(nla.bundle.pool_v) - 6
    read = kept.verbalize(nla.bundle.pool_v[-1], k=2)
    assert read.retrieved_score < 1 - 1e-6


def test_every_method_and_kind_has_a_row_with_intervals(nla):
    records = read_directions(nla, ["reader", "lens"], n=3, k=2)
    assert [(r["method"], r["kind"]) for r in records] == [(m, k) for m in ("reader", "lens") for k in KINDS]
    assert all(r["ci95"]["score"][0] <= r["score"] <= r["ci95"]["score"][1] for r in records)
