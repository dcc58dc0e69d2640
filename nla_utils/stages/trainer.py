"""Supervised training of an AV: batches, loss, validation by greedy rollouts, resume (PROTOCOL.md §2)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nla_utils import workers
from nla_utils.artefacts import arrays_hash, atomic_write, derive_seed, require_same
from nla_utils.config import BATCH_SIZE, GRAD_CLIP, LEARNING_RATE, VALIDATION_SHARE, RunConfig
from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.checks import check_frozen
from nla_utils.lm.registry import resolve
from nla_utils.lm.sampling import SamplingSettings, pad, sample
from nla_utils.metrics import fve
from nla_utils.progress import Progress
from nla_utils.run import Run
from nla_utils.stages.graphed_step import GraphedStep
from nla_utils.stages.pairs import Split, TextPairs, make_split
from nla_utils.stages.source_loss import source_loss
from nla_utils.stages.targets import Targets
from nla_utils.stages.verbalizer import ActivationVerbalizer, text_hidden

# Validation pairs whose cross-entropies are taken.
N_LOSSES = 64


@dataclass
class History:
    """What training saw: the loss of every step, and each validation."""

    loss: list[float] = field(default_factory=list)
    validation: list[dict] = field(default_factory=list)

    def best(self, key: str, every: int) -> dict:
        """The validation that is best by a score, of those at multiples of ``every`` steps, as the authors save
        checkpoints; of all of them where training is shorter than that."""
        saved = [r for r in self.validation if r["step"] % every == 0]
        return max(saved or self.validation, key=lambda r: r[key])


def batches_of_epoch(run: Run, split: Split, epoch: int) -> list[np.ndarray]:
    """The batches of one epoch, the same whenever asked: training resumes at a step, not a shuffle."""
    rng = np.random.default_rng(derive_seed(run.seed, "epoch", epoch))
    order = rng.permutation(split.train)
    return [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]


def pair_loss(backbone: Backbone, av: ActivationVerbalizer, v_Bd: Tensor, texts: list[list[int]]) -> Tensor:
    """Teacher-forced token cross-entropy of texts given ``[proj(v), prefix]``, mean over valid tokens."""
    ids_BT, valid_BT = (x.to(backbone.device) for x in pad(texts, backbone.pad_id, "right"))
    prefix_BPd, valid_BT = av(v_Bd.to(backbone.device), backbone.dtype), valid_BT.bool()
    hidden_nd = text_hidden(backbone, prefix_BPd, backbone.embed(ids_BT))[valid_BT]
    return backbone.cross_entropy(hidden_nd, ids_BT[valid_BT])


@torch.inference_mode()
def greedy_rollouts(backbone: Backbone, av: ActivationVerbalizer, v_Nd: np.ndarray) -> list[list[int]]:
    """Token ids of the AV's greedy text for each v."""
    greedy, ids = SamplingSettings(max_new_tokens=av.config.max_new_tokens, temperature=0.0), []
    for first in range(0, len(v_Nd), backbone.sample_batch):
        v_Bd = torch.from_numpy(v_Nd[first : first + backbone.sample_batch]).to(backbone.device)
        samples = sample(backbone, av(v_Bd, backbone.dtype), greedy, None)
        ids += [samples.sequence(i) for i in range(len(v_Bd))]
    return ids


def validate(backbone: Backbone, av: ActivationVerbalizer, targets: Targets, pairs: TextPairs) -> dict:
    """Scores of the AV's greedy texts of validation pairs, re-encoded, and what their v are worth to it.

    Returns ``fve_nrm`` (raw, no BOS: the paper's criterion, §2), ``fve_nrm_cen`` (centred, with BOS), and of the
    first pairs ``nats_own``, ``nats_other`` (one other target), ``nats_mean`` and ``nats_none`` a token (§9).
    """
    v = targets.v[pairs.rows]
    ids = greedy_rollouts(backbone, av, v)
    loss = source_loss(backbone, av, targets, pairs.take(range(min(N_LOSSES, len(v)))), n_others=1)
    return {
        "fve_nrm": float(fve(backbone.encode(ids, start=False), v).mean()),
        "fve_nrm_cen": float(fve(backbone.encode(ids, start=True), v, targets.mu).mean()),
        **{f"nats_{name}": float(nats_M.mean()) for name, nats_M in loss.per_target.items()},
    }


@dataclass(frozen=True)
class Recipe:
    """How an AV is trained; the paper's way where nothing is given.

    ``pairs`` and ``steps``: of how many, ``None`` for all of the run's. ``inject_norm``: v is rescaled to this norm.
    ``span``: the AV is to write the source's last n tokens, not all of it.
    """

    pairs: Optional[int] = None
    steps: Optional[int] = None
    learning_rate: float = LEARNING_RATE
    inject_norm: Optional[float] = None
    span: Optional[int] = None


