"""The tail reader and the probe."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import with_out

from nla_extensions.depth.measure import extract_layers
from nla_extensions.tail_reader import reader as readers
from nla_extensions.tail_reader.page import seeds_table
from nla_extensions.tail_reader.reader import (
    TailReader,
    add_rows,
    empty_sums,
    every_position,
    fit_reader,
    fit_readers,
    half_norms,
    load_reader,
    read_greedy,
    read_tails,
    solve_reader,
    sums_at_layers,
)
from nla_extensions.tail_reader.study import ablate_reader, read_with_language_model, replicate
from nla_utils.baselines import fit_probe, fit_split, make_probe, nearest_tokens, tail_features
from nla_utils.config import PROBE_LENGTHS
from nla_utils.encoding import nats_per_token
from nla_utils.lm.sampling import row_streams
from nla_utils.metrics import fve
from nla_utils.targets import load_targets


def test_tail_features_stand_backwards_and_are_padded_by_the_start_token():
    ids = np.array([[5, 6, 7, 0], [8, 9, 0, 0]])
    got = tail_features(ids, np.array([0, 1, 0]), np.array([3, 2, 1]), 3, start_id=2)
    np.testing.assert_array_equal(got, [[7, 6, 5], [9, 8, 2], [5, 2, 2]])


def accumulate(backbone, targets, rows, n):
    return sums_at_layers(backbone, {backbone.layer: targets}, rows, n)[backbone.layer]


def planted(n=3, d=24, vocabulary=40, noise=0.05, seed=3):
    """Targets that are exactly linear in their last n embeddings, and the reader that knows it."""
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(vocabulary, d, generator=g)
    weights = torch.randn(n, d, d, generator=g) / d**0.5 * torch.tensor([1.0, 0.7, 0.5])[:n, None, None]
    ids = torch.randint(0, vocabulary, (50, n), generator=g)
    mean = table.mean(0)
    v = sum((table[ids[:, n - 1 - j]] - mean) @ weights[j] for j in range(n))
    v = v + noise * torch.randn(v.shape, generator=g) + 4.0
    whiten = torch.eye(d) / noise
    scaled = weights @ whiten.T
    reader = TailReader(
        scaled,
        whiten,
        torch.full((d,), 4.0),
        mean,
        torch.zeros(vocabulary),
        half_norms(table, scaled, mean),
        torch.zeros(vocabulary, dtype=torch.bool),
        table,
    )
    return reader, v, ids


def test_the_last_token_of_a_planted_text_is_found():
    reader, v, ids = planted(n=1)
    assert (read_greedy(reader, v) == ids).float().mean() > 0.98


def test_first_step_is_the_exact_posterior():
    """Candidates' scores are log N(v; μ + A(e − ē), Σ) + prior, up to a constant of each row."""
    reader, v, _ = planted(n=3)
    ids, scores = reader.candidates(0, reader.first_residual(v), 40)
    predicted = (reader.table_Vd - reader.embedding_mean_d) @ reader.weights_nad[0]
    exact = -0.5 * torch.cdist(reader.first_residual(v).double(), predicted.double()) ** 2
    difference = scores - exact.gather(1, ids).float()
    assert (difference.max(1).values - difference.min(1).values).max() < 0.5
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_draws_follow_the_posterior():
    reader, v, _ = planted(n=1, noise=1.5)
    ids, scores = reader.candidates(0, reader.first_residual(v[:1]), 50)
    p = torch.softmax(scores[0], 0).double()
    n = 20_000
    drawn, _ = read_tails(reader, v[:1], n, row_streams(5, "t", [0], n + 1))
    counts = torch.bincount(drawn[0, 1:, 0], minlength=40)[ids[0]].double()
    keep = n * p > 5
    chi2 = (((counts - n * p) ** 2) / (n * p))[keep].sum()
    assert chi2 < keep.sum() + 5 * (2 * keep.sum()) ** 0.5


def test_every_position_is_the_activation_of_the_prefix(tiny_run):
    run, targets = tiny_run
    rows = np.array([3, 7])
    (v,), row, position = every_position(run.backbone, targets, rows, [run.backbone.layer])
    prefixes = [targets.sequence(r)[:p] for r, p in zip(row, position)]
    np.testing.assert_allclose(v.numpy(), run.backbone.encode(prefixes, start=True), atol=2e-4)
    np.testing.assert_allclose(v.numpy()[position == targets.lengths[row]], targets.v[rows], atol=2e-4)


