"""What text can reach by layer: the same numbers as the notebooks give at that layer, from one pass over the texts."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nla_utils import depth, paper_text, reproduce, sweeps
from nla_utils.backbone import Backbone
from nla_utils.ceilings import make_ceilings
from nla_utils.cli import app
from nla_utils.evaluation import score_ceilings, shuffled_scores
from nla_utils.layers import config_at
from nla_utils.metrics import fve
from nla_utils.paper import build_paper
from nla_utils.reader import load_reader
from nla_utils.readings import read_rollouts
from nla_utils.results import GREEDY_MINUS_RETRIEVAL, committed_results, find_runs, plain_runs
from nla_utils.run import folder_of
from nla_utils.targets import load_targets

LAYERS = [1, 2, 3]


@pytest.fixture(scope="module")
def reached(tiny_run, tmp_path_factory):
    run, _ = tiny_run
    config = dataclasses.replace(run.config, out=str(tmp_path_factory.mktemp("depth")))
    return config, run.backbone, depth.reach_of_text(config, run.backbone, LAYERS)


def test_each_layers_numbers_are_those_of_notebook_03(reached):
    config, backbone, (record, parents) = reached
    assert list(record["layers"]) == ["1", "2", "3"] and len(set(parents.values())) == 3
    for layer in LAYERS:
        at = config_at(config, backbone.layer, layer)
        standing = dataclasses.replace(backbone, layer=layer)
        folder = folder_of(at, standing)
        targets = load_targets(at, folder)
        assert parents[f"targets of layer {layer}"] == targets.sha256
        ceilings = make_ceilings(at, standing, targets, folder)
        for protocol in ("paper", "corrected"):
            expected = score_ceilings(targets, ceilings, protocol).to_json()
            found = record["layers"][str(layer)][protocol]
            shared = found["ci95"].keys() & expected["ci95"].keys()
            assert "replay_cen_fve_mean" in shared and len(shared) == (1 if protocol == "paper" else 12)
            for key in shared:
                assert found[key] == pytest.approx(expected[key], abs=1e-6), (layer, protocol, key)
                np.testing.assert_allclose(found["ci95"][key], expected["ci95"][key], atol=1e-6)
            assert protocol == "paper" or found["mu_norm"] == pytest.approx(expected["mu_norm"])


def test_the_readers_numbers_are_those_of_notebook_04(reached):
    config, backbone, (record, _) = reached
    for layer in LAYERS:
        at, standing = config_at(config, backbone.layer, layer), dataclasses.replace(backbone, layer=layer)
        targets = load_targets(at, folder_of(at, standing))
        v, sources = targets.v[targets.held_out], targets.sequences(targets.held_out)
        rollouts = read_rollouts(load_reader(standing, folder_of(at, standing)), standing, torch.from_numpy(v), 1, seed=0)
        others, _ = shuffled_scores(v, rollouts["h_bos"], targets.mu)
        greedy = fve(rollouts["h_bos"][:, 0], v, targets.mu)
        found = record["layers"][str(layer)]["reader"]
        assert found["adapter_cen_greedy_mean"] == pytest.approx(greedy.mean(), abs=1e-6)
        assert found["shuffled_v_cen_greedy_mean"] == pytest.approx(others.mean(), abs=1e-6)
        hits = [ids[-1] == s[-1] for ids, s in zip(rollouts["ids"][:, 0], sources)]
        assert found["names_last_token"] == np.mean(hits)
        gap = found["adapter_cen_greedy_mean"] - record["layers"][str(layer)]["corrected"]["nn_retrieval_cen_mean"]
        assert found[GREEDY_MINUS_RETRIEVAL] == pytest.approx(gap)


def test_texts_are_encoded_once_for_all_layers(tiny_run, tmp_path, monkeypatch):
    run, _ = tiny_run
    config = dataclasses.replace(run.config, out=str(tmp_path))
    depth.extract_layers(config, run.backbone, LAYERS)
    passes, encode = [], Backbone.encode_layers
    monkeypatch.setattr(Backbone, "encode_layers", lambda self, *a: passes.append(a[2]) or encode(self, *a))
    depth.reach_of_text(config, run.backbone, LAYERS)
    assert [p for p in passes if len(p) > 1] == [LAYERS] * 3, "replay, tails and paraphrases, each once"


def test_readers_are_fitted_for_as_many_layers_at_once_as_there_is_room_for(reached, tmp_path, monkeypatch):
    config, backbone, (record, _) = reached
    n, d = config.sizes.n_targets, backbone.d
    layer_bytes = 4 * n * d + 8 * 8 * d * d
    monkeypatch.setattr(depth, "FIT_BYTES", 2 * layer_bytes)
    passes, fit = [], depth.fit_readers
    monkeypatch.setattr(depth, "fit_readers", lambda run, b, at: passes.append(list(at)) or fit(run, b, at))
    found, _ = depth.reach_of_text(dataclasses.replace(config, out=str(tmp_path)), backbone, LAYERS)
    assert passes == [[1, 2], [3]]
    for layer, columns in record["layers"].items():
        for key in ("adapter_cen_greedy_mean", "names_last_token"):
            assert found["layers"][layer]["reader"][key] == pytest.approx(columns["reader"][key], abs=1e-6)
    assert depth._layers_in(layer_bytes - 1, d, n) == 1, "one layer has to be held, whatever the room"


def test_retrieval_is_the_null_with_the_whole_pool(reached):
    """Best of K is monotone in K and ends at the best of all."""
    _, _, (record, _) = reached
    for columns in record["layers"].values():
        c = columns["corrected"]
        keys = ("random_floor_cen_fve_mean", "unrelated_text_cen_bestofK_mean", "unrelated_text_bestof8_cen_fve_mean",
                "nn_retrieval_cen_mean")  # fmt: skip
        floor, best_4, best_8, best = (c[k] for k in keys)
        assert record["K"] == 4 and floor < best_4 < best_8 < best <= 1
        assert c["replay_cen_fve_mean"] == pytest.approx(1, abs=1e-4)


def test_the_command_keeps_its_record_beside_the_runs_of_any_seed(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "committed_results", lambda: tmp_path / "kept")
    monkeypatch.setattr("nla_utils.cli.paper", lambda: None)
    command = ["depth", "--backbone", str(tiny_folders["tiny-llama"]), "--profile", "smoke", "--out",
               str(tmp_path / "runs"), "--device", "cpu", "--dtype", "float32", "--seed", "2"]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--layers", "1,3", "--adopt"])
    assert done.exit_code == 0, done.output
    assert "results (JSON)" in done.output and "executed notebooks" not in done.output, "no notebook was run"
    record = json.loads((tmp_path / "kept" / "tiny-llama" / "smoke" / "depth.json").read_text())
    assert list(record["layers"]) == ["1", "3"] and record["identity"]["seed"] == 2
    refused = CliRunner().invoke(app, [*command, "--layers", "4"])
    assert refused.exit_code == 2 and "1 to 3" in refused.output


@pytest.fixture
def beside_a_run(reached, tmp_path):
    """A committed run's results with a record of depth beside them."""
    run = plain_runs(find_runs([committed_results()]))[0]
    folder = tmp_path / "results" / run.backbone / run.profile
    folder.mkdir(parents=True)
    for name, data in run.data.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    _, _, (record, made_from) = reached
    provenance = {k: run.data["targets"][k] for k in ("code", "libraries")}
    identity = run.data["targets"]["identity"] | {"seed": 5}
    record = {**record, "made_from": made_from, "identity": identity, **provenance}
    (folder / "depth.json").write_text(json.dumps(record))
    return folder.parent.parent


