"""Variants of training and what is measured of each."""

import dataclasses

import numpy as np
import pytest
from conftest import comparable, with_out

from nla_extensions.training_study import measure, run_itself, shortened, study, study_of, variants
from nla_utils import rows
from nla_utils.errors import ConfigError
from nla_utils.metrics import fve
from nla_utils.training import Recipe, Trainer, greedy_rollouts, tail_pairs
from nla_utils.verbalizer import ActivationVerbalizer


def test_a_recipe_of_one_factor_differs_in_that_factor_alone():
    planned = variants(800, 80, 2.5)
    plain = Recipe(steps=10)
    for variant in (v for v in planned if v.part == "one factor"):
        differing = [
            f.name for f in dataclasses.fields(Recipe) if getattr(variant.recipe, f.name) != getattr(plain, f.name)
        ]
        assert len(differing) == 1
    assert len({v.label for v in planned}) == len(planned)


def test_the_learning_curve_has_all_four_corners_each_measured_at_its_last_step():
    curve = [v for v in variants(800, 80, 2.5) if v.part == "learning curve"]
    corners = {(v.recipe.pairs or 800, v.recipe.steps) for v in curve}
    assert len(curve) == 4 and corners == {(100, 10), (800, 10), (100, 80), (800, 80)}
    assert all(v.recipe == Recipe(pairs=v.recipe.pairs, steps=v.recipe.steps) for v in curve)


def test_short_sources_are_read_where_they_end(gemma_run):
    run, targets = gemma_run
    short = shortened(run, targets, 4)
    assert short.ids.shape[1] == short.lengths.max() == 4 and short.sha256 != targets.sha256
    expected = run.backbone.encode([targets.sequence(5)[:4]], start=True)[0]
    np.testing.assert_allclose(short.v[5], expected, rtol=1e-4, atol=1e-5)


def test_greedy_scores_are_those_of_each_text_with_its_own_and_with_the_other_targets(gemma_run):
    run, targets = gemma_run
    av = ActivationVerbalizer.fresh(run.backbone)
    pairs = tail_pairs(targets, targets.held_out, 8)
    column = measure(run, targets, av, pairs)
    greedy = [ids[:8] for ids in greedy_rollouts(run.backbone, av, targets.v[pairs.rows])]
    h = run.backbone.encode(greedy, start=True)
    m, v = len(h), targets.v[pairs.rows]
    own = [fve(h[i], v[i], targets.mu) for i in range(m)]
    other = [np.mean([fve(h[j], v[i], targets.mu) for j in range(m) if j != i]) for i in range(m)]
    assert column.values[rows.GREEDY.cen] == pytest.approx(np.mean(own), abs=1e-6)
    assert column.values[rows.GREEDY_MINUS_OTHERS.cen] == pytest.approx(np.mean(own) - np.mean(other), abs=1e-6)


def test_a_study_is_made_once_and_read_back(scored_run, tmp_path, monkeypatch):
    run, targets, *_ = scored_run
    apart = with_out(run, tmp_path)
    if not comparable(run, targets):
        with pytest.raises(ConfigError, match="held-out texts have at most"):
            study_of(apart, targets)
        return
    chosen = [v for v in study_of(apart, targets) if v.part == "one factor" or v.tokens]
    few = [dataclasses.replace(v.recipe, steps=min(v.recipe.steps, 3)) for v in chosen]
    chosen = [dataclasses.replace(v, recipe=recipe) for v, recipe in zip(chosen, few)]
    made = study(apart, targets, chosen)
    assert [r["label"] for r in made] == [v.label for v in chosen]
    assert all(r["steps"] >= 1 and np.isfinite(r["loss_last"]) for r in made)
    monkeypatch.setattr(Trainer, "train", None)
    assert study(apart, targets, chosen) == made
    own = run_itself(run, targets)
    assert own["steps"] == run.folder.load("best_av").sidecar["steps"]


def test_what_only_v_tells_apart_is_learned_by_heart_and_read_from_v(gemma_run, tmp_path):
    """The positive control at tiny size: where reading v is easy, this code learns to read it."""
    run, targets = with_out(gemma_run[0], tmp_path), gemma_run[1]
    trainer = Trainer(run, targets, Recipe(pairs=4, steps=300, learning_rate=1e-2, span=1))
    trainer.train()
    column = measure(run, targets, trainer.av, trainer.split.pairs.take(trainer.split.train))
    assert column.values["greedy_is_source"] == 1
    assert column.values[rows.NATS_GAINED[0].key] > 1


def test_what_v_carries_plainly_is_read_from_vectors_never_seen(gemma_run, tmp_path):
    """The positive control held out: sources of four words out of eight, of which the AV is to write the last."""
    run, targets = with_out(gemma_run[0], tmp_path), gemma_run[1]
    words = [i for i in range(len(run.backbone.tokenizer)) if i not in run.backbone.tokenizer.all_special_ids][-8:]
    ids = np.random.default_rng(0).choice(words, size=(len(targets.ids), 4)).astype(targets.ids.dtype)
    v = run.backbone.encode(ids.tolist(), start=True)
    few = dataclasses.replace(targets, ids=ids, lengths=np.full_like(targets.lengths, 4), v=v)
    trained_on = {tuple(few.ids[row]) for row in range(run.sizes.n_train_rows)}
    assert not any(tuple(few.ids[row]) in trained_on for row in few.held_out)
    trainer = Trainer(run, few, Recipe(steps=300, learning_rate=1e-2, span=1))
    trainer.train()
    column = measure(run, few, trainer.av, tail_pairs(few, few.held_out, 1))
    record = column.to_json()
    assert column.values["greedy_is_source"] > 0.8
    assert all(record["ci95"][row.key][0] > 0.5 for row in rows.NATS_GAINED)
    assert record["ci95"][rows.GREEDY_MINUS_OTHERS.cen][0] > 0
