"""The AV of a run: trained, or taken as released; its record (PROTOCOL.md §2)."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

from nla_utils.artefacts import SPECS
from nla_utils.config import RunConfig
from nla_utils.lm.registry import resolve
from nla_utils.lm.releases import fetch_av
from nla_utils.run import Run
from nla_utils.stages.targets import Targets
from nla_utils.stages.trainer import Trainer, training_spec
from nla_utils.stages.verbalizer import ARTEFACT, ActivationVerbalizer, av_hash, checkpoint_record, export_av, import_av


def spec(config: RunConfig) -> dict:
    """What the AV depends on beside the run's identity and its targets: how it is trained, or whose it is."""
    if config.av is None:
        return {"av_sha256": None, **training_spec(config)}
    return {"av_sha256": av_hash(fetch_av(config.av, resolve(config.backbone)))}


SPECS[ARTEFACT] = spec


def train_av(run: Run, targets: Targets) -> dict:
    """Train the AV, or do nothing if a finished one is on disk; returns its sidecar.

    The checkpoint kept is the best by the paper's rule: raw fve_nrm of the validation pairs, at multiples of the
    validation interval. The last step is validated too, to say what it would give; it is kept only by a run that is shorter
    than one interval.
    """
    if run.folder.has(ARTEFACT):
        return run.folder.load(ARTEFACT).sidecar
    if run.config.av is not None:
        return take_released(run, targets)
    trainer = Trainer(run, targets)
    trainer.train()
    history, split = trainer.history, trainer.split
    every = run.sizes.validate_every
    best = history.best("fve_nrm", every)
    trainer.av.load_trainable(trainer.best, "best checkpoint")
    # Before the artefact, whose sidecar says that all is finished.
    export_av(trainer.av, run.folder.file("av"), best["fve_nrm"], best["step"])
    artefact = run.folder.save(
        ARTEFACT,
        {k: v.numpy() for k, v in trainer.best.items()},
        made_from={"targets": targets.sha256},
        seed=run.seed,
        pairs=len(split.pairs.rows),
        skipped_pairs=split.pairs.skipped,
        changed_pairs=split.pairs.changed,
        train_pairs=len(split.train),
        train_rows=sorted(split.pairs.rows[i] for i in split.train),
        validation_rows=[split.pairs.rows[i] for i in split.validation],
        trainable_params=sum(p.numel() for p in trainer.params),
        steps=trainer.step,
        best_step=best["step"],
        best_val_fve_nrm=best["fve_nrm"],
        best_step_by_centred=history.best("fve_nrm_cen", every)["step"],
        loss=history.loss,
        validation=history.validation,
    )
    trainer.state_file.unlink(missing_ok=True)
    return artefact.sidecar


def take_released(run: Run, targets: Targets) -> dict:
    """A released AV as this run's: nothing is trained, so there is no loss and no row was trained on.

    Raises ``SourceError`` if it cannot be fetched, ``ArtefactError`` if it does not fit the backbone and layer.
    """
    source = fetch_av(run.config.av, run.backbone.spec)
    av, record = import_av(source, run.backbone), checkpoint_record(source)
    unknown = ("pairs", "skipped_pairs", "changed_pairs", "train_pairs", "best_step_by_centred")
    export_av(av, run.folder.file("av"), record["val_fve_nrm"], record["step"])
    artefact = run.folder.save(
        ARTEFACT,
        {k: v.numpy() for k, v in av.trainable().items()},
        made_from={"targets": targets.sha256},
        seed=run.seed,
        released=run.config.av,
        released_from=source.name,
        sampling=av.sampling(run.sizes.max_new_tokens).record(),
        **dict.fromkeys(unknown),
        # It never saw targets drawn here; which of the released ones it was trained on is not published.
        train_rows=[] if run.config.released_targets is None else None,
        validation_rows=[],
        trainable_params=sum(p.numel() for p in av.parameters()),
        steps=record["step"],
        best_step=record["step"],
        best_val_fve_nrm=record["val_fve_nrm"],
        loss=[],
        validation=[],
    )
    return artefact.sidecar


def load_av(run: Run) -> ActivationVerbalizer:
    """The trained AV of this run; raises ``ArtefactError`` if notebook 02 has not made it."""
    artefact = run.folder.load(ARTEFACT)
    if run.config.av is not None:
        return import_av(run.folder.file("av"), run.backbone).eval()
    av = ActivationVerbalizer.fresh(run.backbone, run.sizes.max_new_tokens)
    tensors = {k: torch.from_numpy(np.array(v)) for k, v in artefact.tensors.items()}
    return av.load_trainable(tensors, str(artefact.path)).eval()


def describe(sidecar: dict, targets: Targets) -> dict:
    """The figures of notebook 02: pairs, steps, curves, which step each criterion chose, and how many of each
    evaluation set were trained on."""
    keys = (
        "pairs", "skipped_pairs", "changed_pairs", "train_pairs", "trainable_params", "steps", "best_step",
        "best_val_fve_nrm", "best_step_by_centred", "loss", "validation",
    )  # fmt: skip
    return {
        **{k: sidecar[k] for k in keys},
        **{k: sidecar[k] for k in ("released", "released_from") if k in sidecar},
        **{k: v for k, v in sidecar["spec"].items() if k == "av_sha256" and v},
        "in_sample_trained_on": _trained_on(sidecar, targets.in_sample),
        "held_out_trained_on": _trained_on(sidecar, targets.held_out),
    }


def _trained_on(sidecar: dict, rows: np.ndarray) -> Optional[int]:
    """How many of the rows the AV was trained on; ``None`` where its release does not say."""
    return None if sidecar["train_rows"] is None else int(np.isin(rows, sidecar["train_rows"]).sum())
