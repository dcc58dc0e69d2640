"""The sampler against the library's generate and against the distribution it should draw from."""

import naive
import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from nla_utils.lm import sampling
from nla_utils.lm.sampling import SamplingSettings, draw, pad, sample
from nla_utils.progress import MIRROR_VARIABLE, Progress


def start(backbone, n):
    return backbone.embed(torch.full((n, 1), backbone.start_id))


def test_greedy_equals_the_librarys_generate(tiny_run):
    backbone = tiny_run[0].backbone
    prompt = torch.tensor([[backbone.start_id, 7, 9]])
    ours = sample(backbone, backbone.embed(prompt), SamplingSettings(16, temperature=0.0), seed=0)
    theirs = backbone.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False,
        eos_token_id=list(backbone.eos_ids), pad_token_id=backbone.pad_id,
    )[0, 3:]  # fmt: skip
    assert ours.sequence(0) == theirs.tolist()


@pytest.mark.parametrize("settings", [
    SamplingSettings(1, 1.0, 10, 1.0), SamplingSettings(1, 0.7, 30, 0.8), SamplingSettings(1, 1.0, 0, 1.0),
])  # fmt: skip
def test_draws_follow_the_truncated_distribution(settings):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 2
    n = 20_000
    tokens, logp = draw(logits.expand(n, -1), settings, generator)
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
    samples = sample(backbone, prompt, SamplingSettings(12), seed=3)
    for i in range(3):
        expected = naive.token_logprobs(backbone.model, prompt[i : i + 1], samples.sequence(i), top_k=50)
        got = samples.logprobs[i, : samples.lengths[i]]
        np.testing.assert_allclose(got, expected, atol=2e-3)
        assert samples.mean_logprob[i] == pytest.approx(np.mean(expected), abs=2e-3)


def test_sequences_end_at_the_first_generated_eos_which_is_kept(tiny_run):
    backbone = tiny_run[0].backbone
    samples = sample(backbone, start(backbone, 200), SamplingSettings(24), seed=4)
    ended = [samples.sequence(i) for i in range(200) if samples.lengths[i] < 24]
    assert ended, "no sequence ended early; the test needs some"
    for s in ended:
        assert s[-1] in backbone.eos_ids and not set(s[:-1]) & set(backbone.eos_ids)
    for i in range(200):
        assert (samples.ids[i, samples.lengths[i] :] == backbone.pad_id).all()
        assert (samples.logprobs[i, samples.lengths[i] :] == 0).all()


def test_same_seed_same_samples(tiny_run):
    backbone = tiny_run[0].backbone
    a, b, c = (sample(backbone, start(backbone, 8), SamplingSettings(8), seed=s) for s in (5, 5, 6))
    assert (a.ids == b.ids).all() and (a.ids != c.ids).any()


def test_left_padded_prompts_continue_as_if_alone(tiny_run):
    backbone = tiny_run[0].backbone
    prompts = [[backbone.start_id, 11, 12, 13, 14], [backbone.start_id, 21]]
    ids, mask = pad(prompts, backbone.pad_id, "left")
    greedy = SamplingSettings(10, temperature=0.0)
    together = sample(backbone, backbone.embed(ids), greedy, 0, mask)
    for i, p in enumerate(prompts):
        alone = sample(backbone, backbone.embed(torch.tensor([p])), greedy, 0)
        assert together.sequence(i) == alone.sequence(0)


def test_a_batch_that_takes_long_shows_its_own_bar(tiny_run, monkeypatch, tmp_path):
    backbone, mirror = tiny_run[0].backbone, tmp_path / "progress"
    monkeypatch.setenv(MIRROR_VARIABLE, str(mirror))
    sample(backbone, start(backbone, 2), SamplingSettings(4), seed=0)
    assert not mirror.exists()
    monkeypatch.setattr(sampling, "Progress", lambda *args, **kwargs: Progress(*args, **(kwargs | {"delay": 0})))
    sample(backbone, start(backbone, 2), SamplingSettings(4), seed=0)
    assert "decoding" in mirror.read_text() and "token/s" in mirror.read_text()
