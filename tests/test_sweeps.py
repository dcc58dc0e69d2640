"""Layers and seeds: one pass gives every layer's own targets, and runs that differ in them are shown together."""

import copy
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import with_out

from nla_extensions.cli import app
from nla_extensions.depth import measure, page
from nla_extensions.depth.measure import extract_layers, parse_layers
from nla_utils import baselines as ceilings
from nla_utils import notebooks
from nla_utils.config import RunConfig, parse_seeds
from nla_utils.errors import ConfigError
from nla_utils.lm.backbone import Backbone
from nla_utils.notebooks import STAGES
from nla_utils.protocol import CORRECTED
from nla_utils.report import pages as appendix
from nla_utils.report.results import RunResults, find_results, without_variants
from nla_utils.report.tables import seed_groups, seeds_table
from nla_utils.store import RunFolder
from nla_utils.targets import make_targets


def test_one_pass_gives_what_each_layer_alone_gives(tiny_run):
    run, targets = tiny_run
    texts = targets.sequences(targets.held_out)
    together = run.backbone.encode_layers(texts, True, (3, 1))
    for h, layer in zip(together, (3, 1)):
        alone = dataclasses.replace(run.backbone, layer=layer).encode(texts, start=True)
        np.testing.assert_array_equal(h, alone)


def test_a_sweeps_targets_are_byte_for_byte_those_of_single_runs(tiny_run, tmp_path):
    run = with_out(tiny_run[0], tmp_path / "sweep")
    extract_layers(run, [1, 2, run.backbone.layer])
    for layer in (1, 2, run.backbone.layer):
        single, swept = with_out(run, tmp_path / "alone").at(layer), run.at(layer)
        make_targets(single)
        assert swept.folder.load("targets").sha256 == single.folder.load("targets").sha256
        assert ("layer" in swept.folder.path.name) == (layer != run.backbone.layer)


def test_a_cut_extraction_goes_on_where_it_was(gemma_run, tmp_path, monkeypatch):
    run = with_out(gemma_run[0], tmp_path)
    monkeypatch.setattr(Backbone, "sample_batch", 32)
    drawn, draw = [], measure.draw_sequences

    def counted(*arguments):
        drawn.append(tuple(arguments[-1]))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(measure, "draw_sequences", counted)
    with pytest.raises(KeyboardInterrupt):
        extract_layers(run, [1, 2])
    extract_layers(run, [1, 2])
    assert len(drawn) == 4 and drawn[1] == drawn[2] and len(set(drawn)) == 3
    extract_layers(run, [1, 2])
    assert len(drawn) == 4, "targets that are there were drawn again"
    assert not list(tmp_path.glob("**/layers.chunks"))


def test_a_cut_between_two_layers_goes_on_too(gemma_run, tmp_path, monkeypatch):
    run = with_out(gemma_run[0], tmp_path)
    saved, save = [], measure.save_targets

    def cut(*arguments):
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt
        return save(*arguments)

    monkeypatch.setattr(measure, "save_targets", cut)
    with pytest.raises(KeyboardInterrupt):
        extract_layers(run, [1, 2])
    monkeypatch.setattr(measure, "draw_sequences", None)
    extract_layers(run, [1, 2])
    assert len(saved) == 3 and len(list(tmp_path.glob("*/*/targets.safetensors.json"))) == 2


def test_another_layer_takes_the_paraphrases_that_are_there(gemma_run, tmp_path, monkeypatch):
    run, made = with_out(gemma_run[0], tmp_path), []
    for layer in (1, 2):
        own = run.at(layer)
        made.append(ceilings.make_ceilings(own, make_targets(own)))
        monkeypatch.setattr(ceilings, "continue_prompts", None)
    for name in ("published", "corrected"):
        np.testing.assert_array_equal(*(own[f"paraphrase.{name}"].ids for own in made))
    assert not np.array_equal(*(own["paraphrase.corrected"].read_as(CORRECTED) for own in made))


@pytest.mark.parametrize("text, found", [("all", [1, 2, 3]), ("2", [2]), ("3, 1", [1, 3]), ("2,2", [2])])
def test_layers_are_read(text, found):
    assert parse_layers(text, 4) == found


@pytest.mark.parametrize("text", ["4", "0", "1,x", "", "-1"])
def test_what_is_no_layer_is_refused(text):
    with pytest.raises(ConfigError, match="1 to 3"):
        parse_layers(text, 4)


@pytest.mark.parametrize("text", ["1,1", "a", "1;2", "-1", ""])
def test_what_are_no_seeds_is_refused(text):
    with pytest.raises(ConfigError, match="1,2,3"):
        parse_seeds(text)


