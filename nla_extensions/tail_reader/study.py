"""What the tail reader owes to each of its parts, how it grows with N, and its claims on targets drawn anew.

``nla ablate`` changes one thing at a time from the reader of notebook 07. Everything is fitted on the same training
rows and scored on the same held-out targets, greedy, behind BOS, centred. ``nla replicate`` draws new targets for each
seed.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from nla_extensions.tail_reader import reader as readers
from nla_extensions.tail_reader.reader import ReaderSums, TailReader, read_greedy, reader_from, solve_reader
from nla_extensions.tail_reader.rollouts import GuidedSearch, tails_spec, write_tails
from nla_extensions.tail_reader.scores import names_last_token
from nla_utils import metrics
from nla_utils.baselines import fit_probe, fit_split, tail_features, token_counts
from nla_utils.encoding import Texts, nats_per_token
from nla_utils.evidence import Scorer
from nla_utils.lm.backbone import Backbone
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import CORRECTED
from nla_utils.run import Run
from nla_utils.scores import Column
from nla_utils.store import SPECS, Artefact, Progress
from nla_utils.targets import Targets, make_targets
from nla_utils.training import Recipe, Trainer, greedy_rollouts

SHARES = (8, 4, 2, 1)
BEAMS = 4
SHORTLIST = 16
# Targets whose candidates are scored together.
TARGETS_TOGETHER = 16
LANGUAGE_WEIGHTS = (0.5, 1.0)
LENGTHS = (1, 2, 4)
LAST_ONLY_LENGTH = 2
ADAPTER_SPAN = 8
CLAIMS = "claims"
# The paper's K, at every profile: a tail costs a fourteenth of an AV's text.
DRAWS = 64
ORACLES = (4, 8)
SPECS[CLAIMS] = lambda config: tails_spec(config, DRAWS)
# Targets, and the rows of them that count.
Part = tuple[Targets, np.ndarray]


def with_seed(run: Run, seed: int) -> Run:
    """The run with another seed, in that seed's own folder."""
    return Run.of(dataclasses.replace(run.config, seed=seed), run.backbone)


def ablate_reader(run: Run, targets: Targets, seeds: Sequence[int] = ()) -> tuple[dict, dict[str, str]]:
    """(``{"rows": [...], "scaling": [...]}``, hashes of what it was made from): every variant's mean with interval and
    its paired difference from the baseline, the first; ``scaling`` by training sequences, with those of other ``seeds``
    after the run's own."""
    backbone, reader, v_Md = run.backbone, readers.load_reader(run), targets.v[targets.held_out]
    ridge = max(readers.describe(run)["trials"], key=lambda t: t["fve_nrm_cen"])["ridge"]
    made_from = {"targets": targets.sha256, readers.ARTEFACT: run.folder.sha256_of(readers.ARTEFACT)}
    more = []
    for own in (with_seed(run, seed) for seed in seeds):
        theirs = make_targets(own)
        more.append((theirs, fit_split(own, theirs)[0]))
        made_from[f"targets of seed {own.seed}"] = theirs.sha256
    none = torch.where(reader.log_prior_V < -1e8, reader.log_prior_V, 0.0)
    changed = {
        "baseline: all positions, joint, whitened, unigram prior": reader,
        "no prior": dataclasses.replace(reader, log_prior_V=none),
        "unigram prior twice": dataclasses.replace(reader, log_prior_V=reader.log_prior_V * 2),
        "not whitened": _unwhitened(reader),
    }
    texts = {name: read_greedy(own, v_Md).tolist() for name, own in changed.items()}
    texts["each position read apart"] = _read_apart(reader, v_Md).tolist()
    for weight in LANGUAGE_WEIGHTS:
        found = read_with_language_model(reader, backbone, v_Md, weight)
        texts[f"language model as prior, λ = {weight:g}"] = found.tolist()
    scaling = []
    for parts, sums in grow(run, targets, reader.n, more):
        scaling.append(score_size(run, targets, parts, sums))
        if len(parts) == len(SHARES):
            for n in LENGTHS:
                short = reader_from(solve_reader(backbone, sums.leading(n), ridge), backbone)
                texts[f"n = {n}"] = read_greedy(short, v_Md).tolist()
    few = reader_from(solve_reader(backbone, _last_positions(run, targets), ridge), backbone)
    texts[f"n = {LAST_ONLY_LENGTH}, last positions only"] = read_greedy(few, v_Md).tolist()
    texts[f"trained adapter, last {ADAPTER_SPAN} tokens"] = _adapter_texts(run, targets)
    scored = {name: _score(backbone, targets, ids) for name, ids in texts.items()}
    (baseline_M, _), rows = next(iter(scored.values())), []
    for name, (score_M, record) in scored.items():
        minus, ci95 = metrics.mean(score_M - baseline_M)
        rows.append({"variant": name, **record, "minus_baseline": minus, "minus_baseline_ci95": ci95})
    record = {"n": len(v_Md), "tail_tokens": reader.n, "ridge": ridge, "rows": rows, "scaling": scaling}
    return record, made_from


