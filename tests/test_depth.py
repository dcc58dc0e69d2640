"""What text can reach by layer: the same numbers as the notebooks give at that layer, from one pass over the texts."""

import copy
import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import with_out

from nla_extensions.cli import app
from nla_extensions.depth import measure
from nla_extensions.depth.page import depth_page, depth_table, depths
from nla_extensions.tail_reader.reader import load_reader
from nla_extensions.tail_reader.rollouts import read_rollouts
from nla_utils import rows
from nla_utils.baselines import make_ceilings
from nla_utils.evidence import Scorer, of_ceilings
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import row_streams
from nla_utils.metrics import fve
from nla_utils.protocol import PROTOCOLS
from nla_utils.report.results import COMMITTED, find_results, without_variants
from nla_utils.scores import score
from nla_utils.targets import load_targets

LAYERS = [1, 2, 3]


@pytest.fixture(scope="module")
def reached(tiny_run, tmp_path_factory):
    run = with_out(tiny_run[0], tmp_path_factory.mktemp("depth"))
    return run, measure.reach_of_text(run, LAYERS)


def test_each_layers_numbers_are_those_of_notebook_03(reached):
    run, (record, parents) = reached
    assert list(record["layers"]) == ["1", "2", "3"] and len(set(parents.values())) == 3
    for layer in LAYERS:
        own = run.at(layer)
        targets = load_targets(own)
        assert parents[f"targets of layer {layer}"] == targets.sha256
        ceilings = make_ceilings(own, targets)
        for protocol in PROTOCOLS:
            expected = score(of_ceilings(targets, ceilings, own.sizes.n_rollouts), protocol, rows.OF_CEILINGS).to_json()
            found = record["layers"][str(layer)][protocol.name]
            shared = found["ci95"].keys() & expected["ci95"].keys()
            paper = protocol.name == "published"
            assert "replay_cen_fve_mean" in shared and len(shared) == (1 if paper else 12)
            for key in shared:
                assert found[key] == pytest.approx(expected[key], abs=1e-6), (layer, protocol.name, key)
                np.testing.assert_allclose(found["ci95"][key], expected["ci95"][key], atol=1e-6)
            assert paper or found["mu_norm"] == pytest.approx(expected["mu_norm"])


def test_the_readers_numbers_are_those_of_notebook_07(reached):
    run, (record, _) = reached
    for layer in LAYERS:
        own = run.at(layer)
        targets = load_targets(own)
        v, sources = targets.v[targets.held_out], targets.sequences(targets.held_out)
        rollouts = read_rollouts(load_reader(own), own.backbone, v, 1, row_streams(0, "t", range(len(v)), 2))
        others, _ = Scorer(v, targets.v[targets.pool], targets.mu).others(rollouts.h["corrected"])
        greedy = fve(rollouts.h["corrected"][:, 0], v, targets.mu)
        found = record["layers"][str(layer)]["reader"]
        assert found["adapter_cen_greedy_mean"] == pytest.approx(greedy.mean(), abs=1e-6)
        assert found["shuffled_v_cen_greedy_mean"] == pytest.approx(others.mean(), abs=1e-6)
        hits = [ids[-1] == s[-1] for ids, s in zip(rollouts.ids[:, 0], sources)]
        assert found["names_last_token"] == np.mean(hits)
        gap = found["adapter_cen_greedy_mean"] - record["layers"][str(layer)]["corrected"]["nn_retrieval_cen_mean"]
        assert found[rows.GREEDY_MINUS_RETRIEVAL.cen] == pytest.approx(gap)


def test_texts_are_encoded_once_for_all_layers(tiny_run, tmp_path, monkeypatch):
    run = with_out(tiny_run[0], tmp_path)
    measure.extract_layers(run, LAYERS)
    passes, encode = [], Backbone.encode_layers
    monkeypatch.setattr(Backbone, "encode_layers", lambda self, *a: passes.append(a[2]) or encode(self, *a))
    measure.reach_of_text(run, LAYERS)
    assert [p for p in passes if len(p) > 1] == [LAYERS] * 3, "replay, tails and paraphrases, each once"


