"""What the tail reader owes to each of its parts, and how it grows with N: one change at a time, held out.

The baseline is the reader of notebook 02. Everything is fitted on the same training rows and scored on the
same held-out targets, greedy, behind BOS, centred.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.metrics import fve
from nla_utils.noisy_channel import read_with_language_model
from nla_utils.reader import TailReader, load_reader, read_greedy, reader_from, reader_split, solve_reader
from nla_utils.reader_scaling import SHARES, grow, score_size
from nla_utils.reader_sums import ReaderSums, embedding_table, empty_sums, leading, tail_features, token_counts
from nla_utils.store import RunFolder
from nla_utils.targets import Targets
from nla_utils.training import Trainer
from nla_utils.validation import greedy_rollouts

LANGUAGE_WEIGHTS = (0.5, 1.0)
LENGTHS = (1, 2, 4)
LAST_ONLY_LENGTH = 2
ADAPTER_SPAN = 8


def ablate_reader(
    run: RunConfig, backbone: Backbone, targets: Targets, folder: RunFolder,
    more: Sequence[tuple[Targets, np.ndarray]] = (),
) -> dict:  # fmt: skip
    """``{"rows": [...], "scaling": [...]}``: every variant's mean with interval, and its paired difference from
    the baseline; ``scaling`` by training sequences, with ``more`` of them after the run's own."""
    sidecar = folder.load("reader").sidecar
    ridge = max(sidecar["trials"], key=lambda t: t["fve_nrm_cen"])["ridge"]
    reader, v_Md = load_reader(backbone, folder), torch.from_numpy(targets.v[targets.held_out]).to(backbone.device)
    score = _Scorer(backbone, targets)
    score("baseline: all positions, joint, whitened, unigram prior", read_greedy(reader, v_Md))
    for name, changed in _without_refit(reader).items():
        score(name, read_greedy(changed, v_Md))
    score("each position read apart", _read_apart(reader, v_Md))
    for weight in LANGUAGE_WEIGHTS:
        score(f"language model as prior, λ = {weight:g}", read_with_language_model(reader, backbone, v_Md, weight))
    scaling = []
    for parts, sums in grow(run, backbone, targets, reader.n, more):
        scaling.append(score_size(run, backbone, targets, parts, sums, score.of))
        if len(parts) == len(SHARES):
            for n in LENGTHS:
                score(f"n = {n}", read_greedy(_solved(backbone, leading(sums, n), ridge), v_Md))
    few = _solved(backbone, _last_positions(run, backbone, targets), ridge)
    score(f"n = {LAST_ONLY_LENGTH}, last positions only", read_greedy(few, v_Md))
    score(f"trained adapter, last {ADAPTER_SPAN} tokens", _adapter_texts(run, backbone, targets, folder))
    return {"n": len(v_Md), "tail_tokens": reader.n, "ridge": ridge, "rows": score.rows, "scaling": scaling}


def _adapter_texts(run: RunConfig, backbone: Backbone, targets: Targets, folder: RunFolder) -> list[list[int]]:
    """Greedy texts of the paper's AV when it is trained, as long as the run's, to write the end of the source alone."""
    config = dataclasses.replace(run, target_span=f"last:{ADAPTER_SPAN}")
    trainer = Trainer(config, backbone, targets, RunFolder(folder.file("adapter"), folder.identity))
    trainer.train()
    trainer.av.load_trainable(trainer.best, "best step")
    return greedy_rollouts(backbone, trainer.av, targets.v[targets.held_out], config.text_length)


class _Scorer:
    """Scores texts of the held-out targets; the first one named is the baseline of all differences."""

    def __init__(self, backbone: Backbone, targets: Targets):
        self.backbone, self.targets = backbone, targets
        self.rows: list[dict] = []

    def of(self, texts: Tensor | list[list[int]]) -> dict:
        v, sources = self.targets.v[self.targets.held_out], self.targets.sequences(self.targets.held_out)
        texts = texts.tolist() if isinstance(texts, Tensor) else texts
        self.last = fve(self.backbone.encode(texts, start=True), v, self.targets.mu)
        hits = float(np.mean([t[-1] == s[-1] for t, s in zip(texts, sources)]))
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
def _last_positions(run: RunConfig, backbone: Backbone, targets: Targets) -> ReaderSums:
    """Sums over the training targets themselves, one activation a sequence, as the probe is fitted."""
    # One vector a sequence cannot carry more: n · d has to stay below the number of sequences.
    n, (train, _) = LAST_ONLY_LENGTH, reader_split(run, targets)
    sums, table_Vd = empty_sums(backbone, targets, train, n), embedding_table(backbone)
    sums.counts_V += token_counts(targets, train, table_Vd)
    ids_nj = tail_features(targets.ids, train, targets.lengths[train], n, backbone.start_id)
    v_nd = torch.from_numpy(targets.v[train]).to(backbone.device)
    sums.equations.add(sums.features(table_Vd, torch.from_numpy(ids_nj)), v_nd - sums.mean_d)
    return sums


def _solved(backbone: Backbone, sums: ReaderSums, ridge: float) -> TailReader:
    return reader_from(solve_reader(backbone, sums, ridge), backbone)
