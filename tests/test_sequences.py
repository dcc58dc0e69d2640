"""Sequences in a file: what is read from them is what was drawn, and what does not fit is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import with_out
from safetensors.numpy import save_file

from nla_extensions.cli import app
from nla_extensions.depth import measure
from nla_extensions.depth.measure import (
    committed_sequences,
    extract_layers,
    reach_of_text,
    read_sequences,
    write_sequences,
)
from nla_utils import notebooks
from nla_utils.config import RunConfig
from nla_utils.errors import ArtefactError
from nla_utils.run import Run
from nla_utils.store import RunFolder
from nla_utils.targets import sequences_hash


@pytest.fixture
def kept(gemma_run, tmp_path, monkeypatch):
    """The file of a run, and the run with another output folder, where nothing can be drawn."""
    run, targets = gemma_run
    path = tmp_path / "sequences.safetensors"
    write_sequences(path, run, targets)
    monkeypatch.setattr(measure, "draw_sequences", None)
    return run, targets, path, with_out(run, tmp_path / "other")


def test_targets_read_from_a_file_are_byte_for_byte_those_that_were_drawn(kept):
    run, targets, path, other = kept
    extract_layers(other, [1, run.backbone.layer], path)
    assert other.folder.load("targets").sha256 == targets.sha256
    assert not other.folder.file("layers.chunks").exists()


def test_what_depth_does_says_which_sequences_it_was_measured_on(kept):
    run, targets, path, other = kept
    record, _ = reach_of_text(other, [1, 2], path)
    assert record["sequences"] == sequences_hash(**targets.texts)


def test_layers_of_other_sequences_are_not_mixed(kept, gemma_run):
    run, targets, path, other = kept
    extract_layers(other, [1], path)
    write_sequences(path, run, dataclasses.replace(targets, ids=targets.ids[::-1]))
    for asked in ([1], [1, 2]):
        with pytest.raises(ArtefactError, match="not of the same sequences: .*smoke-layer1.*sequences.safetensors"):
            extract_layers(other, asked, path)


def test_a_layer_that_is_added_takes_the_sequences_that_are_there(kept):
    run, targets, path, other = kept
    extract_layers(other, [1], path)
    extract_layers(other, [1, 2])
    added = other.at(2).folder.load("targets")
    np.testing.assert_array_equal(added.tensors["ids"], targets.ids)


def test_ids_and_lengths_both_count(gemma_run):
    _, targets = gemma_run
    shorter = dataclasses.replace(targets, lengths=np.maximum(targets.lengths - 1, 1))
    other = dataclasses.replace(targets, ids=targets.ids[::-1])
    assert len({sequences_hash(**t.texts) for t in (targets, shorter, other)}) == 3


@pytest.mark.parametrize(
    "change, named",
    [
        ({"seed": 2}, "seed = 1, this run has seed = 2"),
        ({"n_targets": 97}, "holds 96 .* needs 97"),
        ({"profile": "quick"}, "max_new_tokens"),
        ({"dtype": "bfloat16"}, "dtype = 'float32'"),
    ],
)
def test_sequences_of_another_run_are_refused(kept, change, named):
    run, _, path, other = kept
    own = {key: value for key, value in change.items() if key in run.folder.identity}
    folder = dataclasses.replace(run.folder, identity=run.folder.identity | own)
    changed = Run(dataclasses.replace(other.config, **change), folder)
    with pytest.raises(ArtefactError, match=f"{path}.*{named}"):
        read_sequences(path, changed)


def test_a_layer_and_a_device_do_not_matter(kept):
    run, targets, path, other = kept
    folder = dataclasses.replace(run.folder, identity=run.folder.identity | {"layer": 1}, device="cuda")
    np.testing.assert_array_equal(read_sequences(path, Run(other.config, folder))["ids"], targets.ids)


def test_what_is_no_such_file_is_refused(kept):
    run, targets, path, other = kept
    complete = path.read_bytes()
    path.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ArtefactError, match="was not read"):
        read_sequences(path, other)
    with pytest.raises(ArtefactError, match="nowhere"):
        read_sequences(path.with_name("nowhere"), other)
    path.write_bytes(complete[:-4] + b"\1\0\0\0")
    with pytest.raises(ArtefactError, match="altered"):
        read_sequences(path, other)
    save_file({"v": targets.v}, path)
    with pytest.raises(ArtefactError, match=r"holds \['v'\]"):
        read_sequences(path, other)


def test_the_repository_keeps_one_file_for_all_layers(tmp_path):
    folder = RunFolder(tmp_path / "gemma3-270m" / "run", {"backbone": "gemma3-270m"})
    configs = (RunConfig(profile="laptop", seed=2, layer=layer) for layer in (None, 6))
    paths = {committed_sequences(Run(config, folder)) for config in configs}
    assert [p.name for p in paths] == ["laptop-seed2.safetensors"]


def test_the_commands_write_and_take_it(kept, tiny_folders, monkeypatch):
    run, targets, path, other = kept
    path.unlink()
    shared = ["--backbone", str(tiny_folders["tiny-gemma2"]), "--profile", "smoke", "--device", "cpu"]
    shared += ["--dtype", "float32"]
    wrote = CliRunner().invoke(app, ["sequences", *shared, "--out", run.config.out, "--to", str(path)])
    assert wrote.exit_code == 0, wrote.output
    given = [*shared, "--out", other.config.out, "--sequences", str(path)]
    done = CliRunner().invoke(app, ["depth", *given, "--layers", "1,2"])
    assert done.exit_code == 0, done.output
    record = other.folder.file("results/depth.json")
    assert json.loads(record.read_text())["sequences"] == sequences_hash(**targets.texts)
    seen = []
    monkeypatch.setattr(notebooks, "reproduce", lambda configs, *_: seen.extend(configs))
    assert CliRunner().invoke(app, ["sweep", *given, "--layers", "2,3"]).exit_code == 0
    assert [c.layer for c in seen] == [2, None]
