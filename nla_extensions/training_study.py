"""Training the AV in other ways, and what each takes from v: without sampling, and by its greedy text.

``nla study``: positive controls, a learning curve, recipes that change one factor at a time. ``nla iterate``: expert
iteration, the AV trained on the best of its own texts, round after round, or on the guided search's. Held-out targets
are never written for; the control trains as long, on the sources' own texts again.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import asdict, dataclass, replace
from typing import Callable, Optional, Sequence

import numpy as np
import torch

from nla_extensions.tail_reader.reader import fit_reader
from nla_extensions.tail_reader.rollouts import GUIDED_BATCH, av_forward_tokens, guided_search, read_rollouts
from nla_utils import rows
from nla_utils.config import BATCH_SIZE
from nla_utils.encoding import Texts, re_encode
from nla_utils.errors import ConfigError
from nla_utils.evidence import of_losses
from nla_utils.lm.sampling import SamplingSettings, row_streams, sample
from nla_utils.metrics import fve, fve_matrix, off_diagonal
from nla_utils.protocol import CORRECTED
from nla_utils.run import Run
from nla_utils.scores import Column, score
from nla_utils.store import ChunkStore, arrays_hash, json_hash, read_record, write_record
from nla_utils.targets import Targets, embedding_norm
from nla_utils.training import Recipe, Split, Trainer, batches_of_epoch, greedy_rollouts, make_split, tail_pairs
from nla_utils.verbalizer import BEST_AV, N_OTHERS, ActivationVerbalizer, load_av, published_pairs, source_loss

# The learning curve's factor, in steps and in pairs.
FACTOR = 8
N_MEMORISED, MEMORISING_STEPS = 64, 3000
# Sources so short are known by heart in minutes on a CPU. Their span is all of them: nothing is tokenized again, so
# that all are equally long and an AV that was never shown an end stops where they do.
MEMORISED, FEWER_STEPS = 16, 1000
SHORT = 4
SPAN = 8
RATES = (1e-4, 3e-4, 1e-3)
HELD_OUT, TRAINED = "held out", "trained on"
# Steps at the end over which the training loss is averaged.
LAST_STEPS = 50


@dataclass(frozen=True)
class Variant:
    """One training run of a study. ``part`` is the table it stands in, ``asked_on`` the texts it is measured on,
    ``tokens`` how many of a source's first tokens are a source here, ``None`` for all."""

    part: str
    label: str
    recipe: Recipe
    asked_on: str = HELD_OUT
    tokens: Optional[int] = None


