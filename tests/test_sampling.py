"""The sampler against the library's generate and the distribution it should draw from; rows and their streams."""

import dataclasses

import naive
import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from nla_utils.lm import sampling
from nla_utils.lm.backbone import pad
from nla_utils.lm.sampling import SamplingSettings, draw, row_streams, sample, uniforms
from nla_utils.store import MIRROR_VARIABLE, Progress

# From numpy 2.4's Philox, key 1.
FIRST = [0.3035680651664734, 0.8487088084220886, 0.15613478422164917]


def streams(n):
    return row_streams(5, "a test", range(n))


def start(backbone, n):
    return backbone.embed(torch.full((n, 1), backbone.start_id))


def test_greedy_equals_the_librarys_generate(tiny_run):
    backbone = tiny_run[0].backbone
    prompt = torch.tensor([[backbone.start_id, 7, 9]])
    ours = sample(backbone, backbone.embed(prompt), SamplingSettings(16, temperature=0.0), None)
    theirs = backbone.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=list(backbone.eos_ids),
        pad_token_id=backbone.pad_id,
    )[0, 3:]
    assert ours.sequence(0) == theirs.tolist()


@pytest.mark.parametrize(
    "settings", [SamplingSettings(1, 1.0, 10, 1.0), SamplingSettings(1, 0.7, 30, 0.8), SamplingSettings(1, 1.0, 0, 1.0)]
)
def test_draws_follow_the_truncated_distribution(settings):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 2
    n = 20_000
    tokens, logp = draw(logits.expand(n, -1), settings, uniforms(streams(n), 1)[:, 0])
    expected = reference_distribution(logits, settings)
    counts = np.bincount(tokens.numpy(), minlength=40)
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    assert chisquare(counts[kept], n * expected[kept] / expected[kept].sum()).pvalue > 1e-3
    np.testing.assert_allclose(logp.exp().numpy(), expected[tokens.numpy()], rtol=1e-4)


