"""The AV of a run: trained, or taken as released; its record (PROTOCOL.md §2)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nla_utils import store
from nla_utils.config import BATCH_SIZE, GRAD_CLIP, VALIDATION_SHARE, source_name
from nla_utils.encoding import Texts, text_hidden
from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone, pad
from nla_utils.lm.checks import check_frozen
from nla_utils.lm.sampling import SamplingSettings
from nla_utils.lm.weights import RELEASED, fetch_av
from nla_utils.metrics import fve
from nla_utils.run import Run
from nla_utils.store import Progress, arrays_hash, atomic_write, derive_seed, require_same
from nla_utils.targets import Targets
from nla_utils.verbalizer import (
    BEST_AV,
    N_LOSSES,
    ActivationVerbalizer,
    Recipe,
    checkpoint_record,
    export_av,
    import_av,
    published_pairs,
    source_loss,
    training_spec,
)

WARM_UP = 3
# What an unfinished training leaves, and what it keeps of the optimizer there.
STATE, ADAM = "training.partial.safetensors", ("exp_avg", "exp_avg_sq", "step")


def padded_loss(backbone: Backbone, av: ActivationVerbalizer, v_Bd: Tensor, ids_BT: Tensor, share_BT: Tensor) -> Tensor:
    """Teacher-forced cross-entropy of padded texts, each token times its share; the same as ``pair_loss`` where the
    share is 1/n of the n valid tokens and 0 elsewhere."""
    hidden_BTd = text_hidden(backbone, av(v_Bd, backbone.dtype), backbone.embed(ids_BT))
    return backbone.cross_entropy(hidden_BTd.flatten(0, 1), ids_BT.flatten(), share_BT.flatten())


class GraphedStep:
    """The loss of a batch of at most 16 texts of at most ``width`` tokens, and its gradient added to the AV's.

    A parameter's gradient must stay where it is in memory, since the graph writes there.
    """

    def __init__(self, backbone: Backbone, av: ActivationVerbalizer, width: int):
        device, self.backbone, self.av = backbone.device, backbone, av
        self.v_Bd = torch.ones(BATCH_SIZE, backbone.d, device=device)
        self.ids_BT = torch.full((BATCH_SIZE, width), backbone.pad_id, device=device)
        self.share_BT = torch.zeros(BATCH_SIZE, width, device=device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._forward_and_backward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = self._forward_and_backward()

    def _forward_and_backward(self) -> Tensor:
        loss = padded_loss(self.backbone, self.av, self.v_Bd, self.ids_BT, self.share_BT)
        loss.backward()
        return loss.detach()

    def __call__(self, v_Bd: Tensor, texts: list[list[int]]) -> Tensor:
        """Mean loss over the tokens of these texts; their gradient is added to the AV's."""
        ids_BT, mask_BT = pad(texts, self.backbone.pad_id, "right")
        rows, width = ids_BT.shape
        self.share_BT.zero_()
        self.share_BT[:rows, :width] = (mask_BT / mask_BT.sum()).to(self.share_BT.device)
        self.v_Bd[:rows] = v_Bd.to(self.v_Bd.device)
        self.ids_BT[:rows, :width] = ids_BT.to(self.ids_BT.device)
        self.graph.replay()
        return self.loss


def tail_pairs(targets: Targets, rows: np.ndarray, n: int) -> Texts:
    """The last n sampled tokens of each source, EOS included where it has one: nothing is tokenized again. Targets
    whose text is not known are skipped."""
    known = rows[targets.lengths[rows] > 0]
    return Texts.of("source", known, [targets.sequence(i)[-n:] for i in known])


@dataclass
class Split:
    """Texts of targets to train on and to validate on (indices into them), the paper's random 5 %; how many were
    ``skipped`` for their length, and how many ``changed`` where they were tokenized again."""

    pairs: Texts
    train: np.ndarray
    validation: np.ndarray
    skipped: int = 0
    changed: int = 0


def make_split(run: Run, targets: Targets, span: Optional[int] = None) -> Split:
    """All pairs but the held-out targets' ones, split at random over the pairs as the paper does.

    A pair's text is the whole source; with ``span`` it is the source's last n tokens.
    """
    rows = np.arange(run.sizes.n_train_rows)
    if span is None:
        pairs, changed = published_pairs(run.backbone, targets, rows, run.sizes.max_new_tokens)
    else:
        pairs, changed = tail_pairs(targets, rows, span), 0
    order = np.random.default_rng(derive_seed(run.seed, "split", 0)).permutation(len(pairs.rows))
    # Two at least: what v is worth is asked by giving one the other's.
    n_val = max(2, round(VALIDATION_SHARE * len(order)))
    return Split(pairs, order[n_val:], order[:n_val], len(rows) - len(pairs.rows), changed)


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


