"""The guided search, and that writing tails loses nothing when it is cut."""

import numpy as np
import pytest
from conftest import tiny_config

from nla_extensions.tail_reader import rollouts as reader_rollouts
from nla_extensions.tail_reader.reader import fit_reader
from nla_extensions.tail_reader.rollouts import av_forward_tokens, guided_search, make_reader_rollouts, read_rollouts
from nla_extensions.tail_reader.study import make_claims
from nla_utils.lm.sampling import row_streams
from nla_utils.metrics import fve
from nla_utils.run import open_run
from nla_utils.targets import make_targets


def test_guided_search_never_loses_and_keeps_to_its_budget(tiny_run):
    run, targets = tiny_run
    reader = fit_reader(run, targets)
    v = targets.v[targets.held_out]
    drawn = read_rollouts(reader, run.backbone, v, 4, row_streams(1, "t", range(len(v)), 5))
    budget = 2000
    found = guided_search(reader, run.backbone, v, targets.mu, drawn, budget)
    assert found.spent[-1] <= budget and len(found.spent) == found.curve.shape[1] > 1
    assert (np.diff(found.curve, axis=1) >= 0).all()
    np.testing.assert_allclose(found.curve[:, 0], fve(drawn.h["corrected"][:, 1:], v[:, None], targets.mu).max(1))
    again = run.backbone.encode(found.ids.tolist(), start=True)
    np.testing.assert_allclose(fve(again, v, targets.mu), found.curve[:, -1], atol=1e-5)
    assert av_forward_tokens(run.config) == 4 * (2 * 24 + 1)


@pytest.fixture
def fitted(tiny_folders, tmp_path):
    """A run of the tiny Gemma-2 whose reader is fitted, and its targets."""
    run = open_run(tiny_config(tiny_folders["tiny-gemma2"], tmp_path))
    targets = make_targets(run)
    fit_reader(run, targets)
    return run, targets


@pytest.mark.parametrize("make", [make_reader_rollouts, make_claims])
def test_a_cut_search_goes_on_where_it_was(fitted, monkeypatch, make):
    folder, calls = fitted[0].folder, []
    monkeypatch.setattr(reader_rollouts, "GUIDED_BATCH", 3)

    def cut_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return guided_search(*args)

    monkeypatch.setattr(reader_rollouts, "guided_search", cut_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        make(*fitted)
    assert len(list(folder.path.glob("guided*.chunks/0*.safetensors"))) == 1
    monkeypatch.setattr(reader_rollouts, "read_rollouts", lambda *_: pytest.fail("the tails were drawn twice"))
    make(*fitted)
    # 8 held-out targets, three at a time: the first search is kept, the second is done again.
    assert len(calls) == 4 and not list(folder.path.glob("*.chunks"))
    curve, spent = (
        folder.load("readings" if make is make_reader_rollouts else "claims").tensors[f"guided_{x}"]
        for x in ("curve", "spent")
    )
    assert (np.diff(curve, axis=1) >= 0).all() and len(curve) == 8
    assert spent.shape == curve.shape[1:]
