"""Rollouts: one greedy and K sampled, what they are re-encoded from, resume."""

import numpy as np
import pytest
import torch
from conftest import tiny_config

from nla_utils.baselines import make_ceilings
from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import SamplingSettings, sample
from nla_utils.run import open_run
from nla_utils.targets import make_targets
from nla_utils.training import train_av
from nla_utils.verbalizer import ActivationVerbalizer, load_av, make_rollouts


def test_column_zero_is_greedy_and_the_others_are_not(scored_run):
    run, targets, _, rollouts = scored_run
    chosen = rollouts.at(targets.held_out)
    av = load_av(run)
    with torch.inference_mode():
        prompt = av(torch.from_numpy(targets.v[chosen.rows]), run.backbone.dtype)
    greedy = sample(run.backbone, prompt, SamplingSettings(24, temperature=0.0), None)
    assert [chosen.sequence(m, 0) for m in range(8)] == [greedy.sequence(m) for m in range(8)]
    assert any(chosen.sequence(m, 1) != chosen.sequence(m, 2) for m in range(8))


def test_h_is_read_without_the_prefix(scored_run):
    """Behind the prefix, h would hold v itself."""
    run, targets, _, rollouts = scored_run
    chosen = rollouts.at(targets.held_out)
    h = run.backbone.encode([chosen.sequence(0, 1)], start=True)[0]
    np.testing.assert_allclose(chosen.h["corrected"][0, 1], h, rtol=1e-3, atol=1e-3)


def test_killed_rollouts_resume_to_the_same_bytes(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "sample_batch", 20)
    files = []
    for name in ("whole", "cut"):
        run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path / name))
        targets = make_targets(run)
        train_av(run, targets)
        if name == "cut":
            write, calls = ActivationVerbalizer.write, []

            def killed_in_the_third_chunk(*args):
                calls.append(1)
                if len(calls) == 3:
                    raise KeyboardInterrupt
                return write(*args)

            monkeypatch.setattr(ActivationVerbalizer, "write", killed_in_the_third_chunk)
            with pytest.raises(KeyboardInterrupt):
                make_rollouts(run, targets)
            assert not run.folder.has("rollouts")
        make_rollouts(run, targets)
        files.append(run.folder.file("rollouts.safetensors").read_bytes())
    assert len(calls) == 5, "a finished chunk was rolled out again"
    assert files[0] == files[1]


def test_rollouts_and_ceilings_of_other_targets_are_refused(tiny_folders, tmp_path):
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    targets = make_targets(run)
    make_ceilings(run, targets)
    run.folder.save("targets", {"ids": targets.ids, "lengths": targets.lengths, "v": targets.v + 1})
    with pytest.raises(ArtefactError, match="was made from targets"):
        run.folder.load("ceilings")


def test_rollouts_need_a_trained_av(tiny_folders, tmp_path):
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    targets = make_targets(run)
    with pytest.raises(ArtefactError, match="best_av.safetensors is missing"):
        make_rollouts(run, targets)
