"""What the tail reader owes to each of its parts, and how it grows with N: one change at a time, held out.

The baseline is the reader of notebook 07. Everything is fitted on the same training rows and scored on the same
held-out targets, greedy, behind BOS, centred.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nla_extensions.tail_reader.reader import (
    TailReader,
    best_ridge,
    load_reader,
    read_greedy,
    reader_from,
    solve_reader,
)
from nla_extensions.tail_reader.scores import names_last_token
from nla_extensions.tail_reader.sums import ReaderSums, add_rows, empty_sums, leading
from nla_utils import metrics
from nla_utils.baselines import fit_probe, fit_split, tail_features, token_counts
from nla_utils.lm.backbone import Backbone
from nla_utils.metrics import fve, fve_matrix
from nla_utils.run import Run
from nla_utils.store import Progress
from nla_utils.targets import Targets
from nla_utils.training import Recipe, Trainer, greedy_rollouts

SHARES = (8, 4, 2, 1)
Part = tuple[Targets, np.ndarray]
BEAMS = 4
SHORTLIST = 16
# Targets whose candidates are scored together.
TARGETS_TOGETHER = 16
LANGUAGE_WEIGHTS = (0.5, 1.0)
LENGTHS = (1, 2, 4)
LAST_ONLY_LENGTH = 2
ADAPTER_SPAN = 8


def grow(run: Run, targets: Targets, n: int, more: Sequence[Part]) -> Iterator[tuple[list[Part], ReaderSums]]:
    """The parts that count so far, and the sums over them: the same object, with every step holding more."""
    train, _ = fit_split(run, targets)
    edges = [0, *(len(train) // share for share in SHARES)]
    steps = [(targets, train[a:b]) for a, b in pairwise(edges)] + list(more)
    sums = empty_sums(run.backbone, *steps[0], n)
    for i, part in enumerate(steps, start=1):
        yield steps[:i], add_rows(sums, run.backbone, *part)


def score_size(
    run: Run, targets: Targets, parts: Sequence[Part], sums: ReaderSums, score: Callable[[list[list[int]]], dict]
) -> dict:
    """``{"train_rows", "reader", "probe", "retrieval"}`` with the sequences of some parts.

    ``score`` scores texts of the held-out targets. Retrieval is from the very sequences that the others are fitted on.
    """
    backbone, (_, validation) = run.backbone, fit_split(run, targets)
    v_Md = targets.v[targets.held_out]
    reader = reader_from(best_ridge(backbone, sums, targets, validation)[0], backbone)
    probe, _ = fit_probe(backbone, parts, targets, validation, sums.n)
    nearest_M = np.max([fve_matrix(v_Md, own.v[rows], targets.mu).max(axis=1) for own, rows in parts], axis=0)
    return {
        "train_rows": sum(len(rows) for _, rows in parts),
        "reader": score(read_greedy(reader, torch.from_numpy(v_Md).to(backbone.device)).tolist()),
        "probe": score(probe.decode(v_Md, sums.n).tolist()),
        "retrieval": {"mean": float(nearest_M.mean()), "ci95": metrics.ci95(nearest_M)},
    }


@torch.inference_mode()
def read_with_language_model(reader: TailReader, backbone: Backbone, v_Md: Tensor, weight: float) -> Tensor:
    """The best tail of each target by reader and language model together (M, n), in reading order.

    Args:
        weight: λ, of the language model's log-probability.
    """
    parts = v_Md.split(TARGETS_TOGETHER)
    return torch.cat([_beam_search(reader, backbone, part, weight) for part in Progress(parts, desc="noisy channel")])


def _beam_search(reader: TailReader, backbone: Backbone, v_Md: Tensor, weight: float) -> Tensor:
    m, d = v_Md.shape
    residual_MBd = reader.first_residual(v_Md)[:, None]
    ids_MBj = torch.zeros(m, 1, 0, dtype=torch.long, device=v_Md.device)
    channel_MB = torch.zeros(m, 1, device=v_Md.device)
    language_MB = torch.zeros(m, 1, device=v_Md.device)
    for j in range(reader.n):
        token, rough = reader.candidates(j, residual_MBd.flatten(0, 1), SHORTLIST)
        rough = rough.view(m, -1, token.shape[1]) + (channel_MB + weight * language_MB)[:, :, None]
        top = rough.flatten(1).topk(min(SHORTLIST, rough[0].numel()))
        beam, token = top.indices // token.shape[1], token.view(m, -1).gather(1, top.indices)
        ids = torch.cat([token[:, :, None], _of_beam(ids_MBj, beam)], dim=2)
        channel = top.values - reader.log_prior_V[token] - weight * language_MB.gather(1, beam)
        language = _log_probability(backbone, ids.flatten(0, 1)).view(m, -1)
        keep = (channel + weight * language).topk(min(BEAMS, ids.shape[1])).indices
        ids_MBj = _of_beam(ids, keep)
        channel_MB, language_MB = channel.gather(1, keep), language.gather(1, keep)
        explained = reader.explained(j, ids_MBj[:, :, 0].flatten()).view(m, -1, d)
        residual_MBd = _of_beam(residual_MBd, beam.gather(1, keep)) - explained
    return ids_MBj[:, 0].cpu()


def _of_beam(x_MBz: Tensor, beam_MC: Tensor) -> Tensor:
    """Rows of the chosen beams (M, C, z)."""
    return x_MBz.gather(1, beam_MC[:, :, None].expand(-1, -1, x_MBz.shape[2]))


def _log_probability(backbone: Backbone, ids_Bj: Tensor) -> Tensor:
    """log p of each text behind the start token (B,)."""
    start_B1 = torch.full((len(ids_Bj), 1), backbone.start_id, device=ids_Bj.device)
    inputs_Bj = torch.cat([start_B1, ids_Bj[:, :-1]], dim=1)
    hidden_Bjd = backbone.last_hidden(input_ids=inputs_Bj)
    logp = backbone.logprobs(hidden_Bjd.flatten(0, 1), ids_Bj.flatten())
    return logp.view(ids_Bj.shape).sum(dim=1)


def ablate_reader(run: Run, targets: Targets, more: Sequence[Part] = ()) -> dict:
    """``{"rows": [...], "scaling": [...]}``: every variant's mean with interval, and its paired difference from
    the baseline; ``scaling`` by training sequences, with ``more`` of them after the run's own."""
    backbone, reader = run.backbone, load_reader(run)
    trials = run.folder.load("reader").sidecar["trials"]
    ridge = max(trials, key=lambda t: t["fve_nrm_cen"])["ridge"]
    v_Md = torch.from_numpy(targets.v[targets.held_out]).to(backbone.device)
    score = _Scorer(backbone, targets)
    score("baseline: all positions, joint, whitened, unigram prior", read_greedy(reader, v_Md))
    for name, changed in _without_refit(reader).items():
        score(name, read_greedy(changed, v_Md))
    score("each position read apart", _read_apart(reader, v_Md))
    for weight in LANGUAGE_WEIGHTS:
        score(f"language model as prior, λ = {weight:g}", read_with_language_model(reader, backbone, v_Md, weight))
    scaling = []
    for parts, sums in grow(run, targets, reader.n, more):
        scaling.append(score_size(run, targets, parts, sums, score.of))
        if len(parts) == len(SHARES):
            for n in LENGTHS:
                score(f"n = {n}", read_greedy(_solved(backbone, leading(sums, n), ridge), v_Md))
    few = _solved(backbone, _last_positions(run, targets), ridge)
    score(f"n = {LAST_ONLY_LENGTH}, last positions only", read_greedy(few, v_Md))
    score(f"trained adapter, last {ADAPTER_SPAN} tokens", _adapter_texts(run, targets))
    return {"n": len(v_Md), "tail_tokens": reader.n, "ridge": ridge, "rows": score.rows, "scaling": scaling}


