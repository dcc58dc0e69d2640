"""Nats of the sources' own texts under their own v, another's, μ and no slot."""

import numpy as np
import pytest
import torch

from nla_utils import rows, verbalizer
from nla_utils.encoding import Texts
from nla_utils.evidence import of_losses
from nla_utils.protocol import CORRECTED
from nla_utils.scores import score
from nla_utils.training import pair_loss
from nla_utils.verbalizer import (
    CONDITIONS,
    ActivationVerbalizer,
    make_source_loss,
    published_pairs,
    source_loss,
    v_of_alike,
)


def slow_nats(backbone, inputs_1Sd, ids):
    """−log p of each token by the library's own forward pass and full softmax."""
    whole = torch.cat([inputs_1Sd, backbone.embed(torch.tensor([ids]))], 1)
    with torch.no_grad():
        logits = backbone.model(inputs_embeds=whole).logits[0, inputs_1Sd.shape[1] - 1 : -1].float()
    return -torch.log_softmax(logits, -1)[range(len(ids)), ids].numpy()


def test_each_condition_equals_an_independent_slow_computation(tiny_run):
    run, targets = tiny_run
    backbone, av = run.backbone, ActivationVerbalizer.fresh(run.backbone)
    pairs = Texts.of("source", [4, 9, 2], [[5, 6, 7, 8], [9, 10], [11]])
    found = source_loss(backbone, av, targets, pairs, n_others=2).nats
    v_Md = torch.from_numpy(targets.v[pairs.rows])
    with torch.no_grad():
        own, mean = av(v_Md, backbone.dtype), av(torch.from_numpy(targets.mu)[None], backbone.dtype)
    for i, ids in enumerate(pairs.sequences):
        others = [slow_nats(backbone, own[j : j + 1], ids) for j in range(3) if j != i]
        given = {"own": own[i : i + 1], "mean": mean, "none": own[i : i + 1, 1:]}
        expected = {name: slow_nats(backbone, slot, ids) for name, slot in given.items()}
        expected["other"] = np.mean(others, axis=0)
        for name in CONDITIONS:
            np.testing.assert_allclose(found[name][i, : len(ids)], expected[name], rtol=2e-4, atol=2e-5)
            assert np.isnan(found[name][i, len(ids) :]).all()


def test_targets_whose_source_ends_alike_stand_in_for_each_other(tiny_run):
    run, targets = tiny_run
    backbone, av = run.backbone, ActivationVerbalizer.fresh(run.backbone)
    end, never = targets.sequence(targets.unevaluated[0])[-1], 399
    pairs = Texts.of("source", [0, 1], [[5, 6, end], [5, 6, never]])
    found_Md = v_of_alike(targets, pairs, -1)
    alike = [row for row in targets.unevaluated if targets.sequence(row)[-1] == end][: len(found_Md)]
    nats = source_loss(backbone, av, targets, pairs, 1, alike={"ends_alike": found_Md}).nats["ends_alike"]
    with torch.no_grad():
        slots = av(torch.from_numpy(targets.v[alike]), backbone.dtype)
    expected = np.mean([slow_nats(backbone, slots[i : i + 1], [5, 6, end]) for i in range(len(alike))], axis=0)
    np.testing.assert_allclose(nats[0], expected, rtol=2e-4, atol=2e-5)
    if all(targets.sequence(row)[-1] != never for row in targets.unevaluated):
        assert np.isnan(nats[1]).all()


def test_own_loss_is_what_training_minimises(tiny_run):
    run, targets = tiny_run
    av = ActivationVerbalizer.fresh(run.backbone)
    pairs, _ = published_pairs(run.backbone, targets, np.arange(6), 64)
    own_MT = source_loss(run.backbone, av, targets, pairs, n_others=1).nats["own"]
    trained = pair_loss(run.backbone, av, torch.from_numpy(targets.v[pairs.rows]), pairs.sequences)
    assert np.nanmean(own_MT) == pytest.approx(trained.item(), rel=1e-4)


def test_a_verbalizer_that_cannot_see_v_saves_nothing(tiny_run):
    run, targets = tiny_run
    av = ActivationVerbalizer.fresh(run.backbone)
    torch.nn.init.zeros_(av.proj.weight)
    pairs, _ = published_pairs(run.backbone, targets, targets.held_out, 64)
    column = score(of_losses(source_loss(run.backbone, av, targets, pairs, n_others=3)), CORRECTED, rows.OF_LOSSES)
    for row in rows.NATS_GAINED[:2]:
        assert column.values[row.key] == pytest.approx(0, abs=1e-5)


def test_a_text_that_v_alone_decides_is_read(gemma_run):
    """The measure sees reading where there is some: four texts that only v tells apart."""
    run, targets = gemma_run
    backbone, av = run.backbone, ActivationVerbalizer.fresh(run.backbone)
    chosen, optimizer = [0, 1, 2, 3], torch.optim.Adam(av.parameters(), lr=1e-2)
    texts = [[20 + i] * 3 for i in chosen]
    for _ in range(150):
        optimizer.zero_grad()
        pair_loss(backbone, av, torch.from_numpy(targets.v[chosen]), texts).backward()
        optimizer.step()
    loss = source_loss(backbone, av, targets, Texts.of("source", chosen, texts), n_others=3)
    column = score(of_losses(loss), CORRECTED, rows.OF_LOSSES)
    assert column.values[rows.NATS_GAINED[0].key] > 0.5
    by_position = column.values["nats_by_position"]
    assert by_position["other"][0] - by_position["own"][0] > 0.5


def test_kept_losses_are_those_of_the_trained_verbalizer_and_the_held_out_targets(scored_run, monkeypatch):
    run, targets, _, _ = scored_run
    kept = make_source_loss(run, targets)
    assert set(kept.rows) <= set(targets.held_out)
    monkeypatch.setattr(verbalizer, "load_av", lambda _: pytest.fail("what is on disk needs no verbalizer"))
    again = make_source_loss(run, targets)
    np.testing.assert_array_equal(again.nats["own"], kept.nats["own"])