def greedy_rollouts(backbone: Backbone, av: ActivationVerbalizer, v_Nd: np.ndarray) -> list[list[int]]:
    """Token ids of the AV's greedy text for each v."""
    greedy, n = SamplingSettings(av.config.max_new_tokens, temperature=0.0), backbone.sample_batch
    parts = [v_Nd[first : first + n] for first in range(0, len(v_Nd), n)]
    return [ids for v_Bd in parts for ids in av.write(backbone, v_Bd, 0, greedy).sequences]


def validate(backbone: Backbone, av: ActivationVerbalizer, targets: Targets, pairs: Texts) -> dict:
    """Scores of the AV's greedy texts of validation pairs, re-encoded, and what their v are worth to it.

    Returns ``fve_nrm`` (raw, no BOS: the paper's criterion, §2), ``fve_nrm_cen`` (centred, with BOS), and of the
    first pairs ``nats_own``, ``nats_other`` (one other target), ``nats_mean`` and ``nats_none`` a token (§9).
    """
    v = targets.v[pairs.rows]
    ids = greedy_rollouts(backbone, av, v)
    loss = source_loss(backbone, av, targets, pairs.take(np.arange(min(N_LOSSES, len(v)))), n_others=1)
    return {
        "fve_nrm": float(fve(backbone.encode(ids, start=False), v).mean()),
        "fve_nrm_cen": float(fve(backbone.encode(ids, start=True), v, targets.mu).mean()),
        **{f"nats_{name}": float(nats_M.mean()) for name, nats_M in loss.per_target.items()},
    }


class Trainer:
    """Training of one AV; its complete state is in one file, replaced atomically at every validation.

    ``split``: what is trained and validated on, else the run's own pairs. ``start``: the AV to go on from, which is
    left as it is, else a fresh one.
    """

    def __init__(
        self,
        run: Run,
        targets: Targets,
        recipe: Recipe = Recipe(),
        split: Optional[Split] = None,
        start: Optional[ActivationVerbalizer] = None,
    ):
        self.run, self.backbone, self.targets, self.recipe = run, run.backbone, targets, recipe
        split = split or make_split(run, targets, recipe.span)
        if not len(split.train):
            known, kept = len(split.pairs.rows), len(split.validation)
            said = f"{known} targets have a text to train on, and {kept} of them are for validation"
            raise ArtefactError(f"{said}: no AV can be trained; take more targets, or give an AV with --av")
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
        # What an unfinished state must share with whoever resumes it.
        self.plan = {**run.folder.conditions, "targets": targets.sha256, **training_spec(run.config, recipe)}
        self.state_file = run.folder.file(STATE)
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
        store.all_reduce([loss, *(p.grad for p in self.params)])
        torch.nn.utils.clip_grad_norm_(self.params, GRAD_CLIP)
        self.optimizer.step()
        return loss.item()

    def _share_of_loss(self, batch: np.ndarray) -> Tensor:
        """This process's part of the batch's mean loss over tokens, its gradient added to the parameters'."""
        own = batch[store.process_rank() :: store.n_processes()]
        if len(own) == 0:
            return torch.zeros((), device=self.backbone.device)
        pairs = self.split.pairs
        texts, v_Bd = [pairs.sequence(i) for i in own], torch.from_numpy(self.targets.v[pairs.rows[own]])
        if self.backbone.device.type == "cuda" and store.n_processes() == 1:
            self.graphed = self.graphed or GraphedStep(self.backbone, self.av, int(pairs.lengths.max()))
            return self.graphed(v_Bd, texts)
        share = int(pairs.lengths[own].sum()) / int(pairs.lengths[batch].sum())
        loss = pair_loss(self.backbone, self.av, v_Bd, texts) * share
        loss.backward()
        return loss.detach()

    def _validate(self) -> None:
        pairs = self.split.pairs.take(self.split.validation[: self.run.sizes.n_validate])
        found = validate(self.backbone, self.av, self.targets, pairs)
        self.history.validation.append({"step": self.step, **found})
        if self.history.best("fve_nrm", self.run.sizes.validate_every)["step"] == self.step:
            self.best = self.av.trainable()

    def _save_state(self) -> None:
        tensors = {f"best.{k}": v for k, v in self.best.items()}
        tensors |= self.av.trainable()
        for i, p in enumerate(self.params):
            tensors |= {f"adam.{i}.{k}": self.optimizer.state[p][k].detach().float().cpu() for k in ADAM}
        record = {"plan": self.plan, "loss": self.history.loss, "validation": self.history.validation}
        record["sha256"] = arrays_hash({k: x.numpy() for k, x in tensors.items()})
        if store.process_rank() == 0:
            atomic_write(self.state_file, save(tensors, metadata={"record": json.dumps(record)}))

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
        require_same(self.state_file, record["plan"], self.plan, remedy)
        self.history = History(record["loss"], record["validation"])
        self.best = {k: tensors[f"best.{k}"] for k in self.best}
        self.av.load_trainable({k: tensors[k] for k in self.best}, str(self.state_file))
        for i, p in enumerate(self.params):
            state = {k: tensors[f"adam.{i}.{k}"].to("cpu" if k == "step" else p.device) for k in ADAM}
            self.optimizer.state[p] = state


