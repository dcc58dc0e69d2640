"""Search made into a policy: teachers are the best of what was drawn, held-out targets are never written for."""

import json

import golden
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import comparable, with_out

from nla_extensions.cli import app
from nla_extensions.training_study import best_rollouts, guided_texts, iterate, train_on
from nla_utils import rows
from nla_utils.errors import ConfigError
from nla_utils.lm.sampling import SamplingSettings, row_streams, sample
from nla_utils.metrics import fve
from nla_utils.report.claims import ITERATION, iteration_table
from nla_utils.report.results import RunResults
from nla_utils.training import Trainer, make_split
from nla_utils.verbalizer import load_av, source_loss

ROWS = [3, 11, 40]


@pytest.fixture
def apart(scored_run, tmp_path):
    """The run with a folder of its own that holds its targets and its AV."""
    run, targets, *_ = scored_run
    run = with_out(run, tmp_path)
    for name in ("targets", "best_av"):
        for end in ("", ".json"):
            path = run.folder.file(f"{name}.safetensors{end}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(scored_run[0].folder.file(path.name).read_bytes())
    return run, targets


def test_teachers_are_the_best_of_what_is_drawn(apart):
    run, targets = apart
    av, k = load_av(run), 5
    found = best_rollouts(run, targets, av, ROWS, k, 1)
    with torch.inference_mode():
        prompt = av(torch.from_numpy(targets.v[ROWS]), run.backbone.dtype).repeat_interleave(k, dim=0)
        settings = SamplingSettings(max_new_tokens=run.sizes.max_new_tokens)
        drawn = sample(run.backbone, prompt, settings, row_streams(run.seed, "iteration 1", ROWS, k))
    best = []
    for i, row in enumerate(ROWS):
        texts = [drawn.sequence(i * k + j) for j in range(k)]
        scores = [float(fve(run.backbone.encode([t], start=True)[0], targets.v[row], targets.mu)) for t in texts]
        best.append(max(scores))
        assert found.pairs.sequence(i) == texts[int(np.argmax(scores))]
    assert found.pairs.rows.tolist() == ROWS and found.score == pytest.approx(np.mean(best), abs=1e-5)


def test_guided_teachers_are_tails_of_the_readers_length(apart):
    run, targets = apart
    found = guided_texts(run, targets, ROWS, 4)
    h = run.backbone.encode(found.pairs.sequences, start=True)
    assert len(np.unique(found.pairs.lengths)) == 1
    assert found.score == pytest.approx(fve(h, targets.v[ROWS], targets.mu).mean(), abs=1e-5)


def test_training_makes_the_teachers_texts_likelier_and_leaves_the_start_alone(apart):
    run, targets = apart
    start = load_av(run)
    before = start.trainable()
    teachers = best_rollouts(run, targets, start, ROWS, 2, 1)
    split = make_split(run, targets)
    taught = train_on(run, targets, start, teachers, split.pairs.take(split.validation))
    nats = [
        source_loss(run.backbone, av, targets, teachers.pairs, 1).per_target["own"].mean() for av in (start, taught)
    ]
    assert nats[1] < nats[0]
    for name, tensor in start.trainable().items():
        assert torch.equal(tensor, before[name]) and not torch.equal(tensor, taught.trainable()[name])


def test_no_teacher_writes_for_a_held_out_target(apart, monkeypatch):
    run, targets = apart
    if not comparable(run, targets):
        with pytest.raises(ConfigError, match="held-out texts have at most"):
            iterate(run, targets, n=4, k=2, rounds=1)
        return
    seen = []
    monkeypatch.setattr(Trainer, "train", lambda trainer: seen.extend(trainer.split.pairs.rows))
    iterate(run, targets, n=4, k=2, rounds=1)
    assert seen and not set(seen) & set(targets.held_out.tolist())
    assert set(seen[:4]) <= {make_split(run, targets).pairs.rows[i] for i in make_split(run, targets).train}


def test_the_command_leaves_a_table(apart):
    run, targets = apart
    options = ["--backbone", run.config.backbone, *golden.OPTIONS, "--out", str(run.config.out)]
    said = CliRunner().invoke(app, ["iterate", *options, "--n", "4", "--k", "2", "--rounds", "2"])
    if not comparable(run, targets):
        assert said.exit_code == 2 and "held-out texts have at" in said.output
        return
    assert said.exit_code == 0, said.output
    path = run.folder.file(f"results/{ITERATION}.json")
    record = json.loads(path.read_text())
    labels = [r["label"] for r in record["rounds"]]
    assert labels[:4] == [
        "the run's own AV",
        "round 1: its own best of 2",
        "round 2: its own best of 2",
        "control: the sources again",
    ]
    first, second = record["rounds"][:2]
    assert "teachers_cen" not in first and 0 < second["teachers_cen"] <= 1
    key = rows.GREEDY_MINUS_OTHERS.cen
    assert second[f"{key}_gained"] == pytest.approx(second[key] - first[key], abs=1e-9)
    table = iteration_table(RunResults("tiny", "smoke", {}, path.parent))
    assert list(table.index) == labels and rows.GREEDY.cen in record["rounds"][-1]
