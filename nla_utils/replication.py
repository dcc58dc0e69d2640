"""The tail reader's final claims on targets drawn anew: whole repetitions by seed, held out, ``corrected``."""

from __future__ import annotations

import dataclasses
from typing import Sequence

import numpy as np

from nla_utils import metrics
from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.evaluation import Column
from nla_utils.guided import guided_search
from nla_utils.metrics import fve, fve_matrix
from nla_utils.reader import ARTEFACT as READER_ARTEFACT
from nla_utils.reader import TailReader, fit_reader, reader_split
from nla_utils.readings import av_forward_tokens, draw_tails
from nla_utils.run import folder_of
from nla_utils.store import RunFolder
from nla_utils.targets import Targets, make_targets

# The paper's K, at every profile: a tail costs a fourteenth of an AV's text.
DRAWS = 64
ORACLES = (4, 8)


def replicate(run: RunConfig, backbone: Backbone, seeds: Sequence[int]) -> tuple[dict, dict[str, str]]:
    """(``{"K", "seeds": {seed: column}, "over_seeds": {key: mean and sd}}``, hashes of what it was made from).

    Targets are drawn and the reader is fitted for each seed, into that seed's own run folder, or taken from there.
    No AV is trained. ``sd`` is over seeds; the intervals inside a column are over its targets.
    """
    columns, parents = {}, {}
    for seed in seeds:
        config = dataclasses.replace(run, seed=seed)
        folder = folder_of(config, backbone)
        targets = make_targets(config, backbone, folder)
        reader = fit_reader(config, backbone, targets, folder)
        columns[seed] = score_claims(config, backbone, targets, reader, folder)
        parents |= {f"targets of seed {seed}": targets.sha256}
        parents |= {f"{READER_ARTEFACT} of seed {seed}": folder.load(READER_ARTEFACT).sha256}
    means = {key: [c.values[key] for c in columns.values()] for key in next(iter(columns.values())).ci95}
    over = {key: {"mean": float(np.mean(x)), "sd": float(np.std(x, ddof=1))} for key, x in means.items()}
    records = {str(seed): column.to_json() for seed, column in columns.items()}
    return {"K": DRAWS, "seeds": records, "over_seeds": over}, parents


def training_targets(run: RunConfig, backbone: Backbone) -> tuple[Targets, np.ndarray]:
    """Targets of a run, drawn where they are not there, and the rows of them that a reader is fitted on."""
    targets = make_targets(run, backbone, folder_of(run, backbone))
    return targets, reader_split(run, targets)[0]


def score_claims(
    run: RunConfig, backbone: Backbone, targets: Targets, reader: TailReader, folder: RunFolder
) -> Column:
    """What the reader set out to beat, centred: NN-retrieval, the tail oracles of 4 and 8, chance."""
    v, mu, sources = targets.v[targets.held_out], targets.mu, targets.sequences(targets.held_out)
    drawn = draw_tails(run, backbone, reader, targets, targets.held_out, DRAWS, folder)
    found = guided_search(
        reader, backbone, v, mu, drawn["ids"][:, 1:], drawn["h_bos"][:, 1:], av_forward_tokens(run)
    )  # fmt: skip
    score = fve(drawn["h_bos"], v[:, None], mu)
    column = Column("corrected", len(v))
    column.add("greedy", score[:, 0])
    column.add("nn_retrieval", fve_matrix(v, targets.v[targets.pool], mu).max(axis=1))
    column.add("bestofK", score[:, 1:].max(axis=1))
    column.add("guided", found.curve[:, -1])
    column.put("guided_forward_tokens", int(found.spent[-1]))
    for n in ORACLES:
        column.add(f"tail_oracle_{n}", fve(backbone.encode([s[-n:] for s in sources], start=True), v, mu))
    column.difference("greedy", "nn_retrieval")
    column.difference("bestofK", "tail_oracle_4")
    column.difference("guided", "tail_oracle_8")
    hits, _ = metrics.identification(drawn["h_bos"][:, 0], v, mu)
    column.add("identification_top1", hits)
    column.put("identification_chance_top1", 1 / len(v))
    return column