def train_av(run: Run, targets: Targets) -> dict:
    """Train the AV or take a released one, or do nothing if a finished one is on disk; returns its sidecar.

    The checkpoint kept is the best by the paper's rule: raw fve_nrm of the validation pairs, at multiples of the
    validation interval. The last step is validated too, to say what it would give; it is kept only by a run that is
    shorter than one interval. Raises ``SourceError`` if a released AV cannot be fetched, ``ArtefactError`` if it does
    not fit the backbone and layer.
    """
    if run.folder.has(BEST_AV):
        return run.folder.load(BEST_AV).sidecar
    av, facts = _train(run, targets) if run.config.av is None else _take_released(run)
    export_av(av, run.folder.file("av"), facts["best_val_fve_nrm"], facts["best_step"])
    tensors = {name: tensor.numpy() for name, tensor in av.trainable().items()}
    facts |= {"seed": run.seed, "trainable_params": sum(x.size for x in tensors.values())}
    # The sidecar says that all is finished.
    sidecar = run.folder.save(BEST_AV, tensors, made_from={"targets": targets.sha256}, **facts).sidecar
    run.folder.file(STATE).unlink(missing_ok=True)
    return sidecar


def _train(run: Run, targets: Targets) -> tuple[ActivationVerbalizer, dict]:
    """The checkpoint that is kept, and facts."""
    trainer = Trainer(run, targets)
    trainer.train()
    history, split, every = trainer.history, trainer.split, run.sizes.validate_every
    best, rows = history.best("fve_nrm", every), split.pairs.rows
    return trainer.av.load_trainable(trainer.best, "best checkpoint"), {
        "pairs": len(rows),
        "skipped_pairs": split.skipped,
        "changed_pairs": split.changed,
        "train_pairs": len(split.train),
        "train_rows": sorted(rows[split.train].tolist()),
        "validation_rows": rows[split.validation].tolist(),
        "steps": trainer.step,
        "best_step": best["step"],
        "best_val_fve_nrm": best["fve_nrm"],
        "best_step_by_centred": history.best("fve_nrm_cen", every)["step"],
        "loss": history.loss,
        "validation": history.validation,
    }


def _take_released(run: Run) -> tuple[ActivationVerbalizer, dict]:
    """A released AV, and facts: nothing is trained, so there is no loss and no row was trained on."""
    source = fetch_av(run.config.av, run.backbone.spec)
    av, record = import_av(source, run.backbone), checkpoint_record(source)
    return av, {
        "released": source_name(run.config.av),
        "released_from": source.name,
        "sampling": av.sampling(run.sizes.max_new_tokens).record(),
        **dict.fromkeys(("pairs", "skipped_pairs", "changed_pairs", "train_pairs", "best_step_by_centred")),
        # The authors' own never saw targets drawn here; of anyone's, or on released ones, it is not known.
        "train_rows": [] if run.config.av == RELEASED and run.config.released_targets is None else None,
        "steps": record["step"],
        "best_step": record["step"],
        "best_val_fve_nrm": record["val_fve_nrm"],
        **{name: [] for name in ("validation_rows", "loss", "validation")},
    }


FIGURES = (
    "pairs skipped_pairs changed_pairs train_pairs trainable_params steps best_step best_val_fve_nrm "
    "best_step_by_centred loss validation"
).split()


def describe(sidecar: dict, targets: Targets) -> dict:
    """The figures of notebook 02, and how many rows of each evaluation set were trained on, as far as that is known."""

    def trained_on(rows: np.ndarray) -> Optional[int]:
        return None if sidecar["train_rows"] is None else int(np.isin(rows, sidecar["train_rows"]).sum())

    return {
        **{k: sidecar[k] for k in FIGURES},
        **{k: sidecar[k] for k in ("released", "released_from") if k in sidecar},
        **{k: v for k, v in sidecar["spec"].items() if k == "av_sha256" and v},
        "in_sample_trained_on": trained_on(targets.in_sample),
        "held_out_trained_on": trained_on(targets.held_out),
    }
