"""What each slip of PROTOCOL.md §7 moves: from ``paper``, one corrected after the other, and each alone.

Here the model encodes; :mod:`nla_utils.scores.ablation` scores.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from nla_utils.artefacts import SPECS, Artefact
from nla_utils.config import N_PARAPHRASES
from nla_utils.progress import Progress
from nla_utils.protocol import LADDER, PROTOCOLS, Protocol, ablation_steps, encoding_key
from nla_utils.run import Run
from nla_utils.stages.ceilings import Ceilings, Paraphrases, draw_paraphrases
from nla_utils.stages.encoding import re_encode
from nla_utils.stages.targets import Targets

ARTEFACT = "ablation"
# The paraphrases that notebook 03 keeps: how they were prompted for, and of which targets.
KEPT = {(p.left_prompts, p.held_out) for p in PROTOCOLS}

STEPS: dict[str, Protocol] = {encoding_key(p): p for way in ablation_steps().values() for p in way.values()}
SPECS[ARTEFACT] = lambda config: {"n_eval": config.sizes.n_eval, "steps": list(STEPS)}


@dataclass
class Ablation:
    """Replay (M, d) and paraphrases (M, 8, d) by :func:`~nla_utils.protocol.encoding_key`, and the paraphrases that
    notebook 03 has not drawn, by the key that is the first to read them."""

    replay: dict[str, np.ndarray]
    paraphrase: dict[str, np.ndarray]
    drawn: dict[str, Paraphrases]
    sha256: str

    @classmethod
    def of(cls, artefact: Artefact) -> "Ablation":
        found: dict[str, dict[str, np.ndarray]] = {"replay": {}, "paraphrase": {}, "drawn": {}}
        for name, array in artefact.tensors.items():
            what, _, key = name.partition(".")
            found[what][key] = array
        keys = sorted({key.rpartition(".")[0] for key in found["drawn"]})
        drawn = {k: Paraphrases(*(found["drawn"][f"{k}.{f.name}"] for f in fields(Paraphrases))) for k in keys}
        return cls(found["replay"], found["paraphrase"], drawn, artefact.sha256)


def make_ablation(run: Run, targets: Targets, ceilings: Ceilings) -> Ablation:
    """Replay and paraphrases encoded for every step, or what is on disk. What notebook 03 has encoded is taken."""
    if run.folder.has(ARTEFACT):
        return load_ablation(run)
    arrays, drawn, tensors = _known(ceilings), {}, {}
    with Progress(total=len(STEPS), desc="slip by slip", unit="step") as bar:
        for key, protocol in STEPS.items():
            rows = targets.eval_rows(protocol)
            if f"replay.{key}" not in arrays:
                arrays[f"replay.{key}"] = re_encode(run.backbone, targets.sequences(rows), protocol)
            if f"paraphrase.{key}" not in arrays:
                kind = (protocol.left_prompts, protocol.held_out)
                if kind not in drawn:
                    drawn[kind] = draw_paraphrases(run, targets, rows, protocol)
                    if kind not in KEPT:
                        tensors |= drawn[kind].named(f"drawn.{key}.")
                h_nd = re_encode(run.backbone, drawn[kind].sequences, protocol)
                arrays[f"paraphrase.{key}"] = h_nd.reshape(len(rows), N_PARAPHRASES, -1)
            bar.update()
    tensors |= {f"{what}.{key}": arrays[f"{what}.{key}"] for key in STEPS for what in ("paraphrase", "replay")}
    parents = {"targets": targets.sha256, "ceilings": ceilings.sha256}
    return Ablation.of(run.folder.save(ARTEFACT, tensors, made_from=parents, seed=run.seed))


def _known(ceilings: Ceilings) -> dict[str, np.ndarray]:
    """What notebook 03 has encoded under a step's protocol: both protocols' own texts, and the replay ladder."""
    arrays = {f"replay.{encoding_key(p)}": ceilings.ladder[step] for step, p in LADDER.items()}
    for protocol in PROTOCOLS:
        texts, key = ceilings.texts[protocol.name], encoding_key(protocol)
        arrays |= {f"replay.{key}": texts.replay, f"paraphrase.{key}": texts.paraphrase}
    return arrays


def load_ablation(run: Run) -> Ablation:
    """The ablation's arrays; raises ``ArtefactError`` if notebook 03 has not made them."""
    return Ablation.of(run.folder.load(ARTEFACT))