def training_spec(config: RunConfig, recipe: Recipe = Recipe()) -> dict:
    """What a trained AV depends on beside the run's identity and its targets."""
    s = config.sizes
    return {
        "recipe": asdict(recipe), "batch_size": BATCH_SIZE, "grad_clip": GRAD_CLIP, "epochs": s.epochs,
        "train_rows": s.n_train_rows, "longest_text": s.max_new_tokens, "prefix": resolve(config.backbone).num_prefix_tokens,
        "validation": [VALIDATION_SHARE, s.n_validate, s.validate_every, N_LOSSES],
        # μ of the pool centres one of the scores that validation keeps.
        "pool": [s.n_eval, s.pool_size],
    }  # fmt: skip


class Trainer:
    """Training of one AV; its complete state is in one file, replaced atomically at every validation.

    ``split``: what is trained and validated on, the run's own pairs if not given. ``start``: the AV to go on from, which
    is left as it is; a fresh one if not given.
    """

    def __init__(
        self, run: Run, targets: Targets, recipe: Recipe = Recipe(), split: Optional[Split] = None,
        start: Optional[ActivationVerbalizer] = None,
    ):  # fmt: skip
        self.run, self.backbone, self.targets, self.recipe = run, run.backbone, targets, recipe
        split = split or make_split(run, targets, recipe.span)
        if not len(split.train):
            raise ArtefactError("no text of the targets is known, so no AV can be trained on them; give one with --av")
        self.split = replace(split, train=split.train[: recipe.pairs])
        self.av = ActivationVerbalizer.fresh(run.backbone, run.sizes.max_new_tokens, recipe.span, recipe.inject_norm)
        if start is not None:
            self.av.load_trainable(start.trainable(), "the AV to go on from")
        self.params = [self.av.proj.weight, self.av.prefix_embeds]
        self.optimizer = torch.optim.AdamW(self.params, lr=recipe.learning_rate, weight_decay=0.0)
        self.history = History()
        self.best = self.av.trainable()
        self.steps_per_epoch = len(batches_of_epoch(run, self.split, 0))
        self.total_steps = recipe.steps or self.steps_per_epoch * run.sizes.epochs
        self.graphed: Optional[GraphedStep] = None
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
            # In place after the first step: a replayed graph knows the gradient by its address.
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.zero_()
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
        n_tokens = sum(len(self.split.pairs.ids[i]) for i in batch)
        if self.backbone.device.type == "cuda" and workers.size() == 1:
            self.graphed = self.graphed or GraphedStep(self.backbone, self.av, max(map(len, self.split.pairs.ids)))
            return self.graphed(v_Bd, texts)
        loss = pair_loss(self.backbone, self.av, v_Bd, texts) * (sum(map(len, texts)) / n_tokens)
        loss.backward()
        return loss.detach()

    def _validate(self) -> None:
        pairs = self.split.pairs.take(self.split.validation[: self.run.sizes.n_validate])
        record = validate(self.backbone, self.av, self.targets, pairs)
        self.history.validation.append({"step": self.step, **record})
        if self.history.best("fve_nrm", self.run.sizes.validate_every)["step"] == self.step:
            self.best = self.av.trainable()

    def _save_state(self) -> None:
        tensors = {f"best.{k}": v for k, v in self.best.items()}
        tensors |= self.av.trainable()
        for i, p in enumerate(self.params):
            state = self.optimizer.state[p]
            tensors |= {f"adam.{i}.{k}": state[k].detach().float().cpu() for k in ("exp_avg", "exp_avg_sq", "step")}
        record = {"plan": self._plan(), "loss": self.history.loss, "validation": self.history.validation}
        record["sha256"] = arrays_hash({k: x.numpy() for k, x in tensors.items()})
        if workers.leads():
            atomic_write(self.state_file, save(tensors, metadata={"record": json.dumps(record)}))

    def _plan(self) -> dict:
        plan = {**self.run.folder.conditions, "targets": self.targets.sha256}
        return plan | training_spec(self.run.config, self.recipe)

    def _resume(self) -> None:
        try:
            with safe_open(self.state_file, "pt") as f:
                record = json.loads(f.metadata()["record"])
                tensors = {k: f.get_tensor(k) for k in f.keys()}
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            record, tensors = {}, {}
        if record.get("sha256") != arrays_hash({k: x.numpy() for k, x in tensors.items()}):
            raise ArtefactError(f"{self.state_file} is truncated or altered; delete it and rerun")
        remedy = f"go back to that, or delete {self.state_file} to train anew"
        require_same(self.state_file, record["plan"], self._plan(), remedy)
        self.history = History(record["loss"], record["validation"])
        self.best = {k: tensors[f"best.{k}"] for k in self.best}
        self.av.load_trainable({k: tensors[k] for k in self.best}, str(self.state_file))
        for i, p in enumerate(self.params):
            self.optimizer.state[p] = {
                k: tensors[f"adam.{i}.{k}"].to("cpu" if k == "step" else p.device)
                for k in ("exp_avg", "exp_avg_sq", "step")
            }
