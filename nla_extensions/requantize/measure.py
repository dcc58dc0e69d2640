"""A backbone's weights quantized once more: how far v moves, and what the same texts then score.

The token ids are the run's own: its targets, and the texts that were written for them. The requantized model takes v
and reads the texts again; pool, μ and null are its own. K-quants of GGUF cannot be written in Python; Q4_1 is what the
linear maps of one backbone are in already, and rounding to it once more would leave them as they are.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from typing import Iterator, Mapping

import numpy as np
import pyarrow as pa
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from nla_extensions.requantize.page import BITS, KINDS, NONE, ROWS
from nla_utils import evidence, metrics, rows
from nla_utils.baselines import CEILINGS, PROBE, WRITERS, load_ceilings, load_probe
from nla_utils.encoding import Texts, re_encode, read
from nla_utils.errors import ConfigError
from nla_utils.evidence import Evidence, Part, null_texts, of_ceilings
from nla_utils.lm.backbone import Backbone
from nla_utils.metrics import fve
from nla_utils.protocol import CORRECTED
from nla_utils.run import Run
from nla_utils.scores import Column, RowValues
from nla_utils.store import Progress
from nla_utils.targets import Targets
from nla_utils.verbalizer import ROLLOUTS, load_rollouts


@contextmanager
def requantized(backbone: Backbone, kind: str) -> Iterator[dict[str, float]]:
    """The backbone's matrices (embedding and linear maps; neither norms nor biases) rounded to a kind of GGUF, in
    place, and put back at the end. Left are matrices whose rows are not whole blocks of the kind, as in a GGUF file,
    and a head of its own, which no activation passes.

    Gives ‖W′ − W‖ / ‖W‖ of the ``embedding``, of the ``linear maps``, and of both together. Activations are those of
    the requantized model; its logits are not to be used.
    """
    moved, of_all = np.zeros(2), np.zeros(2)
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0] if kind != NONE else math.inf
    matrices = [p for p in backbone.model.base_model.parameters() if p.ndim == 2 and p.shape[1] % block == 0]
    before = [p.detach().clone() for p in matrices]
    embedding = backbone.model.get_input_embeddings().weight
    try:
        for p, w in zip(matrices, before):
            p.data.copy_(_rounded(w, kind).to(backbone.dtype))
            part = 0 if p is embedding else 1
            moved[part] += float((p.data.float() - w.float()).norm()) ** 2
            of_all[part] += float(w.float().norm()) ** 2
        parts = np.sqrt([*moved, moved.sum()]) / np.sqrt(np.maximum([*of_all, of_all.sum()], 1e-30))
        yield dict(zip(("embedding", "linear maps", "all"), parts.tolist()))
    finally:
        for p, w in zip(matrices, before):
            p.data.copy_(w)


def _rounded(w: torch.Tensor, kind: str) -> torch.Tensor:
    qtype = GGMLQuantizationType[kind]
    return torch.from_numpy(quants.dequantize(quants.quantize(w.float().cpu().numpy(), qtype), qtype))


def read_again(backbone: Backbone, targets: Targets, texts: Mapping[str, Texts], k: int) -> tuple[Targets, Evidence]:
    """The targets with v as the backbone takes it now, and what rows under ``corrected`` are then made of.

    ``texts``: the sources, paraphrases, last tokens, rollouts and probe's texts of the held-out targets.
    """
    own = replace(targets, v=re_encode(backbone, targets.sequences(range(len(targets.v))), CORRECTED))
    texts = {name: read(backbone, replace(t, h={}), CORRECTED) for name, t in texts.items()}
    found = of_ceilings(own, {name: t for name, t in texts.items() if t.kind in WRITERS}, k)
    part = Part(own, CORRECTED, null_texts(own, {}, CORRECTED))
    tables = [part.texts(texts[kind], CORRECTED, once=False) for kind in ("rollout", "probe")]
    tables.append(part.others(CORRECTED.name, texts["rollout"].read_as(CORRECTED)))
    return own, Evidence(pa.concat_tables([found.table, *tables]), found.facts | {"K": k})


def requantize(run: Run, targets: Targets) -> tuple[dict, dict[str, str]]:
    """The record of a run, and the hashes of what it is made from.

    Raises ``ConfigError`` where the texts of targets are not known, ``ArtefactError`` where notebooks 01 to 04 have not
    been run.
    """
    if not targets.lengths.all():
        raise ConfigError("the texts of some targets are not known, so that their v cannot be taken again")
    stored, rollouts, ceilings = RowValues(evidence.load(run.folder), CORRECTED), load_rollouts(run), load_ceilings(run)
    texts = {name: ceilings[name] for name in map(CORRECTED.texts, WRITERS)}
    texts |= {t.kind: t.at(targets.held_out) for t in (rollouts, load_probe(run))}
    record = {}
    for kind in Progress(KINDS, desc="requantizing", unit="kind"):
        with requantized(run.backbone, kind) as weights:
            own, found = read_again(run.backbone, targets, texts, rollouts.k)
        record[kind] = {"weights": weights, "v": of_v(own, targets), **changes(RowValues(found, CORRECTED), stored)}
    made_from = ("targets", CEILINGS, ROLLOUTS, PROBE)
    return {"kinds": record}, {name: run.folder.sha256_of(name) for name in made_from}


def of_v(own: Targets, targets: Targets) -> dict[str, float]:
    """v as the requantized model takes it against v: mean and worst centred score over all targets, both centred by the
    run's μ, or each by its own model's."""
    by_mu = {"mu": fve(own.v, targets.v, targets.mu), "own_mu": fve(own.v - own.mu, targets.v - targets.mu)}
    mean = {f"{mu}_mean": float(scores_N.mean()) for mu, scores_N in by_mu.items()}
    return mean | {f"{mu}_worst": float(scores_N.min()) for mu, scores_N in by_mu.items()}


def changes(now: RowValues, before: RowValues) -> dict:
    """The rows' column with, of each, its change: paired by target."""
    column = Column(CORRECTED.reading, len(now[rows.GREEDY]))
    for row in ROWS:
        column.add(row.cen, now[row])
        column.add(f"{row.cen}_change", now[row] - before[row])
    for row in BITS:
        column.put(row.cen, *metrics.bits_of_means(now[row]))
        column.put(f"{row.cen}_change", *bits_change(now[row], before[row]))
    return column.to_json()


def bits_change(*both: tuple) -> tuple[float, list[float]]:
    """Bits of a row less those of the same row before, with an interval made as :func:`metrics.bits_of_means` makes its
    own: targets are resampled together in both, and a block of the pool is left out of both."""
    now, before = map(metrics.bits_again, both)
    change = [a - b for a, b in zip(now, before)]
    return change[0], metrics.interval_of_bits(*change)
