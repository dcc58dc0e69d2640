"""Training the AV in other ways, and what each takes from v: without sampling, and by its greedy text."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from typing import Sequence

import numpy as np

from nla_extensions.training_study.variants import TRAINED, Variant, variants
from nla_utils import rows
from nla_utils.encoding import re_encode
from nla_utils.errors import ConfigError
from nla_utils.evidence import of_losses
from nla_utils.metrics import fve_matrix
from nla_utils.protocol import CORRECTED
from nla_utils.run import Run
from nla_utils.scores import Column, score
from nla_utils.store import arrays_hash, json_hash, read_record, write_record
from nla_utils.targets import Targets, embedding_norm
from nla_utils.training import Recipe, Trainer, batches_of_epoch, greedy_rollouts, load_av
from nla_utils.verbalizer import (
    BEST_AV,
    N_OTHERS,
    ActivationVerbalizer,
    TextPairs,
    make_split,
    published_pairs,
    source_loss,
    tail_pairs,
)

# Steps at the end over which the training loss is averaged.
LAST_STEPS = 50


def study_of(run: Run, targets: Targets) -> list[Variant]:
    """The variants for the size of a run; raises ``ConfigError`` where its held-out texts are too few to be compared."""
    held_out_pairs(run, targets)
    split = make_split(run, targets)
    n_steps = len(batches_of_epoch(run, split, 0)) * run.sizes.epochs
    return variants(len(split.train), n_steps, embedding_norm(targets, run.backbone))


def run_itself(run: Run, targets: Targets) -> dict:
    """The record of the run's own AV, measured as the variants are; needs notebook 02.

    It is the checkpoint that validation kept, which may be far from the last step, where the variants are measured: the
    learning curve's end is a variant of its own.
    """
    pairs = held_out_pairs(run, targets)
    variant = Variant("the run's own", "the AV that validation kept", Recipe())
    own = run.folder.load(BEST_AV).sidecar
    return {
        **asdict(variant),
        "pairs": own["train_pairs"],
        "steps": own["steps"],
        "loss_last": float(np.mean(own["loss"][-LAST_STEPS:])),
        **measure(run, targets, load_av(run), pairs).to_json(),
    }


def study(run: Run, targets: Targets, chosen: Sequence[Variant]) -> list[dict]:
    """A record of each variant, made or read back: its recipe, training loss, nats and greedy scores with intervals."""
    cut = {n: shortened(run, targets, n) for n in {v.tokens for v in chosen if v.tokens}}
    return [_record(run, cut.get(v.tokens, targets), v) for v in chosen]


def _record(run: Run, targets: Targets, variant: Variant) -> dict:
    plan = {**run.folder.spec(BEST_AV), "targets": targets.sha256, "variant": asdict(variant)}
    apart = run.inside(f"study/{json_hash(plan)[:16]}")
    path = apart.folder.file("record.json")
    if path.exists():
        return read_record(path)
    print(f"{variant.part}: {variant.label}")
    trainer = Trainer(apart, targets, variant.recipe)
    trainer.train()
    column = measure(run, targets, trainer.av, _asked(run, targets, trainer, variant))
    write_record(
        path,
        {
            **asdict(variant),
            "pairs": len(trainer.split.train),
            "steps": trainer.step,
            "loss_last": float(np.mean(trainer.history.loss[-LAST_STEPS:])),
            **column.to_json(),
        },
    )
    trainer.state_file.unlink()
    return read_record(path)


def _asked(run: Run, targets: Targets, trainer: Trainer, variant: Variant) -> TextPairs:
    """The pairs that a variant is measured on."""
    if variant.asked_on == TRAINED:
        return trainer.split.pairs.take(trainer.split.train)
    if variant.recipe.span:
        return tail_pairs(targets, targets.held_out, variant.recipe.span)
    return held_out_pairs(run, targets)


def held_out_pairs(run: Run, targets: Targets) -> TextPairs:
    """The held-out targets with their own texts; raises ``ConfigError`` where they are too few to be compared."""
    longest = run.sizes.max_new_tokens
    pairs = published_pairs(run.backbone, targets, targets.held_out, longest)
    if len(pairs.rows) < 2:
        few = f"{len(pairs.rows)} of {run.sizes.n_eval} held-out texts have at most {longest} tokens"
        raise ConfigError(f"{few}, two are needed; raise n_eval")
    return pairs


def measure(run: Run, targets: Targets, av: ActivationVerbalizer, pairs: TextPairs) -> Column:
    """Nats of the pairs' texts by what stands in the slot, and the greedy texts' scores against own and other targets."""
    column = score(of_losses(source_loss(run.backbone, av, targets, pairs, N_OTHERS)), CORRECTED, rows.OF_LOSSES)
    v_Md, m = targets.v[pairs.rows], len(pairs.rows)
    # As long as the texts can be: short sources are not to be compared with long texts.
    longest = max(map(len, pairs.ids))
    greedy = [ids[:longest] for ids in greedy_rollouts(run.backbone, av, v_Md)]
    scores_MM = fve_matrix(v_Md, re_encode(run.backbone, greedy, CORRECTED.on_ids), targets.mu)
    own_M = scores_MM.diagonal()
    column.add(rows.GREEDY.cen, own_M)
    column.add(rows.OTHERS_GREEDY.cen, (scores_MM.sum(axis=1) - own_M) / (m - 1))
    column.difference(rows.GREEDY.cen, rows.OTHERS_GREEDY.cen)
    same = [ids[: len(text)] == text for ids, text in zip(greedy, pairs.ids)]
    column.add("greedy_is_source", np.array(same, dtype=float))
    return column


def shortened(run: Run, targets: Targets, n_tokens: int) -> Targets:
    """The targets' first n tokens as sources of their own, v taken at the last of them."""
    ids, lengths = targets.ids[:, :n_tokens], np.minimum(targets.lengths, n_tokens)
    v = run.backbone.encode([row[:n].tolist() for row, n in zip(ids, lengths)], start=True)
    arrays = {"ids": ids, "lengths": lengths, "v": v}
    return dataclasses.replace(targets, **arrays, sha256=arrays_hash(arrays))
