"""Targets: extraction, health, the BOS = EOS trap, resume."""

import naive
import numpy as np
import pytest
from conftest import tiny_config

from nla_utils import targets as targets_module
from nla_utils.errors import ArtefactError, BackboneError, CollapsedTargetsError
from nla_utils.lm.backbone import Backbone
from nla_utils.run import open_run
from nla_utils.targets import check_health, describe, load_targets, make_targets
from nla_utils.verbalizer import published_pairs


def test_v_is_the_last_token_of_the_whole_sequence(tiny_run):
    run, targets = tiny_run
    backbone = run.backbone
    assert targets.v.dtype == np.float32 and targets.v.shape == (96, 32)
    for i in (0, 17, 95):
        expected = naive.hidden(backbone.model, backbone.layer, [backbone.start_id, *targets.sequence(i)])
        np.testing.assert_allclose(targets.v[i], expected, rtol=1e-4, atol=1e-4)


def test_bos_equal_to_eos_does_not_collapse(tiny_run):
    run, targets = tiny_run
    assert targets.lengths.min() >= 1 and np.median(targets.lengths) > 1
    assert describe(run, targets)["health"]["distinct"] > 48


def test_roles_do_not_overlap(tiny_run):
    targets = tiny_run[1]
    parts = [set(targets.in_sample), set(targets.pool), set(targets.held_out)]
    assert sum(map(len, parts)) == len(set.union(*parts))


def test_collapsed_and_broken_pools_are_refused():
    with pytest.raises(CollapsedTargetsError, match="start token"):
        check_health(np.ones((10, 4), dtype=np.float32))
    broken = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    broken[3] = np.nan
    with pytest.raises(BackboneError, match="row 3"):
        check_health(broken)


def test_published_pairs_skip_what_grew_too_long(tiny_run):
    run, targets = tiny_run
    pairs, _ = published_pairs(run.backbone, targets, np.arange(30), 10)
    assert all(0 < len(ids) <= 10 for ids in pairs.sequences)
    assert len(pairs.rows) < 30


def test_killed_run_resumes_to_the_same_bytes(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "sample_batch", 32)
    folder = tiny_folders["tiny-llama"]
    whole = open_run(tiny_config(folder, tmp_path / "whole"))
    make_targets(whole)
    cut = open_run(tiny_config(folder, tmp_path / "cut"))
    draw, calls = targets_module.draw_chunk, []

    def killed_in_the_second_chunk(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*args)

    monkeypatch.setattr(targets_module, "draw_chunk", killed_in_the_second_chunk)
    with pytest.raises(KeyboardInterrupt):
        make_targets(cut)
    assert not cut.folder.has("targets")
    make_targets(cut)
    assert len(calls) == 4, "the finished chunk was drawn again"
    files = [r.folder.file("targets.safetensors").read_bytes() for r in (whole, cut)]
    assert files[0] == files[1]


def test_half_written_chunk_counts_as_unfinished(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(Backbone, "sample_batch", 48)
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    reference = make_targets(run)
    run.folder.file("targets.safetensors.json").unlink()
    chunks = run.folder.file("targets.chunks")
    monkeypatch.setattr(targets_module.ChunkStore, "clear", lambda self: None)
    make_targets(run)
    whole = (chunks / "000001.safetensors").read_bytes()
    (chunks / "000001.safetensors").write_bytes(whole[: len(whole) // 2])
    run.folder.file("targets.safetensors.json").unlink()
    again = make_targets(run)
    assert (again.v == reference.v).all()


def test_targets_of_another_backbone_or_layer_are_refused(tiny_folders, tmp_path):
    config = tiny_config(tiny_folders["tiny-llama"], tmp_path)
    run = open_run(config)
    make_targets(run)
    foreign = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path, layer=2))
    foreign.folder.path = run.folder.path
    with pytest.raises(ArtefactError, match="layer = 3, this run has layer = 2"):
        load_targets(foreign)
    run.folder.identity["weight_hash"] = "another"
    with pytest.raises(ArtefactError, match="weight_hash"):
        load_targets(run)


def test_no_disk_space_is_found_before_drawing(tiny_folders, tmp_path, monkeypatch):
    import shutil

    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    full = type("usage", (), {"free": 10})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    monkeypatch.setattr(targets_module, "sample", lambda *_: pytest.fail("work began"))
    with pytest.raises(ArtefactError, match="GB are free"):
        make_targets(run)