def _adapter_texts(run: Run, targets: Targets) -> list[list[int]]:
    """Greedy texts of the paper's AV when it is trained, as long as the run's, to write the end of the source alone."""
    trainer = Trainer(run.inside("adapter"), targets, Recipe(span=ADAPTER_SPAN))
    trainer.train()
    trainer.av.load_trainable(trainer.best, "best step")
    return greedy_rollouts(run.backbone, trainer.av, targets.v[targets.held_out])


class _Scorer:
    """Scores texts of the held-out targets; the first one named is the baseline of all differences."""

    def __init__(self, backbone: Backbone, targets: Targets):
        self.backbone, self.targets = backbone, targets
        self.rows: list[dict] = []

    def of(self, texts: Tensor | list[list[int]]) -> dict:
        v, sources = self.targets.v[self.targets.held_out], self.targets.sequences(self.targets.held_out)
        texts = texts.tolist() if isinstance(texts, Tensor) else texts
        self.last = fve(self.backbone.encode(texts, start=True), v, self.targets.mu)
        hits = float(names_last_token(texts, sources).mean())
        return {"mean": float(self.last.mean()), "ci95": metrics.ci95(self.last), "names_last_token": hits}

    def __call__(self, name: str, texts: Tensor | list[list[int]]) -> None:
        record = self.of(texts)
        if not self.rows:
            self.baseline = self.last
        gap = self.last - self.baseline
        self.rows.append(
            {"variant": name, **record, "minus_baseline": float(gap.mean()), "minus_baseline_ci95": metrics.ci95(gap)}
        )