def test_readers_are_fitted_for_as_many_layers_at_once_as_there_is_room_for(reached, tmp_path, monkeypatch):
    run, (record, _) = reached
    n, d = run.sizes.n_targets, run.backbone.d
    layer_bytes = 4 * n * d + 8 * 8 * d * d
    monkeypatch.setattr(measure, "FIT_BYTES", 2 * layer_bytes)
    passes, fit = [], measure.fit_readers
    monkeypatch.setattr(measure, "fit_readers", lambda at: passes.append([r.backbone.layer for r, _ in at]) or fit(at))
    found, _ = measure.reach_of_text(with_out(run, tmp_path), LAYERS)
    assert passes == [[1, 2], [3]]
    for layer, columns in record["layers"].items():
        for key in ("adapter_cen_greedy_mean", "names_last_token"):
            assert found["layers"][layer]["reader"][key] == pytest.approx(columns["reader"][key], abs=1e-6)
    assert measure._layers_in(layer_bytes - 1, d, n) == 1, "one layer has to be held, whatever the room"


def test_retrieval_is_the_null_with_the_whole_pool(reached):
    """Best of K is monotone in K and ends at the best of all."""
    _, (record, _) = reached
    for columns in record["layers"].values():
        c = columns["corrected"]
        keys = (
            "random_floor_cen_fve_mean",
            "unrelated_text_cen_bestofK_mean",
            "unrelated_text_bestof8_cen_fve_mean",
            "nn_retrieval_cen_mean",
        )
        floor, best_4, best_8, best = (c[k] for k in keys)
        assert record["K"] == 4 and floor < best_4 < best_8 < best <= 1
        assert c["replay_cen_fve_mean"] == pytest.approx(1, abs=1e-4)


def test_the_command_keeps_its_record_beside_the_runs_of_any_seed(tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("nla_utils.report.results.COMMITTED", tmp_path / "kept")
    monkeypatch.setattr("nla_extensions.cli.write_pages", lambda: None)
    command = [
        "depth",
        "--backbone",
        str(tiny_folders["tiny-llama"]),
        "--profile",
        "smoke",
        "--out",
        str(tmp_path / "runs"),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--seed",
        "2",
    ]
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
    results = without_variants(find_results())[0]
    folder = tmp_path / "results" / results.backbone / results.profile
    folder.mkdir(parents=True)
    for path in (COMMITTED / results.backbone / results.profile).glob("*.json"):
        (folder / path.name).write_bytes(path.read_bytes())
    _, (record, made_from) = reached
    provenance = {k: results.data["targets"][k] for k in ("code", "libraries")}
    identity = results.data["targets"]["identity"] | {"seed": 5}
    record = {**record, "made_from": made_from, "identity": identity, **provenance}
    (folder / "depth.json").write_text(json.dumps(record))
    return folder.parent.parent


def test_one_run_and_a_record_make_the_figure_and_the_table(beside_a_run, tmp_path):
    page, *written = depth_page([beside_a_run]).write(tmp_path / "out" / "depth.md", tmp_path / "out" / "figures")
    assert tmp_path / "out" / "figures" / "fig7_depth.png" in written
    (found,) = depths(find_results([beside_a_run]))
    table = depth_table(found)
    assert list(table.index) == LAYERS and "AV, best-of-K" not in table, "the run is of another layer"
    text = page.read_text()
    assert "depth.json" in text and found.title in text


def test_an_av_stands_at_the_layers_where_it_was_trained(beside_a_run):
    (found,) = depths(find_results([beside_a_run]))
    (layer,) = found.runs
    row = depth_table(dataclasses.replace(found, texts={layer: found.texts[1]})).loc[layer]
    column = found.runs[layer].column("centered_eval", "corrected")
    assert row["AV, best-of-K"].startswith(f"{column['adapter_cen_bestofK_mean']:.3f}")


def test_of_runs_of_one_layer_the_one_that_shares_the_records_sequences_stands_beside_it(beside_a_run):
    (base,) = find_results([beside_a_run])

    def variant(layer, seed):
        data = copy.deepcopy(base.data)
        data["targets"]["identity"] |= {"layer": layer, "seed": seed}
        folder = base.folder / "nowhere"
        return dataclasses.replace(base, profile=f"{base.profile}-layer{layer}-seed{seed}", data=data, folder=folder)

    (found,) = depths([base, variant(1, 7), variant(1, 5), variant(2, 5), variant(base.layer, 7)])
    assert {layer: r.seed for layer, r in found.runs.items()} == {1: 5, 2: 5, base.layer: base.seed}
    assert found.sequences == {1: "the same", 2: "the same", base.layer: f"seed {base.seed}"}