def variants(n_pairs: int, n_steps: int, norm: float) -> list[Variant]:
    """The study of a run of so many training pairs and steps; ``norm`` is the mean norm of an embedding.

    Recipes have an eighth of its steps, and differ in one factor alone.
    """
    pairs, steps, fast = max(1, n_pairs // FACTOR), max(1, n_steps // FACTOR), RATES[-1]
    short, long, by_heart = Recipe(steps=steps), Recipe(steps=n_steps), Recipe(N_MEMORISED, MEMORISING_STEPS, fast)
    heart, first = f"{N_MEMORISED} pairs learned by heart", f"sources of {SHORT} tokens"
    at_norm, last = "v at an embedding's norm", f"the last {SPAN} tokens alone"
    memorised = f"{N_MEMORISED} sources of {MEMORISED} tokens, v at its own norm"
    whole = replace(by_heart, steps=FEWER_STEPS, span=MEMORISED)
    easy = replace(short, learning_rate=fast, inject_norm=norm)
    long_fast = replace(long, learning_rate=fast)
    return [
        Variant("positive control", f"{heart}, {at_norm}", replace(by_heart, inject_norm=norm), TRAINED),
        Variant("positive control", f"{heart}, v at its own norm", by_heart, TRAINED),
        Variant("by heart", memorised, whole, TRAINED, MEMORISED),
        Variant("positive control", f"{first}, the paper's recipe", short, tokens=SHORT),
        Variant("positive control", f"{first}, {at_norm}, rate {fast:g}", easy, tokens=SHORT),
        Variant("one factor", at_norm, replace(short, inject_norm=norm)),
        *(Variant("one factor", f"rate {rate:g}", replace(short, learning_rate=rate)) for rate in RATES),
        Variant("one factor", last, replace(short, span=SPAN)),
        Variant("learning curve", "1/8 of the pairs, 1/8 of the steps", replace(short, pairs=pairs)),
        Variant("learning curve", "all pairs, 1/8 of the steps", short),
        Variant("learning curve", "1/8 of the pairs, all steps", replace(long, pairs=pairs)),
        Variant("learning curve", "all pairs, all steps", long),
        Variant("what helps", f"rate {fast:g}, all steps", long_fast),
        Variant("what helps", f"rate {fast:g}, all steps, {last}", replace(long_fast, span=SPAN)),
    ]


def study_of(run: Run, targets: Targets) -> list[Variant]:
    """The variants for the size of a run; raises ``ConfigError`` as :func:`held_out_pairs` does."""
    held_out_pairs(run, targets)
    split = make_split(run, targets)
    n_steps = len(batches_of_epoch(run, split, 0)) * run.sizes.epochs
    return variants(len(split.train), n_steps, embedding_norm(targets, run.backbone))


def run_itself(run: Run, targets: Targets) -> dict:
    """The record of the run's own AV, at the checkpoint that validation kept; needs notebook 02. Variants are measured
    at their last step, which may be far from there: the learning curve's end is a variant of its own."""
    own = run.folder.load(BEST_AV).sidecar
    column = measure(run, targets, load_av(run), held_out_pairs(run, targets))
    variant = Variant("the run's own", "the AV that validation kept", Recipe())
    return _variant_record(variant, own["train_pairs"], own["loss"], column)


def study(run: Run, targets: Targets, chosen: Sequence[Variant]) -> list[dict]:
    """A record of each variant, made or read back: its recipe, training loss, nats and greedy scores with intervals."""
    cut = {n: shortened(run, targets, n) for n in {v.tokens for v in chosen if v.tokens}}
    return [_studied(run, cut.get(v.tokens, targets), v) for v in chosen]


def _studied(run: Run, targets: Targets, variant: Variant) -> dict:
    plan = {**run.folder.spec(BEST_AV), "targets": targets.sha256, "variant": asdict(variant)}
    apart = run.inside(f"study/{json_hash(plan)[:16]}")
    path = apart.folder.file("record.json")
    if not path.exists():
        print(f"{variant.part}: {variant.label}")
        trainer = Trainer(apart, targets, variant.recipe)
        trainer.train()
        if variant.asked_on == TRAINED:
            pairs = trainer.split.pairs.take(trainer.split.train)
        elif variant.recipe.span:
            pairs = tail_pairs(targets, targets.held_out, variant.recipe.span)
        else:
            pairs = held_out_pairs(run, targets)
        column = measure(run, targets, trainer.av, pairs)
        write_record(path, _variant_record(variant, len(trainer.split.train), trainer.history.loss, column))
        trainer.state_file.unlink()
    return read_record(path)


def _variant_record(variant: Variant, pairs: int, loss: Sequence[float], column: Column) -> dict:
    trained = {"pairs": pairs, "steps": len(loss), "loss_last": float(np.mean(loss[-LAST_STEPS:]))}
    return {**asdict(variant), **trained, **column.to_json()}


def held_out_pairs(run: Run, targets: Targets) -> Texts:
    """The held-out targets with their own texts; raises ``ConfigError`` where they are too few to be compared."""
    longest = run.sizes.max_new_tokens
    pairs, _ = published_pairs(run.backbone, targets, targets.held_out, longest)
    if len(pairs.rows) < 2:
        few = f"{len(pairs.rows)} of {run.sizes.n_eval} held-out texts have at most {longest} tokens"
        raise ConfigError(f"{few}, two are needed; raise n_eval")
    return pairs


def measure(run: Run, targets: Targets, av: ActivationVerbalizer, pairs: Texts) -> Column:
    """Nats of the pairs' texts by what stands in the slot; scores of the greedy texts against own and other targets."""
    column = score(of_losses(source_loss(run.backbone, av, targets, pairs, N_OTHERS)), CORRECTED, rows.OF_LOSSES)
    v_Md = targets.v[pairs.rows]
    # As long as the texts can be: short sources are not to be compared with long texts.
    longest = pairs.lengths.max()
    greedy = [ids[:longest] for ids in greedy_rollouts(run.backbone, av, v_Md)]
    scores_MM = fve_matrix(v_Md, re_encode(run.backbone, greedy, CORRECTED), targets.mu)
    column.add(rows.GREEDY.cen, scores_MM.diagonal())
    column.add(rows.OTHERS_GREEDY.cen, off_diagonal(scores_MM).mean(axis=1))
    column.difference(rows.GREEDY.cen, rows.OTHERS_GREEDY.cen)
    column.add("greedy_is_source", [ids[: len(text)] == text for ids, text in zip(greedy, pairs.sequences)])
    return column


def shortened(run: Run, targets: Targets, n_tokens: int) -> Targets:
    """The targets' first n tokens as sources of their own, v taken at the last of them."""
    ids, lengths = targets.ids[:, :n_tokens], np.minimum(targets.lengths, n_tokens)
    v = run.backbone.encode([row[:n].tolist() for row, n in zip(ids, lengths)], start=True)
    arrays = {"ids": ids, "lengths": lengths, "v": v}
    return dataclasses.replace(targets, **arrays, sha256=arrays_hash(arrays))


EPOCHS, RATE = 4, 3e-4
# What is compared with the AV that training began from.
GAINS = (rows.GREEDY_MINUS_OTHERS.cen, rows.NATS_GAINED[0].key)


@dataclass(frozen=True)
class Teachers:
    """Texts to train on, and their mean centred score, ``None`` for the sources themselves."""

    pairs: Texts
    score: Optional[float] = None


def iterate(run: Run, targets: Targets, n: int, k: int, rounds: int) -> list[dict]:
    """Records of the run's own AV, of each round of expert iteration, of as much training on the sources' own texts,
    and of training on what the guided search finds; each measured on held-out targets as a study measures, and against
    the AV that it began from, paired by target."""
    split = make_split(run, targets)
    sources, validation = split.pairs.take(split.train[:n]), split.pairs.take(split.validation)
    full, start = held_out_pairs(run, targets), load_av(run)
    own, av = measure(run, targets, start, full), start
    records = [_av_record("the run's own AV", own)]
    for r in range(1, rounds + 1):
        teachers = best_rollouts(run, targets, av, sources.rows, k, r)
        av = train_on(run, targets, av, teachers, validation)
        records.append(_av_record(f"round {r}: its own best of {k}", measure(run, targets, av, full), own, teachers))
    again = Teachers(sources)
    control = measure(run, targets, train_on(run, targets, start, again, validation), full)
    records.append(_av_record("control: the sources again", control, own, again))
    teachers = guided_texts(run, targets, sources.rows, k)
    length = int(teachers.pairs.lengths[0, 0])
    ends = tail_pairs(targets, targets.held_out, length)
    own = measure(run, targets, start, ends)
    taught = measure(run, targets, train_on(run, targets, start, teachers, validation), ends)
    records.append(_av_record(f"the run's own AV, first {length} tokens", own))
    return [*records, _av_record(f"the guided search's {length} tokens", taught, own, teachers)]


def _av_record(label: str, column: Column, start: Optional[Column] = None, teachers: Optional[Teachers] = None) -> dict:
    """What is kept of an AV, with what it gained on the one that training began from if there was any."""
    if teachers is None:
        return {"label": label, **column.to_json()}
    for key in GAINS:
        column.add(f"{key}_gained", column.per_target[key] - start.per_target[key])
    about = {"pairs": len(teachers.pairs.rows), "teachers_cen": teachers.score}
    return {"label": label, **about, **column.to_json()}


def best_rollouts(
    run: Run, targets: Targets, av: ActivationVerbalizer, chosen: list[int], k: int, number: int
) -> Teachers:
    """The best of k rollouts of each row by centred score, re-encoded behind BOS."""
    backbone, settings = run.backbone, SamplingSettings(max_new_tokens=run.sizes.max_new_tokens)

    @torch.inference_mode()
    def draw(part: slice) -> dict[str, np.ndarray]:
        v_Md = targets.v[chosen[part]]
        prompt_BPd = av(torch.from_numpy(v_Md).to(backbone.device), backbone.dtype).repeat_interleave(k, dim=0)
        found = sample(backbone, prompt_BPd, settings, row_streams(run.seed, f"iteration {number}", chosen[part], k))
        h = backbone.encode([found.sequence(i) for i in range(len(prompt_BPd))], start=True)
        score_MK = fve(h.reshape(len(v_Md), k, -1), v_Md[:, None], targets.mu)
        best = np.arange(len(v_Md)) * k + score_MK.argmax(axis=1)
        return {"ids": found.ids[best], "lengths": found.lengths[best], "score": score_MK.max(axis=1)}

    per_chunk, label = max(1, backbone.sample_batch // k), f"best of {k}, round {number}"
    return _teachers(run, targets, chosen, {"k": k, "av": _hash(av)}, per_chunk, draw, label)


def guided_texts(run: Run, targets: Targets, chosen: list[int], k: int) -> Teachers:
    """What the guided search finds for each row, from k draws of the reader, for the forward tokens of an AV's
    best-of-K."""
    backbone, reader = run.backbone, fit_reader(run, targets)

    def search(part: slice) -> dict[str, np.ndarray]:
        v_Md, streams_B = targets.v[chosen[part]], row_streams(run.seed, "taught", chosen[part], k + 1)
        drawn = read_rollouts(reader, backbone, v_Md, k, streams_B)
        found = guided_search(reader, backbone, v_Md, targets.mu, drawn, av_forward_tokens(run.config))
        return {"ids": found.ids, "lengths": np.full(len(v_Md), reader.n), "score": found.curve[:, -1]}

    return _teachers(run, targets, chosen, {"k": k}, GUIDED_BATCH, search, "guided search")


def _teachers(
    run: Run, targets: Targets, chosen: list[int], plan: dict, per_chunk: int, make: Callable, label: str
) -> Teachers:
    plan = {**run.folder.conditions, "targets": targets.sha256, "rows": len(chosen), "by": label, **plan}
    chunks = ChunkStore(run.folder.file(f"iteration/{json_hash(plan)[:16]}.chunks"), plan)
    found = chunks.fill(len(chosen), per_chunk, make, label, "target")
    ids = [row[:length].tolist() for row, length in zip(found["ids"], found["lengths"])]
    return Teachers(Texts.of("source", chosen, ids), float(found["score"].mean()))


def train_on(
    run: Run, targets: Targets, av: ActivationVerbalizer, teachers: Teachers, validation: Texts
) -> ActivationVerbalizer:
    """The AV after some epochs on the teachers' texts, from where it stands; it is left as it was. ``validation``:
    sources, whatever is trained on, so that the curves are comparable."""
    pairs = teachers.pairs
    both = np.concatenate([pairs.rows, validation.rows])
    together = Texts.of("source", both, pairs.sequences + validation.sequences)
    own = Split(together, np.arange(len(pairs.rows)), np.arange(len(pairs.rows), len(together.rows)))
    apart = run.inside(f"iteration/{json_hash({'texts': pairs.sequences, 'from': _hash(av)})[:16]}")
    recipe = Recipe(steps=EPOCHS * math.ceil(len(pairs.rows) / BATCH_SIZE), learning_rate=RATE)
    trainer = Trainer(apart, targets, recipe, own, av)
    trainer.train()
    return trainer.av.eval()


def _hash(av: ActivationVerbalizer) -> str:
    return arrays_hash({name: tensor.numpy() for name, tensor in av.trainable().items()})
