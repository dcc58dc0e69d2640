"""The tail reader's final claims on targets drawn anew: whole repetitions by seed, held out, ``corrected``."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.evaluation import Column
from nla_utils.metrics import fve, fve_matrix
from nla_utils.reader import ARTEFACT as READER_ARTEFACT
from nla_utils.reader import fit_reader, load_reader, reader_split
from nla_utils.readings import write_tails
from nla_utils.run import folder_of
from nla_utils.store import Artefact, RunFolder
from nla_utils.targets import Targets, make_targets

ARTEFACT = "claims"
# The paper's K, at every profile: a tail costs a fourteenth of an AV's text.
DRAWS = 64
ORACLES = (4, 8)


def replicate(run: RunConfig, backbone: Backbone, seeds: Sequence[int]) -> tuple[dict, dict[str, str]]:
    """(``{"K", "seeds": {seed: column}}``, hashes of what it was made from).

    Targets are drawn, the reader is fitted and its tails are written for each seed, into that seed's own run folder,
    or taken from there. No AV is trained. The intervals inside a column are over its targets.
    """
    columns, parents = {}, {}
    for seed in seeds:
        config = dataclasses.replace(run, seed=seed)
        folder = folder_of(config, backbone)
        targets = make_targets(config, backbone, folder)
        fit_reader(config, backbone, targets, folder)
        claims = make_claims(config, backbone, targets, folder)
        columns[str(seed)] = score_claims(backbone, targets, claims).to_json()
        parents |= {f"{name} of seed {seed}": sha256 for name, sha256 in claims.sidecar["made_from"].items()}
    return {"K": DRAWS, "seeds": columns}, parents


def training_targets(run: RunConfig, backbone: Backbone) -> tuple[Targets, np.ndarray]:
    """Targets of a run, drawn where they are not there, and the rows of them that a reader is fitted on."""
    targets = make_targets(run, backbone, folder_of(run, backbone))
    return targets, reader_split(run, targets)[0]


def make_claims(run: RunConfig, backbone: Backbone, targets: Targets, folder: RunFolder) -> Artefact:
    """Scores of the reader's tails of the held-out targets, or what is whole on disk.

    ``score`` (M, 1+K), column 0 greedy; ``greedy_h`` (M, d); ``guided_curve`` and ``guided_spent`` as in
    :class:`~nla_utils.guided.GuidedSearch`. All centred, with BOS.
    """
    if folder.has(ARTEFACT):
        return folder.load(ARTEFACT)
    reader, held_out = load_reader(backbone, folder), targets.held_out
    tails, stages = write_tails(run, backbone, reader, targets, held_out, DRAWS, folder)
    tensors = {
        "score": fve(tails["h_bos"], targets.v[held_out][:, None], targets.mu),
        "greedy_h": tails["h_bos"][:, 0],
        "guided_curve": tails["guided_curve"],
        "guided_spent": tails["guided_spent"],
    }
    made_from = {"targets": targets.sha256, READER_ARTEFACT: folder.load(READER_ARTEFACT).sha256}
    artefact = folder.save(ARTEFACT, tensors, made_from=made_from, k=DRAWS, seed=run.seed)
    for chunks in stages:
        chunks.clear()
    return artefact


def score_claims(backbone: Backbone, targets: Targets, claims: Artefact) -> Column:
    """What the reader set out to beat, centred: NN-retrieval, the tail oracles of 4 and 8, chance."""
    v, mu, sources = targets.v[targets.held_out], targets.mu, targets.sequences(targets.held_out)
    score = claims.tensors["score"]
    column = Column("corrected", len(v))
    column.add("greedy", score[:, 0])
    column.add("nn_retrieval", fve_matrix(v, targets.v[targets.pool], mu).max(axis=1))
    column.add("bestofK", score[:, 1:].max(axis=1))
    column.add("guided", claims.tensors["guided_curve"][:, -1])
    column.put("guided_forward_tokens", int(claims.tensors["guided_spent"][-1]))
    for n in ORACLES:
        column.add(f"tail_oracle_{n}", fve(backbone.encode([s[-n:] for s in sources], start=True), v, mu))
    column.difference("greedy", "nn_retrieval")
    column.difference("bestofK", "tail_oracle_4")
    column.difference("guided", "tail_oracle_8")
    hits, _ = metrics.identification(claims.tensors["greedy_h"], v, mu)
    column.add("identification_top1", hits)
    column.put("identification_chance_top1", 1 / len(v))
    return column
