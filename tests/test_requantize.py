"""The weights quantized once more: which are rounded and put back, how far v moves, and what is paired with what."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import tiny_config

from nla_extensions.cli import app, opened
from nla_extensions.requantize.measure import bits_change, requantize, requantized
from nla_extensions.requantize.page import BITS, KINDS, NONE, ROWS, requantized_page
from nla_utils import evidence, rows
from nla_utils.errors import ConfigError
from nla_utils.metrics import bits_of_means, fve
from nla_utils.protocol import CORRECTED
from nla_utils.scores import RowValues
from nla_utils.verbalizer import load_rollouts

NAME = "tiny-llama"


def weights(backbone):
    return {name: p.detach().clone() for name, p in backbone.model.named_parameters()}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_matrices_alone_are_rounded_in_blocks_and_put_back(tiny_run, kind):
    backbone, levels = tiny_run[0].backbone, {"Q8_0": 255, "Q4_0": 16}[kind]
    before, size, moved = weights(backbone), {}, {}
    with requantized(backbone, kind) as error:
        for name, w in weights(backbone).items():
            rounded = not torch.equal(w, before[name])
            assert rounded == (w.ndim == 2 and not name.startswith("lm_head")), name
            if rounded:
                # A block is 32 neighbours in a row, with one scale.
                assert all(len(block.unique()) <= levels for block in w.reshape(-1, 32))
                part = "embedding" if "embed_tokens" in name else "linear maps"
                size[part] = size.get(part, 0) + float((before[name] ** 2).sum())
                moved[part] = moved.get(part, 0) + float(((w - before[name]) ** 2).sum())
    expected = {part: math.sqrt(moved[part] / size[part]) for part in size}
    expected["all"] = math.sqrt(sum(moved.values()) / sum(size.values()))
    assert error == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(w, before[name]) for name, w in weights(backbone).items())


def test_weights_are_put_back_where_reading_fails(tiny_run):
    backbone = tiny_run[0].backbone
    before = weights(backbone)
    with pytest.raises(ZeroDivisionError), requantized(backbone, "Q4_0"):
        raise ZeroDivisionError
    assert all(torch.equal(w, before[name]) for name, w in weights(backbone).items())


def test_what_lies_on_the_grid_already_stays_there(tiny_run):
    backbone = tiny_run[0].backbone
    with requantized(backbone, "Q8_0") as first, requantized(backbone, "Q8_0") as again:
        assert 100 * again["all"] < first["all"]


@pytest.fixture(scope="module")
def finished(reproduced_tiny, tiny_folders, tmp_path_factory):
    """A finished smoke run, and its targets, in a folder that may be written to."""
    out = tmp_path_factory.mktemp("requantized")
    shutil.copytree(reproduced_tiny(NAME)[2], out / NAME / "smoke")
    return opened(tiny_config(tiny_folders[NAME], out))


@pytest.fixture(scope="module")
def record(finished):
    return requantize(*finished)[0]["kinds"]


def test_where_nothing_is_rounded_nothing_changes(record):
    column = record[NONE]
    assert column["weights"] == {"embedding": 0, "linear maps": 0, "all": 0}
    assert column["v"]["mu_worst"] == pytest.approx(1, abs=1e-6)
    for row in ROWS:
        np.testing.assert_allclose(column["ci95"][f"{row.cen}_change"], 0, atol=1e-5)
    for row in BITS:
        assert column[f"{row.cen}_change"] == pytest.approx(0, abs=1e-2), row.key


def test_fewer_bits_move_more_and_replay_is_one_within_each_model(record):
    eight, four = record["Q8_0"], record["Q4_0"]
    for part in ("embedding", "linear maps", "all"):
        assert 0 < 4 * eight["weights"][part] < four["weights"][part] < 0.2
    for mu in ("mu", "own_mu"):
        assert four["v"][f"{mu}_mean"] < eight["v"][f"{mu}_mean"] < 1
        assert four["v"][f"{mu}_worst"] < four["v"][f"{mu}_mean"]
    assert all(found[rows.REPLAY.cen] == pytest.approx(1, abs=1e-5) for found in record.values())


def test_changes_are_from_what_the_run_has_kept(finished, record):
    kept = finished[0].folder.read_results(rows.EVALUATION_FILE)["protocols"]["corrected"]
    for found in record.values():
        for row in (rows.GREEDY, rows.BEST, rows.RETRIEVAL, rows.BEST_MINUS_UNRELATED, rows.BITS_BEST.row):
            assert found[row.cen] - found[f"{row.cen}_change"] == pytest.approx(kept[row.cen], abs=1e-6), row.key
            low, high = found["ci95"][f"{row.cen}_change"]
            assert low <= found[f"{row.cen}_change"] <= high


def test_the_requantized_model_judges_by_its_own_v_and_mu(finished, record):
    (run, targets), backbone = finished, finished[0].backbone
    greedy = [load_rollouts(run).at(targets.held_out).sequence(m) for m in range(len(targets.held_out))]
    with requantized(backbone, "Q4_0"):
        h, v, pool = (
            backbone.encode(texts, start=True)
            for texts in (greedy, targets.sequences(targets.held_out), targets.sequences(targets.pool))
        )
    assert record["Q4_0"][rows.GREEDY.cen] == pytest.approx(fve(h, v, pool.mean(axis=0)).mean(), abs=1e-6)


def test_a_change_in_bits_is_paired(finished):
    scores = RowValues(evidence.load(finished[0].folder), CORRECTED)
    best, greedy = scores[rows.BITS_BEST.row], scores[rows.BITS[0].row]
    assert bits_change(best, best) == (0, [0, 0])
    found, (low, high) = bits_change(best, greedy)
    assert found == pytest.approx(bits_of_means(best)[0] - bits_of_means(greedy)[0]) and low <= found <= high


def test_targets_without_texts_are_refused(finished):
    run, targets = finished
    with pytest.raises(ConfigError, match="texts of some targets are not known"):
        requantize(run, dataclasses.replace(targets, lengths=targets.lengths * (np.arange(len(targets.v)) != 3)))


def test_the_command_writes_what_the_page_shows(finished, tiny_folders):
    run, out = finished[0], finished[0].folder.path.parent.parent
    options = ["--backbone", tiny_folders[NAME], "--out", out, *"--profile smoke --dtype float32 --device cpu".split()]
    done = CliRunner().invoke(app, ["requantize", *map(str, options)])
    assert done.exit_code == 0 and "requantized.json" in done.output, done.output
    held = run.folder.read_results("requantized")
    assert list(held["kinds"]) == list(KINDS) and {"targets", "ceilings", "rollouts", "probe"} == set(held["made_from"])
    text = requantized_page([out]).text()
    assert all(row.label in text for row in (*ROWS, *BITS)) and f"{NAME}/smoke/requantized.json" in text
    assert "K-quants cannot be written" in requantized_page([out / "none"]).text()
