"""What each slip of PROTOCOL.md §7 moves: from ``paper``, one corrected after the other, and each alone."""

from __future__ import annotations

from typing import Optional

import numpy as np

from nla_utils import metrics, paper_way
from nla_utils.backbone import Backbone
from nla_utils.ceilings import draw_paraphrases, stored_paraphrases
from nla_utils.config import N_PARAPHRASES, RunConfig
from nla_utils.evaluation import Column
from nla_utils.metrics import fve, fve_matrix
from nla_utils.progress import Progress
from nla_utils.rollouts import rollouts_of_rows
from nla_utils.store import Artefact, RunFolder
from nla_utils.targets import Targets

ARTEFACT = "ablation"
# The first five change what is encoded, the last two only how it is scored.
ENCODING_SLIPS = ("left_pad", "bos", "eos_text", "pad_generate", "in_sample")
SLIPS = (*ENCODING_SLIPS, "self_mu", "k_mismatch")
Fixed = frozenset[str]


def in_order() -> dict[str, Fixed]:
    """``paper``, then each slip corrected on top of those before it; the last is ``corrected``."""
    return {"paper": frozenset()} | {s: frozenset(SLIPS[: i + 1]) for i, s in enumerate(SLIPS)}


def alone() -> dict[str, Fixed]:
    """``paper`` with one slip corrected and all the others in force."""
    return {"paper": frozenset()} | {s: frozenset([s]) for s in SLIPS}


def encoding_key(fixed: Fixed) -> str:
    """Name of the arrays that a set of corrected slips is scored from."""
    return "+".join(s for s in ENCODING_SLIPS if s in fixed) or "paper"


def rows_of(targets: Targets, fixed: Fixed) -> np.ndarray:
    return targets.held_out if "in_sample" in fixed else targets.in_sample


def encode_as(backbone: Backbone, sequences: list[list[int]], fixed: Fixed) -> np.ndarray:
    """h (N, d) of sampled sequences with the slips ``left_pad``, ``bos`` and ``eos_text`` in force or not."""
    ids, start = sequences, "bos" in fixed
    if "eos_text" not in fixed:
        ids = [backbone.tokenize_text(backbone.decode_text(s)) for s in sequences]
    if "left_pad" in fixed:
        # A text can be empty (a lone EOS was sampled); the start token alone stands for it.
        return backbone.encode([row or [backbone.start_id] for row in ids], start=start)
    head = [backbone.start_id] if start else []
    return paper_way.encode_padded(backbone, [head + list(row) for row in ids])


def make_ablation(
    run: RunConfig, backbone: Backbone, targets: Targets, ceilings: Artefact, folder: RunFolder
) -> Artefact:
    """Replay and paraphrases encoded for every step, or what is whole on disk.

    Arrays: ``replay.{key}`` (M, d) and ``paraphrase.{key}`` (M, 8, d) for each :func:`encoding_key`.
    """
    if folder.has(ARTEFACT):
        return folder.load(ARTEFACT)
    steps = {encoding_key(f): f for f in (*in_order().values(), *alone().values())}
    tensors: dict[str, np.ndarray] = {}
    paraphrases: dict[tuple[bool, bool], list[list[int]]] = {
        (False, False): stored_paraphrases(ceilings, "paper"),
        (True, True): stored_paraphrases(ceilings, "corrected"),
    }
    with Progress(total=len(steps), desc="slip by slip", unit="step") as bar:
        for key, fixed in steps.items():
            rows, kind = rows_of(targets, fixed), ("pad_generate" in fixed, "in_sample" in fixed)
            if kind not in paraphrases:
                protocol = "corrected" if "pad_generate" in fixed else "paper"
                paraphrases[kind] = draw_paraphrases(run, backbone, targets, rows, protocol, folder)
            h_nd = encode_as(backbone, paraphrases[kind], fixed)
            tensors[f"paraphrase.{key}"] = h_nd.reshape(len(rows), N_PARAPHRASES, -1)
            tensors[f"replay.{key}"] = encode_as(backbone, targets.sequences(rows), fixed)
            bar.update()
    parents = {"targets": targets.sha256, "ceilings": ceilings.sha256}
    return folder.save(ARTEFACT, tensors, made_from=parents, seed=run.seed)


def score_step(targets: Targets, ablation: Artefact, fixed: Fixed, rollouts: Optional[Artefact] = None) -> Column:
    """Centred replay, paraphrase ceiling and floor of one step; with rollouts also greedy, best-of-K and ρ.

    ρ divides by the paraphrase best-of-8; with ``k_mismatch`` corrected, by as many paraphrases as rollouts:
    greedy by one, the best of 8 by the best of 8.
    """
    rows, key = rows_of(targets, fixed), encoding_key(fixed)
    v, pool = targets.v[rows], targets.v[targets.pool]
    mu = targets.mu if "self_mu" in fixed else v.mean(axis=0)
    column = Column(key, len(v))
    column.add("replay", fve(ablation.tensors[f"replay.{key}"], v, mu))
    paraphrase_M8 = fve(ablation.tensors[f"paraphrase.{key}"], v[:, None], mu)
    column.add("paraphrase_bestof8", paraphrase_M8.max(axis=1))
    floor = fve_matrix(v, pool, mu).mean(axis=1) if "self_mu" in fixed else metrics.pair_floor(v, mu)
    column.add("random_floor", floor)
    if rollouts is not None:
        h = rollouts_of_rows(rollouts, rows).h("corrected" if "bos" in fixed else "paper")
        score = fve(h, v[:, None], targets.mu)
        column.add("greedy", score[:, 0])
        column.add("bestofK", score[:, 1:].max(axis=1))
        best, one = paraphrase_M8.max(axis=1), paraphrase_M8.mean(axis=1)
        equal = "k_mismatch" in fixed
        k = min(N_PARAPHRASES, score.shape[1] - 1) if equal else score.shape[1] - 1
        column.ratio("rho_greedy", score[:, 0], floor, one if equal else best)
        column.ratio("rho_bestofK", metrics.exact_k_curve(score[:, 1:], [k])[:, 0], floor, best)
    return column


def score_ablation(targets: Targets, ablation: Artefact, rollouts: Optional[Artefact] = None) -> dict:
    """``{"in_order": {step: column}, "alone": {slip: column}}`` as JSON, the steps in their order."""
    return {
        name: {s: score_step(targets, ablation, fixed, rollouts).to_json() for s, fixed in steps.items()}
        for name, steps in (("in_order", in_order()), ("alone", alone()))
    }
