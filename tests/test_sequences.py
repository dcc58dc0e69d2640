"""Sequences in a file: what is read from them is what was drawn, and what does not fit is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from nla_utils import layers
from nla_utils.cli import app
from nla_utils.config import RunConfig
from nla_utils.depth import reach_of_text
from nla_utils.layers import config_at, extract_layers, folder_at
from nla_utils.sequences import committed_sequences, read_sequences, write_sequences
from nla_utils.store import ArtefactError
from nla_utils.targets import sequences_hash


@pytest.fixture
def kept(gemma_run, tmp_path, monkeypatch):
    """The file of a run, and the run's configuration with another output folder, where nothing can be drawn."""
    run, targets = gemma_run
    path = tmp_path / "sequences.safetensors"
    write_sequences(path, run.config, run.folder, targets)
    monkeypatch.setattr(layers, "draw_sequences", None)
    return run, targets, path, dataclasses.replace(run.config, out=str(tmp_path / "other"))


def test_targets_read_from_a_file_are_byte_for_byte_those_that_were_drawn(kept):
    run, targets, path, config = kept
    extract_layers(config, run.backbone, [1, run.backbone.layer], path)
    home = folder_at(config, run.backbone, run.backbone.layer)
    assert home.load("targets").sha256 == targets.sha256
    assert not home.file("layers.chunks").exists()


def test_what_depth_does_says_which_sequences_it_was_measured_on(kept):
    run, targets, path, config = kept
    record, _ = reach_of_text(config, run.backbone, [1, 2], path)
    assert record["sequences"] == sequences_hash(**targets.texts)


def test_layers_of_other_sequences_are_not_mixed(kept, gemma_run):
    run, targets, path, config = kept
    extract_layers(config, run.backbone, [1], path)
    write_sequences(path, run.config, run.folder, dataclasses.replace(targets, ids=targets.ids[::-1]))
    for asked in ([1], [1, 2]):
        with pytest.raises(ArtefactError, match="not of the same sequences: .*smoke-layer1.*sequences.safetensors"):
            extract_layers(config, run.backbone, asked, path)


def test_a_layer_that_is_added_takes_the_sequences_that_are_there(kept):
    run, targets, path, config = kept
    extract_layers(config, run.backbone, [1], path)
    extract_layers(config, run.backbone, [1, 2])
    added = folder_at(config_at(config, run.backbone.layer, 2), run.backbone, 2).load("targets")
    np.testing.assert_array_equal(added.tensors["ids"], targets.ids)


def test_ids_and_lengths_both_count(gemma_run):
    _, targets = gemma_run
    shorter = dataclasses.replace(targets, lengths=np.maximum(targets.lengths - 1, 1))
    other = dataclasses.replace(targets, ids=targets.ids[::-1])
    assert len({sequences_hash(**t.texts) for t in (targets, shorter, other)}) == 3


@pytest.mark.parametrize(
    "change, named",
    [({"seed": 2}, "seed = 1, this run has seed = 2"), ({"n_targets": 97}, "holds 96 .* needs 97"),
     ({"profile": "quick"}, "max_new_tokens"), ({"dtype": "bfloat16"}, "dtype = 'float32'")],
)  # fmt: skip
def test_sequences_of_another_run_are_refused(kept, change, named):
    run, _, path, config = kept
    config = dataclasses.replace(config, **change)
    live = {key: value for key, value in change.items() if key in run.folder.identity}
    folder = dataclasses.replace(run.folder, identity=run.folder.identity | live)
    with pytest.raises(ArtefactError, match=f"{path}.*{named}"):
        read_sequences(path, config, folder)


def test_a_layer_and_a_device_do_not_matter(kept):
    run, targets, path, config = kept
    folder = dataclasses.replace(run.folder, identity=run.folder.identity | {"layer": 1, "device": "cuda"})
    np.testing.assert_array_equal(read_sequences(path, config, folder)["ids"], targets.ids)


def test_what_is_no_such_file_is_refused(kept):
    run, targets, path, config = kept
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtefactError, match="was not read"):
        read_sequences(path, config, run.folder)
    with pytest.raises(ArtefactError, match="nowhere"):
        read_sequences(path.with_name("nowhere"), config, run.folder)
    path.write_bytes(whole[:-4] + b"\1\0\0\0")
    with pytest.raises(ArtefactError, match="altered"):
        read_sequences(path, config, run.folder)
    save_file({"v": targets.v}, path)
    with pytest.raises(ArtefactError, match=r"holds \['v'\]"):
        read_sequences(path, config, run.folder)


def test_the_repository_keeps_one_file_for_all_layers():
    paths = {committed_sequences(RunConfig(profile="laptop", seed=2, layer=layer), "gemma3-270m") for layer in (None, 6)}
    assert [p.name for p in paths] == ["laptop-seed2.safetensors"]


def test_the_commands_write_and_take_it(kept, tiny_folders, monkeypatch):
    run, targets, path, config = kept
    path.unlink()
    shared = ["--backbone", str(tiny_folders["tiny-gemma2"]), "--profile", "smoke", "--device", "cpu"]
    shared += ["--dtype", "float32"]
    wrote = CliRunner().invoke(app, ["sequences", *shared, "--out", run.config.out, "--to", str(path)])
    assert wrote.exit_code == 0, wrote.output
    given = [*shared, "--out", config.out, "--sequences", str(path)]
    done = CliRunner().invoke(app, ["depth", *given, "--layers", "1,2"])
    assert done.exit_code == 0, done.output
    (record,) = run.folder.path.parents[1].parent.glob("**/other/*/*/results/depth.json")
    assert json.loads(record.read_text())["sequences"] == sequences_hash(**targets.texts)
    seen = []
    monkeypatch.setattr("nla_utils.reproduce.reproduce", lambda configs, _: seen.extend(configs))
    assert CliRunner().invoke(app, ["sweep", *given, "--layers", "2,3"]).exit_code == 0
    assert [c.layer for c in seen] == [2, None]