def test_held_out_targets_are_in_no_part_of_the_reader(tiny_run):
    run, targets = tiny_run
    train, validation = fit_split(run, targets)
    assert not set(train) & set(validation)
    assert not (set(train) | set(validation)) & set(targets.held_out)


def test_fitted_reader_is_kept_and_reads_the_same(tiny_run, tmp_path):
    run, targets = tiny_run
    fitted = fit_reader(run, targets)
    v = torch.from_numpy(targets.v[targets.held_out])
    text = read_greedy(fitted, v)
    assert text.shape == (len(v), fitted.n)
    assert torch.equal(text, read_greedy(load_reader(run), v))
    ends = torch.isin(text[:, :-1], torch.tensor(run.backbone.eos_ids))
    assert not ends.any(), "EOS stands before the end"


def test_readers_of_several_layers_are_those_of_each_alone(tiny_run, tmp_path):
    run = with_out(tiny_run[0], tmp_path)
    extract_layers(run, [1, 3])
    at = [(own, load_targets(own)) for own in map(run.at, (1, 3))]
    alone = []
    for own, targets in at:
        apart = dataclasses.replace(
            own, folder=dataclasses.replace(own.folder, path=tmp_path / f"{own.backbone.layer}")
        )
        apart.folder.save("targets", own.folder.load("targets").tensors)
        fit_reader(apart, targets)
        alone.append(apart.folder.load("reader"))
    fit_readers(at)
    for (own, _), apart in zip(at, alone):
        together = own.folder.load("reader")
        scores = [[t["fve_nrm_cen"] for t in a.sidecar["trials"]] for a in (together, apart)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
        assert together.sidecar["train_positions"] == apart.sidecar["train_positions"]
        for name, expected in apart.tensors.items():
            np.testing.assert_allclose(together.tensors[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


def test_chunks_of_the_fit_do_not_matter(gemma_run, monkeypatch):
    run, targets = gemma_run
    rows = np.arange(30)
    solved = []
    for size in (16384, 60):
        monkeypatch.setattr(readers, "FIT_TOKENS", size)
        solved.append(solve_reader(run.backbone, accumulate(run.backbone, targets, rows, 2), 1e-2))
    for name in solved[0]:
        np.testing.assert_allclose(solved[0][name], solved[1][name], rtol=1e-2, atol=1e-2, err_msg=name)


def test_nearest_tokens_is_the_largest_centred_cosine():
    g = torch.Generator().manual_seed(2)
    table, guess = torch.randn(60, 8, generator=g), torch.randn(9, 8, generator=g)
    mean = table.mean(0)
    centred = table - mean
    cosine = guess @ (centred / centred.norm(dim=1, keepdim=True)).T
    np.testing.assert_array_equal(nearest_tokens(table, mean, guess), cosine.argmax(1))


def test_probe_writes_as_many_tokens_as_the_reader(tiny_run):
    run, targets = tiny_run
    probe = make_probe(run, targets)
    assert probe.ids.shape == (2 * len(targets.held_out), len(PROBE_LENGTHS), 8)
    assert probe.h.keys() == {"corrected", "published"}
    assert probe.ids.min() >= 0 and probe.ids.max() < len(run.backbone.embedding_table())
    assert len(run.folder.load("probe").sidecar["trials"]) > 1


@pytest.mark.parametrize("noise", [0.05, 3.0])
def test_logp_is_the_mean_over_tokens_of_what_was_drawn(noise):
    reader, v, _ = planted(n=2, noise=noise)
    ids, logp = (x[:, 1] for x in read_tails(reader, v, 1, row_streams(1, "t", range(len(v)), 2)))
    residual, total = reader.first_residual(v), torch.zeros(len(v))
    for j in range(2):
        candidates, scores = reader.candidates(j, residual, 50)
        token = ids[:, 1 - j]
        log_p = torch.log_softmax(scores, 1)
        total += (log_p * (candidates == token[:, None])).sum(1)
        residual = residual - reader.explained(j, token)
    torch.testing.assert_close(logp, total / 2, atol=1e-4, rtol=1e-4)


def test_language_model_prior_of_weight_zero_finds_the_likeliest_tail_by_the_channel_alone(tiny_run):
    """With a beam, the channel's score of the text found is at least that of the greedy one."""
    run, targets = tiny_run
    reader = fit_reader(run, targets)
    flat = dataclasses.replace(reader, log_prior_V=torch.zeros_like(reader.log_prior_V))
    v = torch.from_numpy(targets.v[targets.held_out])

    def channel(ids):
        residual = flat.first_residual(v)
        for j in range(flat.n):
            residual = residual - flat.explained(j, ids[:, flat.n - 1 - j])
        return -0.5 * residual.square().sum(1)

    found = read_with_language_model(flat, run.backbone, v, 0.0)
    assert found.shape == (len(v), flat.n)
    assert channel(found).mean() >= channel(read_greedy(flat, v)).mean() - 1e-3


def test_a_heavy_language_prior_gives_likelier_text(tiny_run):
    run, targets = tiny_run
    reader = fit_reader(run, targets)
    v = torch.from_numpy(targets.v[targets.held_out])
    texts = [read_with_language_model(reader, run.backbone, v, w) for w in (0.0, 50.0)]
    light, heavy = (nats_per_token(run.backbone, t.tolist()).mean() for t in texts)
    assert heavy < light


def test_ablation_names_every_variant_and_its_difference(tiny_run):
    run, targets = tiny_run
    fit_reader(run, targets)
    record, made_from = ablate_reader(run, targets, [2])
    assert list(made_from) == ["targets", "reader", "targets of seed 2"]
    names = [r["variant"] for r in record["rows"]]
    assert len(set(names)) == len(names) > 8
    assert record["rows"][0]["minus_baseline"] == 0
    for row in record["rows"]:
        assert row["minus_baseline"] == pytest.approx(row["mean"] - record["rows"][0]["mean"])
    train = len(fit_split(run, targets)[0])
    assert [s["train_rows"] for s in record["scaling"]] == [train // 8, train // 4, train // 2, train, 2 * train]
    nearest = [s["retrieval"]["mean"] for s in record["scaling"]]
    assert nearest == sorted(nearest), "more texts to look up in cannot be worse"


def test_a_reader_grown_part_by_part_is_the_one_fitted_at_once(gemma_run):
    run, targets = gemma_run
    train, _ = fit_split(run, targets)
    sums = empty_sums(run.backbone, targets, train, 2)
    for part in (train[:20], train[20:]):
        add_rows({run.backbone.layer: sums}, run.backbone, targets, part)
    whole = solve_reader(run.backbone, accumulate(run.backbone, targets, train, 2), 1e-2)
    grown = solve_reader(run.backbone, sums, 1e-2)
    for name in whole:
        np.testing.assert_allclose(grown[name], whole[name], rtol=1e-2, atol=1e-2, err_msg=name)


def test_a_probe_fitted_on_parts_is_the_one_fitted_at_once(gemma_run):
    run, targets = gemma_run
    train, validation = fit_split(run, targets)
    parts = [(targets, train[:20]), (targets, train[20:])]
    one, two = (fit_probe(run.backbone, p, targets, validation, 4)[1] for p in (parts, [(targets, train)]))
    assert one == two


def test_a_short_readers_sums_are_part_of_a_long_ones(gemma_run):
    run, targets = gemma_run
    train, _ = fit_split(run, targets)
    part = solve_reader(run.backbone, accumulate(run.backbone, targets, train, 4).leading(2), 1e-2)
    own = solve_reader(run.backbone, accumulate(run.backbone, targets, train, 2), 1e-2)
    for name in own:
        np.testing.assert_allclose(part[name], own[name], rtol=1e-4, atol=1e-4, err_msg=name)


def test_seeds_are_repeated_from_targets_on_and_share_nothing(tiny_run):
    run, targets = tiny_run
    record, made_from = replicate(run, [1, 2])
    assert made_from["targets of seed 1"] == targets.sha256 != made_from["targets of seed 2"]
    first, second = record["seeds"]["1"], record["seeds"]["2"]
    assert first["greedy"] != second["greedy"]
    mean, sd = (first["greedy"] + second["greedy"]) / 2, abs(first["greedy"] - second["greedy"]) / 2**0.5
    assert seeds_table(record).loc["greedy", "over seeds, mean ± sd"] == f"{mean:.3f} ± {sd:.3f}"
    v = torch.from_numpy(targets.v[targets.held_out])
    h = run.backbone.encode(read_greedy(load_reader(run), v).tolist(), start=True)
    assert first["greedy"] == pytest.approx(fve(h, v.numpy(), targets.mu).mean(), abs=1e-5)
    assert first["bestofK_minus_tail_oracle_4"] == pytest.approx(first["bestofK"] - first["tail_oracle_4"])
    assert set(seeds_table(record).columns) == {"seed 1", "seed 2", "over seeds, mean ± sd"}