def test_one_run_and_a_record_make_the_figure_the_table_and_the_words(beside_a_run, tmp_path):
    section, *written = build_paper((beside_a_run,), tmp_path / "out" / "section11.md", tmp_path / "out" / "figures")
    assert tmp_path / "out" / "figures" / "fig7_depth.png" in written
    (found,) = sweeps.depths(find_runs([beside_a_run]))
    table = sweeps.depth_table(found)
    assert list(table.index) == LAYERS and "AV, best-of-K" not in table, "the run is of another layer"
    text = section.read_text()
    assert "seed 5" in text and "depth.json" in text
    assert "Of these 3 intervals of 95 %, 0.15 would miss zero" in text, "one layer with an AV, three differences"
    assert found.title in text


@pytest.mark.parametrize("lowest, words", [
    ({9: 1, 13: 1}, "at layers 9, 13"), ({1: 1, 2: 1, 3: 1}, "at every layer"), ({1: 0, 2: 0}, "at none of them"),
    ({1: 1, 2: 1, 3: 0, 4: 1, 6: 1, 7: 1}, "at layers 1 to 2, 4, 6 to 7"), ({1: 0, 5: 1}, "at layer 5"),
])  # fmt: skip
def test_layers_above_zero_are_named(lowest, words):
    columns = {layer: {"ci95": {"x": [low, 2]}} for layer, low in lowest.items()}
    assert paper_text._above(columns, "x") == words
    mirrored = {layer: {"ci95": {"x": [-2, -low]}} for layer, low in lowest.items()}
    assert paper_text._below(mirrored, "x") == words


def test_an_av_stands_at_the_layers_where_it_was_trained(beside_a_run):
    (found,) = sweeps.depths(find_runs([beside_a_run]))
    (layer,) = found.runs
    record = dict(found.record, layers={str(layer): found.record["layers"]["1"]})
    row = sweeps.depth_table(dataclasses.replace(found, record=record)).loc[layer]
    column = found.runs[layer].column("centered_eval", "corrected")
    assert row["AV, best-of-K"].startswith(f"{column['adapter_cen_bestofK_mean']:.3f}")


def test_of_runs_of_one_layer_the_one_that_shares_the_records_sequences_stands_beside_it(beside_a_run):
    (base,) = find_runs([beside_a_run])

    def variant(layer, seed):
        data = copy.deepcopy(base.data)
        data["targets"]["identity"] |= {"layer": layer, "seed": seed}
        return dataclasses.replace(base, profile=f"{base.profile}-layer{layer}-seed{seed}", data=data)

    (found,) = sweeps.depths([base, variant(1, 7), variant(1, 5), variant(2, 5), variant(base.layer, 7)])
    assert {layer: run.seed for layer, run in found.runs.items()} == {1: 5, 2: 5, base.layer: base.seed}
    assert f"the AV at layers 1 to 2 of these and at layer {base.layer} of others (seed {base.seed})" in paper_text.depth(found)
