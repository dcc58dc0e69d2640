"""Supervised training of the AV, with validation by greedy rollouts and resume (PROTOCOL.md §2)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nla_utils import workers
from nla_utils.artefacts import arrays_hash, atomic_write, derive_seed
from nla_utils.config import BATCH_SIZE, GRAD_CLIP, LEARNING_RATE
from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.checks import check_frozen
from nla_utils.lm.cross_entropy import head_cross_entropy
from nla_utils.lm.registry import fetch_av
from nla_utils.lm.sampling import SAMPLE_BATCH, SamplingSettings, pad, sample
from nla_utils.metrics import fve
from nla_utils.progress import Progress
from nla_utils.run import Run
from nla_utils.stages.pairs import Split, make_split
from nla_utils.stages.targets import Targets
from nla_utils.stages.verbalizer import ActivationVerbalizer, checkpoint_record, export_av, import_av

ARTEFACT = "best_av"


@dataclass
class History:
    """What training saw: the loss of every step, and each validation."""

    loss: list[float] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)

    def best(self, key: str) -> dict:
        return max(self.validation, key=lambda r: r[key])


def batches_of_epoch(run: Run, split: Split, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, the same whenever asked: training resumes at a step, not a shuffle."""
    rng = np.random.default_rng(derive_seed(run.seed, "epoch", epoch))
    order = rng.permutation(split.train)
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]


def pair_loss(backbone: Backbone, av: ActivationVerbalizer, v_Bd: Tensor, texts: list[list[int]]) -> Tensor:
    """Teacher-forced token cross-entropy of texts given ``[proj(v), prefix]``, mean over valid tokens."""
    ids_BT, valid_BT = (x.to(backbone.device) for x in pad(texts, backbone.pad_id, "right"))
    prefix_BPd = av(v_Bd.to(backbone.device), backbone.dtype)
    inputs_BSd = torch.cat([prefix_BPd, backbone.embed(ids_BT)], dim=1)
    hidden_BSd = backbone.last_hidden(inputs_embeds=inputs_BSd)
    # The last prefix position predicts the first token.
    hidden_nd, valid_BT = hidden_BSd[:, prefix_BPd.shape[1] - 1 : -1], valid_BT.bool()
    return head_cross_entropy(hidden_nd[valid_BT], backbone.head_weight, ids_BT[valid_BT], backbone.softcap)


@torch.inference_mode()
def greedy_rollouts(backbone: Backbone, av: ActivationVerbalizer, v_Nd: np.ndarray) -> list[list[int]]:
    """Token ids of the AV's greedy text for each v."""
    greedy, ids = SamplingSettings(max_new_tokens=av.config.max_new_tokens, temperature=0.0), []
    for first in range(0, len(v_Nd), SAMPLE_BATCH):
        v_Bd = torch.from_numpy(v_Nd[first : first + SAMPLE_BATCH]).to(backbone.device)
        samples = sample(backbone, av(v_Bd, backbone.dtype), greedy, seed=0)
        ids += [samples.sequence(i) for i in range(len(v_Bd))]
    return ids


def validate(backbone: Backbone, av: ActivationVerbalizer, targets: Targets, rows: list[int]) -> dict:
    """Scores of the AV's greedy texts of validation targets, re-encoded.

    Returns ``fve_nrm`` (raw, no BOS: the paper's criterion, §2) and ``fve_nrm_cen`` (centred, with BOS).
    """
    v = targets.v[rows]
    ids = greedy_rollouts(backbone, av, v)
    return {
        "fve_nrm": float(fve(backbone.encode(ids, start=False), v).mean()),
        "fve_nrm_cen": float(fve(backbone.encode(ids, start=True), v, targets.mu).mean()),
    }


