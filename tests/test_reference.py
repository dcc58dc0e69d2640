"""The fast path against the plain one of ``benchmarks/reference.py``: same results, whatever the speed."""

import sys

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency

from nla_utils.config import ROOT
from nla_utils.lm.sampling import SamplingSettings, row_streams, sample
from nla_utils.training import greedy_rollouts, pair_loss
from nla_utils.verbalizer import ActivationVerbalizer

sys.path.insert(0, str(ROOT / "benchmarks"))
import reference  # noqa: E402


def test_encoding_agrees(tiny_run):
    backbone = tiny_run[0].backbone
    ids = torch.randint(3, 200, (20, 12), generator=torch.Generator().manual_seed(0))
    theirs = reference.encode(backbone, ids).numpy()
    np.testing.assert_allclose(backbone.encode(ids.tolist(), start=False), theirs, rtol=1e-4, atol=1e-4)


def test_training_step_agrees(tiny_run):
    run, targets = tiny_run
    ids = torch.randint(3, 200, (4, 9), generator=torch.Generator().manual_seed(1))
    av = ActivationVerbalizer.fresh(run.backbone)
    v = torch.from_numpy(targets.v[:4])
    theirs = reference.train_step(run.backbone, av, v, ids)
    expected = [p.grad.clone() for p in av.parameters()]
    av.zero_grad()
    loss = pair_loss(run.backbone, av, v, ids.tolist())
    loss.backward()
    assert loss.item() == pytest.approx(theirs, rel=1e-5)
    for p, grad in zip(av.parameters(), expected):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-4 * grad.abs().max().item())


def test_greedy_rollouts_are_the_librarys_token_for_token(tiny_run):
    """From ``[proj(v), prefix]``, in float32, where nothing rounds two ways."""
    run, targets = tiny_run
    backbone, av = run.backbone, ActivationVerbalizer.fresh(run.backbone, 24)
    v = targets.v[:12]
    with torch.no_grad():
        prompt_BPd = av(torch.from_numpy(v), backbone.dtype)
        theirs = backbone.model.generate(
            inputs_embeds=prompt_BPd,
            attention_mask=torch.ones(prompt_BPd.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=list(backbone.eos_ids),
            pad_token_id=backbone.pad_id,
        )
    for ours, row in zip(greedy_rollouts(backbone, av, v), theirs.tolist()):
        assert row[: len(ours)] == ours and set(row[len(ours) :]) <= {backbone.pad_id}


def test_samples_come_from_the_librarys_distribution(tiny_run):
    """Second tokens of many sequences, ours against generate's: one table, one chi-square test."""
    backbone = tiny_run[0].backbone
    n = 4000
    start = torch.full((n, 1), backbone.start_id)
    ours = sample(backbone, backbone.embed(start), SamplingSettings(2), row_streams(3, "t", range(n))).ids[:, 1]
    torch.manual_seed(3)
    theirs = backbone.model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        max_new_tokens=2,
        top_k=50,
        eos_token_id=list(backbone.eos_ids),
        pad_token_id=backbone.pad_id,
    )[:, 2].numpy()
    common = [t for t in np.union1d(ours, theirs) if (ours == t).sum() + (theirs == t).sum() >= 20]
    counts = np.array([[(x == t).sum() for t in common] for x in (ours, theirs)])
    rest = n - counts.sum(axis=1)
    assert chi2_contingency(np.column_stack([counts, rest + 1])).pvalue > 1e-3


def test_a_cards_record_has_every_stage(tmp_path, monkeypatch):
    """The whole benchmark, as it runs at Gemma-2-2B's size, on a model of the same architecture that fits a test."""
    import card
    import run
    from transformers import Gemma2Config

    monkeypatch.setattr(run, "ROUNDS", 1)
    shape = Gemma2Config(
        num_hidden_layers=3,
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        vocab_size=300,
        initializer_range=0.3,
        **card.SPECIAL_IDS,
    )
    record = card.measure_run(shape, tmp_path, n_targets=96, n_eval=8, n_rollouts=4, pool_size=48)
    assert record["whole_run"]["seconds"] == sum(record["stage_seconds"].values()) > 0
    assert {s[:2] for s in record["stage_seconds"]} == {"01", "02", "03", "04"}
    for stage in record["stages"]:
        assert stage["ratio"] == stage["ours_tokens_per_s"] / stage["reference_tokens_per_s"]
    assert all(stage["stage"] in run.report(record) for stage in record["stages"])