def reference_distribution(logits, s):
    """Temperature, then top-k, then top-p, one token at a time."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    kept = order[: s.top_k or len(order)]
    weight = {i: np.exp(float(logits[i]) / s.temperature) for i in kept}
    total, nucleus, reached = sum(weight.values()), [], 0.0
    for i in kept:
        if reached >= s.top_p:
            break
        nucleus.append(i)
        reached += weight[i] / total
    p = np.zeros(len(logits))
    for i in nucleus:
        p[i] = weight[i] / sum(weight[j] for j in nucleus)
    return p


def test_logprobs_are_those_of_teacher_forcing(tiny_run):
    backbone = tiny_run[0].backbone
    prompt = start(backbone, 3)
    samples = sample(backbone, prompt, SamplingSettings(12), streams(3))
    for i in range(3):
        expected = naive.token_logprobs(backbone.model, prompt[i : i + 1], samples.sequence(i), top_k=50)
        got = samples.logprobs[i, : samples.lengths[i]]
        np.testing.assert_allclose(got, expected, atol=2e-3)
        assert samples.mean_logprob[i] == pytest.approx(np.mean(expected), abs=2e-3)


def test_sequences_end_at_the_first_generated_eos_which_is_kept(tiny_run):
    backbone = tiny_run[0].backbone
    samples = sample(backbone, start(backbone, 200), SamplingSettings(24), streams(200))
    ended = [samples.sequence(i) for i in range(200) if samples.lengths[i] < 24]
    assert ended, "no sequence ended early; the test needs some"
    for s in ended:
        assert s[-1] in backbone.eos_ids and not set(s[:-1]) & set(backbone.eos_ids)
    for i in range(200):
        assert (samples.ids[i, samples.lengths[i] :] == backbone.pad_id).all()
        assert (samples.logprobs[i, samples.lengths[i] :] == 0).all()


def ending_soon(backbone):
    """The backbone with so many EOS tokens that most sequences end within a few tokens."""
    return dataclasses.replace(backbone, eos_ids=tuple(range(3, len(backbone.head_weight), 12)))


def test_a_row_draws_the_same_in_any_company_and_order(tiny_run):
    """At batch 256, 7 and 1, in any order: most rows end early, so finished ones are dropped on the way."""
    backbone, keys, settings = ending_soon(tiny_run[0].backbone), streams(256), SamplingSettings(24)
    whole = sample(backbone, start(backbone, 256), settings, keys)
    assert (whole.lengths < 24).mean() > sampling.DROPPED_SHARE and (whole.lengths == 24).any()
    order = np.random.default_rng(0).permutation(256)
    for size, rows in ((256, order), (7, order), (1, order[:40])):
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            found = sample(backbone, start(backbone, len(part)), settings, keys[part])
            np.testing.assert_array_equal(found.ids, whole.ids[part])
            np.testing.assert_allclose(found.logprobs, whole.logprobs[part], atol=2e-3)


def test_dropping_finished_rows_changes_nothing(tiny_run, monkeypatch):
    backbone, found, widths = ending_soon(tiny_run[0].backbone), [], []
    step = sampling.Decoder.step

    def counted(self, **inputs):
        widths[-1].append(len(next(iter(inputs.values()))))
        return step(self, **inputs)

    monkeypatch.setattr(sampling.Decoder, "step", counted)
    prompts = [[backbone.start_id, *range(11, 11 + i % 5)] for i in range(60)]
    ids, mask = pad(prompts, backbone.pad_id, "left")
    for share in (0.01, 2.0):
        monkeypatch.setattr(sampling, "DROPPED_SHARE", share)
        widths.append([])
        found.append(sample(backbone, backbone.embed(ids), SamplingSettings(24), streams(60), mask))
    assert min(widths[0]) < 30 and set(widths[1]) == {60}
    np.testing.assert_array_equal(found[0].ids, found[1].ids)
    np.testing.assert_allclose(found[0].logprobs, found[1].logprobs, atol=2e-3)
    for i in range(0, 60, 7):
        alone = sample(
            backbone, backbone.embed(torch.tensor([prompts[i]])), SamplingSettings(24), streams(60)[i : i + 1]
        )
        assert alone.sequence(0) == found[0].sequence(i)


def test_streams_are_named_by_seed_stage_target_and_draw():
    keys = row_streams(1, "rollouts", [4, 9], 3)
    assert keys.dtype == np.int64 and keys[3:].tolist() == row_streams(1, "rollouts", [9], 3).tolist()
    assert keys[:2].tolist() == row_streams(1, "rollouts", [4], 2).tolist()
    others = [row_streams(2, "rollouts", [4, 9], 3), row_streams(1, "paraphrases", [4, 9], 3), keys]
    assert len(set(np.concatenate(others).tolist())) == 18


def test_a_stream_is_the_same_on_every_machine():
    """Philox4x64-10's first words for key 1, as numpy's own documentation pins the generator."""
    assert uniforms(np.array([1]), 3)[0].tolist() == uniforms(np.array([5, 1]), 4)[1, :3].tolist() == FIRST


def test_numbers_are_uniform_and_independent_over_positions_and_rows():
    """Neighbouring keys, as no hash would leave them: each position and each row uniform, no two of them dependent."""
    n, steps, cells = 4096, 16, 8
    uniform = uniforms(np.arange(n), steps).numpy()
    assert 0 < uniform.min() and uniform.max() <= 1
    cell = np.minimum((uniform * cells).astype(int), cells - 1)
    p_positions = [chisquare(np.bincount(cell[:, t], minlength=cells)).pvalue for t in range(steps)]
    by_row = uniforms(np.arange(64), 1024).numpy()
    p_rows = [
        chisquare(np.bincount(np.minimum((row * cells).astype(int), 7), minlength=cells)).pvalue for row in by_row
    ]
    p_next = [independent(cell[:, t], cell[:, t + 1]) for t in range(steps - 1)]
    p_beside = [independent(cell[:-1, t], cell[1:, t]) for t in range(steps)]
    for p in (p_positions, p_rows, p_next, p_beside):
        assert min(p) > 1e-3 / len(p)
        # p-values themselves are uniform: no family of them leans to one side.
        assert 0.2 < np.mean(p) < 0.8


def independent(a, b):
    table = np.zeros((8, 8))
    np.add.at(table, (a, b), 1)
    return chi2_contingency(table).pvalue


def test_left_padded_prompts_continue_as_if_alone(tiny_run):
    backbone = tiny_run[0].backbone
    prompts = [[backbone.start_id, 11, 12, 13, 14], [backbone.start_id, 21]]
    ids, mask = pad(prompts, backbone.pad_id, "left")
    greedy = SamplingSettings(10, temperature=0.0)
    together = sample(backbone, backbone.embed(ids), greedy, None, mask)
    for i, p in enumerate(prompts):
        alone = sample(backbone, backbone.embed(torch.tensor([p])), greedy, None)
        assert together.sequence(i) == alone.sequence(0)


def test_a_batch_that_takes_long_shows_its_own_bar(tiny_run, monkeypatch, tmp_path):
    backbone, mirror = tiny_run[0].backbone, tmp_path / "progress"
    monkeypatch.setenv(MIRROR_VARIABLE, str(mirror))
    sample(backbone, start(backbone, 2), SamplingSettings(4), streams(2))
    assert not mirror.exists()
    monkeypatch.setattr(sampling, "Progress", lambda *args, **kwargs: Progress(*args, **(kwargs | {"delay": 0})))
    sample(backbone, start(backbone, 2), SamplingSettings(4), streams(2))
    assert "decoding" in mirror.read_text() and "token/s" in mirror.read_text()