def _without_refit(reader: TailReader) -> dict[str, TailReader]:
    none = torch.where(reader.log_prior_V < -1e8, reader.log_prior_V, 0.0)
    twice = reader.log_prior_V * 2
    return {
        "no prior": dataclasses.replace(reader, log_prior_V=none),
        "unigram prior twice": dataclasses.replace(reader, log_prior_V=twice),
        "not whitened": _unwhitened(reader),
    }


def _unwhitened(reader: TailReader) -> TailReader:
    """The same A_j with Σ = σ² I, σ² the mean residual variance."""
    unwhiten_dd = torch.linalg.inv(reader.whiten_dd)
    sigma = unwhiten_dd.square().sum() / len(unwhiten_dd)
    weights = reader.weights_nad @ unwhiten_dd.T / sigma.sqrt()
    scale = torch.eye(len(unwhiten_dd), device=weights.device) / sigma.sqrt()
    return dataclasses.replace(reader.with_weights(weights), whiten_dd=scale)


@torch.inference_mode()
def _read_apart(reader: TailReader, v_Md: Tensor) -> Tensor:
    """Every position from the whole of v: what is explained by a later token is not taken out."""
    residual_Md = reader.first_residual(v_Md)
    return torch.cat([reader.candidates(j, residual_Md, 1)[0] for j in reversed(range(reader.n))], dim=1).cpu()


@torch.inference_mode()
def _last_positions(run: Run, targets: Targets) -> ReaderSums:
    """Sums over the training targets themselves, one activation a sequence, as the probe is fitted."""
    # One vector a sequence cannot carry more: n · d has to stay below the number of sequences.
    backbone, n, (train, _) = run.backbone, LAST_ONLY_LENGTH, fit_split(run, targets)
    sums, table_Vd = empty_sums(backbone, targets, train, n), backbone.embedding_table()
    sums.counts_V += token_counts(targets, train, table_Vd)
    ids_nj = tail_features(targets.ids, train, targets.lengths[train], n, backbone.start_id)
    v_nd = torch.from_numpy(targets.v[train]).to(backbone.device)
    sums.equations.add(sums.features(table_Vd, torch.from_numpy(ids_nj)), v_nd - sums.mean_d)
    return sums


def _solved(backbone: Backbone, sums: ReaderSums, ridge: float) -> TailReader:
    return reader_from(solve_reader(backbone, sums, ridge), backbone)
