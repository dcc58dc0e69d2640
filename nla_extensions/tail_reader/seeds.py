"""The tail reader's final claims on targets drawn anew: complete repetitions by seed, held out, ``corrected``."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from nla_extensions.tail_reader.reader import ARTEFACT as READER_ARTEFACT
from nla_extensions.tail_reader.reader import fit_reader
from nla_extensions.tail_reader.rollouts import tails_spec, write_tails
from nla_utils import metrics
from nla_utils.baselines import fit_split
from nla_utils.evidence import Scorer
from nla_utils.lm.backbone import Backbone
from nla_utils.metrics import fve
from nla_utils.protocol import CORRECTED
from nla_utils.run import Run
from nla_utils.scores import Column
from nla_utils.store import SPECS, Artefact
from nla_utils.targets import Targets, make_targets

ARTEFACT = "claims"
# The paper's K, at every profile: a tail costs a fourteenth of an AV's text.
DRAWS = 64
ORACLES = (4, 8)
SPECS[ARTEFACT] = lambda config: tails_spec(config, DRAWS)


def replicate(run: Run, seeds: Sequence[int]) -> tuple[dict, dict[str, str]]:
    """(``{"K", "seeds": {seed: column}}``, hashes of what it was made from).

    Targets are drawn, the reader is fitted and its tails are written for each seed, into that seed's own run folder,
    or taken from there. No AV is trained. The intervals inside a column are over its targets.
    """
    columns, parents = {}, {}
    for seed in seeds:
        own = with_seed(run, seed)
        targets = make_targets(own)
        fit_reader(own, targets)
        claims = make_claims(own, targets)
        columns[str(seed)] = score_claims(run.backbone, targets, claims).to_json()
        parents |= {f"{name} of seed {seed}": sha256 for name, sha256 in claims.sidecar["made_from"].items()}
    return {"K": DRAWS, "seeds": columns}, parents


def with_seed(run: Run, seed: int) -> Run:
    """The run with another seed, in that seed's own folder."""
    return Run.of(dataclasses.replace(run.config, seed=seed), run.backbone)


def training_targets(run: Run) -> tuple[Targets, np.ndarray]:
    """Targets of a run, drawn where they are missing, and the rows of them that a reader is fitted on."""
    targets = make_targets(run)
    return targets, fit_split(run, targets)[0]


def make_claims(run: Run, targets: Targets) -> Artefact:
    """Scores of the reader's tails of the held-out targets, or what is on disk.

    ``score`` (M, 1+K), column 0 greedy; ``greedy_h`` (M, d); ``guided_curve`` and ``guided_spent`` as in
    :class:`~nla_extensions.tail_reader.rollouts.GuidedSearch`. All centred, with BOS.
    """
    if run.folder.has(ARTEFACT):
        return run.folder.load(ARTEFACT)
    held_out = targets.held_out
    tails, guided, stages = write_tails(run, targets, held_out, DRAWS)
    h_MKd = tails.read_as(CORRECTED)
    tensors = {
        "score": fve(h_MKd, targets.v[held_out][:, None], targets.mu),
        "greedy_h": h_MKd[:, 0],
        "guided_curve": guided.curve,
        "guided_spent": guided.spent,
    }
    made_from = {"targets": targets.sha256, READER_ARTEFACT: run.folder.sha256_of(READER_ARTEFACT)}
    artefact = run.folder.save(ARTEFACT, tensors, made_from=made_from, k=DRAWS, seed=run.seed)
    for chunks in stages:
        chunks.clear()
    return artefact


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