class Trainer:
    """Training of one AV; its complete state is in one file, replaced atomically at every validation.

    ``span``: the AV is trained to write the source's last n tokens, not all of it as the paper's is.
    """

    def __init__(self, run: Run, targets: Targets, span: Optional[int] = None):
        self.run, self.backbone, self.targets = run, run.backbone, targets
        self.split = make_split(run, targets, span)
        self.av = ActivationVerbalizer.fresh(run.backbone, run.sizes.max_new_tokens, span)
        self.params = [self.av.proj.weight, self.av.prefix_embeds]
        self.optimizer = torch.optim.AdamW(self.params, lr=LEARNING_RATE, weight_decay=0.0)
        self.history = History()
        self.best = self.av.trainable()
        self.steps_per_epoch = len(batches_of_epoch(run, self.split, 0))
        self.total_steps = self.steps_per_epoch * run.sizes.epochs
        self.state_file: Path = run.folder.file("training.partial.safetensors")
        if self.state_file.exists():
            self._resume()

    @property
    def step(self) -> int:
        return len(self.history.loss)

    def train(self) -> None:
        """Run to the end, validating every ``validate_every`` steps and after the last one."""
        every = self.run.sizes.validate_every
        with Progress(total=self.total_steps, initial=self.step, desc="training the AV", unit="step") as bar:
            while self.step < self.total_steps:
                self.history.loss.append(self._train_step())
                bar.update()
                if self.step % every == 0 or self.step == self.total_steps:
                    self._validate()
                    self._save_state()
        check_frozen(self.backbone)

    def _train_step(self) -> float:
        epoch, position = divmod(self.step, self.steps_per_epoch)
        batch = batches_of_epoch(self.run, self.split, epoch)[position]
        for p in self.params:
            p.grad = torch.zeros_like(p)
        loss = self._share_of_loss(batch)
        workers.add_up([loss, *(p.grad for p in self.params)])
        torch.nn.utils.clip_grad_norm_(self.params, GRAD_CLIP)
        self.optimizer.step()
        return loss.item()

    def _share_of_loss(self, batch: np.ndarray) -> Tensor:
        """This process's part of the batch's mean loss over tokens, its gradient added to the parameters'."""
        own = batch[workers.rank() :: workers.size()]
        if len(own) == 0:
            return torch.zeros((), device=self.backbone.device)
        texts = [self.split.pairs.ids[i] for i in own]
        v_Bd = torch.from_numpy(self.targets.v[[self.split.pairs.rows[i] for i in own]])
        share = sum(map(len, texts)) / sum(len(self.split.pairs.ids[i]) for i in batch)
        loss = pair_loss(self.backbone, self.av, v_Bd, texts) * share
        loss.backward()
        return loss.detach()

    def _validate(self) -> None:
        rows = [self.split.pairs.rows[i] for i in self.split.validation[: self.run.sizes.n_validate]]
        record = validate(self.backbone, self.av, self.targets, rows)
        self.history.validation.append({"step": self.step, **record})
        if self.history.best("fve_nrm")["step"] == self.step:
            self.best = self.av.trainable()

    def _save_state(self) -> None:
        tensors = {f"best.{k}": v for k, v in self.best.items()}
        tensors |= self.av.trainable()
        for i, p in enumerate(self.params):
            state = self.optimizer.state[p]
            tensors |= {f"adam.{i}.{k}": state[k].detach().float().cpu() for k in ("exp_avg", "exp_avg_sq", "step")}
        record = {"identity": self._plan(), "loss": self.history.loss, "validation": self.history.validation}
        record["sha256"] = arrays_hash({k: x.numpy() for k, x in tensors.items()})
        if workers.leads():
            atomic_write(self.state_file, save(tensors, metadata={"record": json.dumps(record)}))

    def _plan(self) -> dict:
        plan = {"targets": self.targets.sha256, "epochs": self.run.sizes.epochs, "seed": self.run.seed}
        return {**self.run.folder.identity, **plan, "target_span": self.av.config.target_span}

    def _resume(self) -> None:
        try:
            with safe_open(self.state_file, "pt") as f:
                record = json.loads(f.metadata()["record"])
                tensors = {k: f.get_tensor(k) for k in f.keys()}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            record, tensors = {}, {}
        if record.get("sha256") != arrays_hash({k: x.numpy() for k, x in tensors.items()}):
            raise ArtefactError(f"{self.state_file} is truncated or altered; delete it and rerun")
        if record["identity"] != self._plan():
            raise ArtefactError(f"{self.state_file} belongs to another training run; delete it and rerun")
        self.history = History(record["loss"], record["validation"])
        self.best = {k: tensors[f"best.{k}"] for k in self.best}
        self.av.load_trainable({k: tensors[k] for k in self.best}, str(self.state_file))
        for i, p in enumerate(self.params):
            self.optimizer.state[p] = {
                k: tensors[f"adam.{i}.{k}"].to("cpu" if k == "step" else p.device)
                for k in ("exp_avg", "exp_avg_sq", "step")
            }


def train_av(run: Run, targets: Targets) -> dict:
    """Train the AV, or do nothing if a finished one is on disk; returns its sidecar.

    The checkpoint kept is the best by the paper's criterion (raw fve_nrm of the validation pairs);
    unlike the paper the last step is validated too, so that a short run keeps one.
    """
    if run.folder.has(ARTEFACT):
        return run.folder.load(ARTEFACT).sidecar
    if run.config.av is not None:
        return take_released(run, targets)
    trainer = Trainer(run, targets)
    trainer.train()
    history, split = trainer.history, trainer.split
    best = history.best("fve_nrm")
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
        best_step_by_centred=history.best("fve_nrm_cen")["step"],
        loss=history.loss,
        validation=history.validation,
    )
    trainer.av.load_trainable(trainer.best, "best checkpoint")
    export_av(trainer.av, run.folder.file("av"), best["fve_nrm"], best["step"])
    trainer.state_file.unlink(missing_ok=True)
    return artefact.sidecar


def take_released(run: Run, targets: Targets) -> dict:
    """A released AV as this run's: nothing is trained, so there is no loss and no row was trained on.

    Raises ``SourceError`` if it cannot be fetched, ``ArtefactError`` if it does not fit the backbone and layer.
    """
    source = fetch_av(run.config.av)
    av, record = import_av(source, run.backbone), checkpoint_record(source)
    unknown = ("pairs", "skipped_pairs", "changed_pairs", "train_pairs", "best_step_by_centred")
    artefact = run.folder.save(
        ARTEFACT,
        {k: v.numpy() for k, v in av.trainable().items()},
        made_from={"targets": targets.sha256},
        seed=run.seed,
        released=run.config.av,
        released_from=source.name,
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
    export_av(av, run.folder.file("av"), record["val_fve_nrm"], record["step"])
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
        "in_sample_trained_on": _trained_on(sidecar, targets.in_sample),
        "held_out_trained_on": _trained_on(sidecar, targets.held_out),
    }


def _trained_on(sidecar: dict, rows: np.ndarray) -> Optional[int]:
    """How many of the rows the AV was trained on; ``None`` where its release does not say."""
    return None if sidecar["train_rows"] is None else int(np.isin(rows, sidecar["train_rows"]).sum())
