"""Search made into a policy: the AV trained on the best of its own texts, round after round, or on the guided search's.

Held-out targets are never written for. The control trains as long, on the sources' own texts again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch

from nla_extensions.tail_reader.reader import fit_reader
from nla_extensions.tail_reader.rollouts import GUIDED_BATCH, av_forward_tokens, guided_search, read_rollouts
from nla_extensions.training_study.study import held_out_pairs, measure
from nla_utils import rows
from nla_utils.config import BATCH_SIZE
from nla_utils.lm.sampling import SamplingSettings, row_streams, sample
from nla_utils.metrics import fve
from nla_utils.protocol import CORRECTED
from nla_utils.run import Run
from nla_utils.store import ChunkStore, arrays_hash, json_hash
from nla_utils.targets import Targets
from nla_utils.training import Recipe, Trainer, load_av
from nla_utils.verbalizer import ActivationVerbalizer, Split, TextPairs, make_split, tail_pairs

EPOCHS, RATE = 4, 3e-4
# What is compared with the AV that training began from.
GAINS = (rows.GREEDY_MINUS_OTHERS.cen, rows.NATS_GAINED[0].key)


@dataclass(frozen=True)
class Teachers:
    """Texts to train on: ``ids`` of each row's, and their mean centred score, ``None`` for the sources themselves."""

    pairs: TextPairs
    score: Optional[float] = None


def iterate(run: Run, targets: Targets, n: int, k: int, rounds: int) -> list[dict]:
    """Records of the run's own AV, of each round of expert iteration, of as much training on the sources' own texts, and
    of training on what the guided search finds; each measured on held-out targets as a study measures, and against the
    AV that it began from, paired by target."""
    split = make_split(run, targets)
    sources, validation = split.pairs.take(split.train[:n]), split.pairs.take(split.validation)
    full, start = held_out_pairs(run, targets), load_av(run)
    measured = _Measured(run, targets)
    measured("the run's own AV", start, full)
    av = start
    for r in range(1, rounds + 1):
        teachers = best_rollouts(run, targets, av, sources.rows, k, r)
        av = train_on(run, targets, av, teachers, validation)
        measured(f"round {r}: its own best of {k}", av, full, teachers)
    again = Teachers(sources)
    measured("control: the sources again", train_on(run, targets, start, again, validation), full, again)
    teachers = guided_texts(run, targets, sources.rows, k)
    length = len(teachers.pairs.ids[0])
    ends = tail_pairs(targets, targets.held_out, length)
    measured(f"the run's own AV, first {length} tokens", start, ends)
    taught = train_on(run, targets, start, teachers, validation)
    measured(f"the guided search's {length} tokens", taught, ends, teachers)
    return measured.records


class _Measured:
    """Records of AVs; one without teachers is what those after it began from."""

    def __init__(self, run: Run, targets: Targets):
        self.run, self.targets = run, targets
        self.records: list[dict] = []

    def __call__(
        self, label: str, av: ActivationVerbalizer, asked: TextPairs, teachers: Optional[Teachers] = None
    ) -> None:
        column = measure(self.run, self.targets, av, asked)
        if teachers is None:
            self.start = column
        else:
            for key in GAINS:
                column.add(f"{key}_gained", column.per_target[key] - self.start.per_target[key])
        about = {"pairs": len(teachers.pairs.rows), "teachers_cen": teachers.score} if teachers else {}
        self.records.append({"label": label, **about, **column.to_json()})


def best_rollouts(
    run: Run, targets: Targets, av: ActivationVerbalizer, chosen: list[int], k: int, number: int
) -> Teachers:
    """The best of k rollouts of each row by centred score, re-encoded behind BOS."""
    backbone, settings = run.backbone, SamplingSettings(max_new_tokens=run.sizes.max_new_tokens)
    plan = {**run.folder.conditions, "targets": targets.sha256, "k": k, "rows": len(chosen), "av": _hash(av)}
    chunks = ChunkStore(run.folder.file(f"iteration/{json_hash(plan)[:16]}.chunks"), plan)

    @torch.inference_mode()
    def draw(c: int, part: slice) -> dict[str, np.ndarray]:
        v_Md = targets.v[chosen[part]]
        prompt_BPd = av(torch.from_numpy(v_Md).to(backbone.device), backbone.dtype).repeat_interleave(k, dim=0)
        found = sample(backbone, prompt_BPd, settings, row_streams(run.seed, f"iteration {number}", chosen[part], k))
        h = backbone.encode([found.sequence(i) for i in range(len(prompt_BPd))], start=True)
        score_MK = fve(h.reshape(len(v_Md), k, -1), v_Md[:, None], targets.mu)
        best = np.arange(len(v_Md)) * k + score_MK.argmax(axis=1)
        return {"ids": found.ids[best], "lengths": found.lengths[best], "score": score_MK.max(axis=1)}

    per_chunk = max(1, backbone.sample_batch // k)
    found = chunks.fill(len(chosen), per_chunk, draw, f"best of {k}, round {number}", "target")
    ids = [row[:length].tolist() for row, length in zip(found["ids"], found["lengths"])]
    return Teachers(TextPairs(list(chosen), ids, 0, 0), float(found["score"].mean()))


def guided_texts(run: Run, targets: Targets, chosen: list[int], k: int) -> Teachers:
    """What the guided search finds for each row, from k draws of the reader, for the forward tokens of an AV's best-of-K."""
    backbone, reader = run.backbone, fit_reader(run, targets)
    plan = {**run.folder.conditions, "targets": targets.sha256, "k": k, "rows": len(chosen), "by": "guided search"}
    chunks = ChunkStore(run.folder.file(f"iteration/{json_hash(plan)[:16]}.chunks"), plan)

    def search(c: int, part: slice) -> dict[str, np.ndarray]:
        v_Md, streams_B = targets.v[chosen[part]], row_streams(run.seed, "taught", chosen[part], k + 1)
        drawn = read_rollouts(reader, backbone, v_Md, k, streams_B)
        ids, h, budget = drawn.ids[:, 1:], drawn.read_as(CORRECTED)[:, 1:], av_forward_tokens(run.config)
        found = guided_search(reader, backbone, v_Md, targets.mu, ids, h, budget)
        return {"ids": found.ids, "score": found.curve[:, -1]}

    found = chunks.fill(len(chosen), GUIDED_BATCH, search, "guided search", "target")
    return Teachers(TextPairs(list(chosen), found["ids"].tolist(), 0, 0), float(found["score"].mean()))


def train_on(
    run: Run, targets: Targets, av: ActivationVerbalizer, teachers: Teachers, validation: TextPairs
) -> ActivationVerbalizer:
    """The AV after some epochs on the teachers' texts, from where it stands; it is left as it was.

    ``validation``: sources, whatever is trained on, so that the curves are comparable.
    """
    pairs = teachers.pairs
    together = TextPairs(pairs.rows + validation.rows, pairs.ids + validation.ids, 0, 0)
    own = Split(together, np.arange(len(pairs.rows)), np.arange(len(pairs.rows), len(together.rows)))
    apart = run.inside(f"iteration/{json_hash({'texts': pairs.ids, 'from': _hash(av)})[:16]}")
    recipe = Recipe(steps=EPOCHS * math.ceil(len(pairs.rows) / BATCH_SIZE), learning_rate=RATE)
    trainer = Trainer(apart, targets, recipe, own, av)
    trainer.train()
    return trainer.av.eval()


def _hash(av: ActivationVerbalizer) -> str:
    return arrays_hash({name: tensor.numpy() for name, tensor in av.trainable().items()})