@pytest.fixture(scope="module")
def swept():
    """The committed results, and copies of one of them as if they were of other layers and seeds."""
    everything = find_results()
    base = next(r for r in without_variants(everything) if r.optional("tail_reader"))

    def variant(name, layer, seed, shift):
        data = copy.deepcopy(base.data)
        data["targets"]["identity"] |= {"layer": layer, "seed": seed}
        data["centered_eval"]["protocols"]["corrected"]["adapter_cen_greedy_mean"] += shift
        return dataclasses.replace(base, profile=f"{base.profile}-{name}", data=data)

    made = [variant("layer6", 6, 1, 0.1), variant("layer9", 9, 1, 0.2), variant("seed2", base.layer, 2, 0.3)]
    return base, without_variants(everything) + made


@pytest.fixture
def no_record(monkeypatch):
    """As if nothing were known of text alone."""
    found = RunResults.optional
    monkeypatch.setattr(RunResults, "optional", lambda self, name: None if name == page.RESULTS else found(self, name))


def test_variants_stand_in_the_tables_of_sweeps_alone(swept, monkeypatch):
    base, everything = swept
    monkeypatch.setattr(appendix, "find_results", lambda roots: everything)
    stems = [t.stem for t in appendix.appendix_page().tables]
    assert f"{base.stem}-seeds" in stems
    assert not [s for s in stems if "layer" in s or "-seed2" in s]
    own = (base.backbone, f"{base.profile}-layer6")
    assert f"{base.stem}-layer6-headline" in [t.stem for t in appendix.appendix_page(own=own).tables]


def test_depth_and_seeds_are_told_apart(swept, no_record):
    base, everything = swept
    (depth,), (by_seed,) = page.depths(everything), seed_groups(everything)
    assert list(depth.runs) == sorted({6, 9, base.layer}) and list(by_seed) == [1, 2]
    assert list(page.depth_table(depth).index) == list(depth.runs)
    row = seeds_table(by_seed).loc["greedy"]
    value = base.column("centered_eval", "corrected")["adapter_cen_greedy_mean"]
    assert row.iloc[-1] == f"{value + 0.15:.3f} ± {0.3 / 2**0.5:.3f}"


def test_the_depth_figure_draws_every_layer(swept, no_record):
    _, everything = swept
    fig = page.figure_7(everything)
    scores, norm, floor = fig.axes
    names = [label for label, *_ in page.TEXT_CURVES] + [page.AV_CURVE.label]
    assert {text.get_text() for text in scores.texts} == set(names)
    assert len(scores.containers) == 1 and len(scores.lines) == len(names)
    drawn = [*scores.lines, *norm.lines, *floor.lines]
    assert all(len(line.get_xdata()) == 3 for line in drawn)
    plt.close(fig)


def test_the_command_runs_each_layer_once_its_targets_are_there(tiny_folders, tmp_path, monkeypatch):
    seen = []

    def run_all(configs, _):
        seen.extend(configs)

    monkeypatch.setattr(notebooks, "reproduce", run_all)
    folder = str(tiny_folders["tiny-llama"])
    command = ["sweep", "--backbone", folder, "--layers", "1,3", "--profile", "smoke", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--device", "cpu", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert [c.layer for c in seen] == [1, None], "3 is this backbone's own layer"
    assert sorted(p.parent.name for p in tmp_path.glob("*/*/targets.safetensors.json")) == ["smoke", "smoke-layer1"]
    refused = CliRunner().invoke(app, [*command[:4], "4", *command[5:]])
    assert refused.exit_code == 2 and "1 to 3" in refused.output


def test_each_run_is_finished_before_the_next_one_begins(tmp_path, monkeypatch):
    said = []

    def preflight(config, _):
        said.append(f"checked {config.seed}")
        return RunFolder(tmp_path / str(config.seed), {"backbone": "gemma3-270m"})

    monkeypatch.setattr(notebooks, "preflight", preflight)
    monkeypatch.setattr(notebooks, "is_cached", lambda *_: False)
    monkeypatch.setattr(notebooks, "run_notebook", lambda config, *_: said.append(f"ran {config.seed}"))
    configs = [RunConfig(seed=seed) for seed in (1, 2)]
    notebooks.reproduce(configs, lambda folder: said.append(f"finished {folder.path.name}"), STAGES[:1])
    assert said == ["checked 1", "checked 2", "ran 1", "finished 1", "ran 2", "finished 2"]


def test_seeds_are_runs_of_their_own(tiny_folders, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(notebooks, "reproduce", lambda configs, *_: seen.extend(configs))
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), "--profile", "smoke", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, [*command, "--seeds", "0,1,2"]).exit_code == 0
    assert [c.folder_name for c in seen] == ["smoke-seed0", "smoke", "smoke-seed2"]
    refused = CliRunner().invoke(app, [*command, "--seeds", "1,1"])
    assert refused.exit_code == 2 and "1,2,3" in refused.output