def _score(backbone: Backbone, targets: Targets, texts: list[list[int]]) -> tuple[np.ndarray, dict]:
    """Scores (M,) of texts of the held-out targets, and their record."""
    v_Md, sources = targets.v[targets.held_out], targets.sequences(targets.held_out)
    score_M = fve(backbone.encode(texts, start=True), v_Md, targets.mu)
    return score_M, {**_mean(score_M), "names_last_token": float(names_last_token(texts, sources).mean())}


def _mean(score_M: np.ndarray) -> dict:
    return dict(zip(("mean", "ci95"), metrics.mean(score_M)))


def grow(run: Run, targets: Targets, n: int, more: Sequence[Part]) -> Iterator[tuple[list[Part], ReaderSums]]:
    """The parts that count so far, and the sums over them: the same object, with every step holding more."""
    train, _ = fit_split(run, targets)
    edges = [0, *(len(train) // share for share in SHARES)]
    steps = [(targets, train[a:b]) for a, b in pairwise(edges)] + list(more)
    sums = readers.empty_sums(run.backbone, *steps[0], n)
    for i, part in enumerate(steps, start=1):
        readers.add_rows({run.backbone.layer: sums}, run.backbone, *part)
        yield steps[:i], sums


def score_size(run: Run, targets: Targets, parts: Sequence[Part], sums: ReaderSums) -> dict:
    """``{"train_rows", "reader", "probe", "retrieval"}`` with the sequences of some parts; retrieval is from the very
    sequences that the others are fitted on."""
    backbone, (_, validation), v_Md = run.backbone, fit_split(run, targets), targets.v[targets.held_out]
    reader = reader_from(readers.best_ridge(backbone, sums, targets, validation)[0], backbone)
    probe, _ = fit_probe(backbone, parts, targets, validation, sums.n_tokens)
    nearest_M = np.max([fve_matrix(v_Md, own.v[rows], targets.mu).max(axis=1) for own, rows in parts], axis=0)
    return {
        "train_rows": sum(len(rows) for _, rows in parts),
        "reader": _score(backbone, targets, read_greedy(reader, v_Md).tolist())[1],
        "probe": _score(backbone, targets, probe.decode(v_Md, sums.n_tokens).tolist())[1],
        "retrieval": _mean(nearest_M),
    }


@torch.inference_mode()
def read_with_language_model(reader: TailReader, backbone: Backbone, v_Md: np.ndarray, weight: float) -> Tensor:
    """The best tail of each target by reader and language model together (M, n), in reading order; ``weight`` is λ, of
    the language model's log-probability."""
    parts = torch.as_tensor(v_Md, device=backbone.device).split(TARGETS_TOGETHER)
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
        language = -(j + 1) * torch.from_numpy(nats_per_token(backbone, ids.flatten(0, 1).tolist()))
        language = language.view(m, -1).to(channel)
        keep = (channel + weight * language).topk(min(BEAMS, ids.shape[1])).indices
        ids_MBj = _of_beam(ids, keep)
        channel_MB, language_MB = channel.gather(1, keep), language.gather(1, keep)
        explained = reader.explained(j, ids_MBj[:, :, 0].flatten()).view(m, -1, d)
        residual_MBd = _of_beam(residual_MBd, beam.gather(1, keep)) - explained
    return ids_MBj[:, 0].cpu()


def _of_beam(x_MBz: Tensor, beam_MC: Tensor) -> Tensor:
    """Rows of the chosen beams (M, C, z)."""
    return x_MBz.gather(1, beam_MC[:, :, None].expand(-1, -1, x_MBz.shape[2]))


def _unwhitened(reader: TailReader) -> TailReader:
    """The same A_j with Σ = σ² I, σ² the mean residual variance."""
    unwhiten_dd = torch.linalg.inv(reader.whiten_dd)
    sigma = unwhiten_dd.square().sum() / len(unwhiten_dd)
    weights_nad = reader.weights_nad @ unwhiten_dd.T / sigma.sqrt()
    half_norm_nV = readers.half_norms(reader.table_Vd, weights_nad, reader.embedding_mean_d)
    scale_dd = torch.eye(len(unwhiten_dd), device=weights_nad.device) / sigma.sqrt()
    return dataclasses.replace(reader, weights_nad=weights_nad, half_norm_nV=half_norm_nV, whiten_dd=scale_dd)


@torch.inference_mode()
def _read_apart(reader: TailReader, v_Md: np.ndarray) -> Tensor:
    """Every position from the whole of v: what is explained by a later token is not taken out."""
    residual_Md = reader.first_residual(v_Md)
    return torch.cat([reader.candidates(j, residual_Md, 1)[0] for j in reversed(range(reader.n))], dim=1)


@torch.inference_mode()
def _last_positions(run: Run, targets: Targets) -> ReaderSums:
    """Sums over the training targets themselves, one activation a sequence, as the probe is fitted."""
    # One vector a sequence cannot carry more: n · d has to stay below the number of sequences.
    backbone, n, (train, _) = run.backbone, LAST_ONLY_LENGTH, fit_split(run, targets)
    sums, table_Vd = readers.empty_sums(backbone, targets, train, n), backbone.embedding_table()
    sums.counts_V += token_counts(targets, train, table_Vd)
    ids_nj = tail_features(targets.ids, train, targets.lengths[train], n, backbone.start_id)
    v_nd = torch.from_numpy(targets.v[train]).to(backbone.device)
    sums.add(sums.features(table_Vd, torch.from_numpy(ids_nj)), v_nd - sums.mean_d)
    return sums


def _adapter_texts(run: Run, targets: Targets) -> list[list[int]]:
    """Greedy texts of the paper's AV when it is trained, as long as the run's, to write the end of the source alone."""
    trainer = Trainer(run.inside("adapter"), targets, Recipe(span=ADAPTER_SPAN))
    trainer.train()
    trainer.av.load_trainable(trainer.best, "best step")
    return greedy_rollouts(run.backbone, trainer.av, targets.v[targets.held_out])


def replicate(run: Run, seeds: Sequence[int]) -> tuple[dict, dict[str, str]]:
    """(``{"K", "seeds": {seed: column}}``, hashes of what it was made from).

    For each seed targets are drawn, the reader is fitted and its tails are written, in that seed's own run folder. The
    intervals inside a column are over its targets.
    """
    columns, parents = {}, {}
    for seed in seeds:
        own = with_seed(run, seed)
        targets = make_targets(own)
        readers.fit_reader(own, targets)
        claims = make_claims(own, targets)
        columns[str(seed)] = score_claims(run.backbone, targets, claims).to_json()
        parents |= {f"{name} of seed {seed}": sha256 for name, sha256 in claims.sidecar["made_from"].items()}
    return {"K": DRAWS, "seeds": columns}, parents


def make_claims(run: Run, targets: Targets) -> Artefact:
    """Of the held-out targets' tails, centred, with BOS, or what is on disk: ``score`` (M, 1 + K), column 0 greedy,
    ``greedy_h`` (M, d), and ``guided_curve`` and ``guided_spent`` as in a :class:`GuidedSearch`."""
    held_out = targets.held_out

    def keep(tails: Texts, guided: GuidedSearch) -> dict[str, np.ndarray]:
        h_MKd = tails.read_as(CORRECTED)
        scores = {"score": fve(h_MKd, targets.v[held_out][:, None], targets.mu), "greedy_h": h_MKd[:, 0]}
        return {**scores, "guided_curve": guided.curve, "guided_spent": guided.spent}

    return write_tails(run, targets, held_out, DRAWS, CLAIMS, keep)


def score_claims(backbone: Backbone, targets: Targets, claims: Artefact) -> Column:
    """What the reader set out to beat, centred: NN-retrieval, the tail oracles of 4 and 8, chance."""
    sources, score = targets.sequences(targets.held_out), claims.tensors["score"]
    scorer = Scorer(targets.v[targets.held_out], targets.v[targets.pool], targets.mu)
    column = Column("corrected", len(sources))
    column.add("greedy", score[:, 0])
    column.add("nn_retrieval", scorer.nearest)
    column.add("bestofK", score[:, 1:].max(axis=1))
    column.add("guided", claims.tensors["guided_curve"][:, -1])
    column.put("guided_forward_tokens", int(claims.tensors["guided_spent"][-1]))
    for n in ORACLES:
        column.add(f"tail_oracle_{n}", scorer.own(backbone.encode([s[-n:] for s in sources], start=True)))
    column.difference("greedy", "nn_retrieval")
    column.difference("bestofK", "tail_oracle_4")
    column.difference("guided", "tail_oracle_8")
    rank = metrics.rank_of_own(claims.tensors["greedy_h"], scorer.v, scorer.mu)
    column.add("identification_top1", rank == 1)
    column.put("identification_chance_top1", 1 / len(sources))
    return column
