"""What v is worth to the AV: cross-entropy of a source's own text, given its v, another's, μ, or no slot (PROTOCOL.md §9).

Nothing is sampled: the text is the one that training would use, and each of its tokens is predicted from those before it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.artefacts import SPECS, Artefact
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import pad
from nla_utils.progress import Progress
from nla_utils.run import Run
from nla_utils.stages.pairs import TextPairs, paper_pairs
from nla_utils.stages.targets import Targets
from nla_utils.stages.verbalizer import ARTEFACT as AV_ARTEFACT
from nla_utils.stages.verbalizer import ActivationVerbalizer, text_logprobs

ARTEFACT = "source_loss"
# What stands in the slot; ``none``: the prefix alone, without one.
CONDITIONS = ("own", "other", "mean", "none")
# Other targets whose v each text is predicted from. Of the shipped AVs, on 64 stored texts, the interval of another's − own
# is 3 to 5 % wider with 8 than with 32; of the AVs of two `quick` runs, 7 %.
N_OTHERS = 8
# Texts predicted together.
TEXT_BATCH = 64

SPECS[ARTEFACT] = lambda config: {
    "n_eval": config.sizes.n_eval, "pool_size": config.sizes.pool_size, "longest_text": config.sizes.max_new_tokens,
    "n_others": N_OTHERS,
}  # fmt: skip


@dataclass
class SourceLoss:
    """Nats of every token of M sources, (M, T) by condition, NaN after the end; ``rows`` (M,) are the targets'.

    ``other`` is the mean over up to ``N_OTHERS`` other targets.
    """

    rows: np.ndarray
    nats: dict[str, np.ndarray]
    sha256: str = ""

    @classmethod
    def of(cls, artefact: Artefact) -> "SourceLoss":
        t = artefact.tensors
        return cls(t["rows"], {c: t[c] for c in CONDITIONS}, artefact.sha256)

    @property
    def per_target(self) -> dict[str, np.ndarray]:
        """Mean nats a token of each source (M,)."""
        return {c: np.nanmean(nats_MT, axis=1) for c, nats_MT in self.nats.items()}


def make_source_loss(run: Run, targets: Targets, av: ActivationVerbalizer) -> SourceLoss:
    """The losses of the held-out targets' texts, cut at the length trained on, or what is on disk."""
    if run.folder.has(ARTEFACT):
        return SourceLoss.of(run.folder.load(ARTEFACT))
    limit = run.sizes.max_new_tokens
    pairs = paper_pairs(run.backbone, targets, targets.held_out)
    pairs = replace(pairs, ids=[ids[:limit] for ids in pairs.ids])
    loss = source_loss(run.backbone, av, targets, pairs, N_OTHERS, "losses of the sources' texts")
    parents = {"targets": targets.sha256, AV_ARTEFACT: run.folder.sha256_of(AV_ARTEFACT)}
    return SourceLoss.of(run.folder.save(ARTEFACT, {"rows": loss.rows, **loss.nats}, made_from=parents))


def source_loss(
    backbone: Backbone, av: ActivationVerbalizer, targets: Targets, pairs: TextPairs, n_others: int, label: str = ""
) -> SourceLoss:
    """Nats of the texts of M pairs under every condition, NaN for ``other`` where there is none; a progress bar where
    ``label`` names it."""
    v_Md, shifts = targets.v[pairs.rows], range(1, min(n_others, len(pairs.rows) - 1) + 1)
    given = {"own": [v_Md], "other": [np.roll(v_Md, shift, axis=0) for shift in shifts],
             "mean": [np.broadcast_to(targets.mu, v_Md.shape)], "none": [None]}  # fmt: skip
    found = {}
    with Progress(total=sum(map(len, given.values())), desc=label, unit="pass", disable=not label) as bar:
        for condition, slots in given.items():
            total_MT = np.zeros((len(pairs.ids), max(map(len, pairs.ids), default=1)))
            for slot_Md in slots:
                total_MT += _text_nats(backbone, av, slot_Md, pairs.ids)
                bar.update()
            found[condition] = (total_MT / (len(slots) or np.nan)).astype(np.float32)
    return SourceLoss(np.array(pairs.rows), found)


def _text_nats(
    backbone: Backbone, av: ActivationVerbalizer, slot_Md: np.ndarray | None, texts: Sequence[list[int]]
) -> np.ndarray:
    """−log p of each token (M, T), NaN after the end; ``None`` leaves the slot out."""
    nats_MT = np.full((len(texts), max(map(len, texts), default=1)), np.nan)
    for first in range(0, len(texts), TEXT_BATCH):
        part = texts[first : first + TEXT_BATCH]
        slot_Bd = np.zeros((len(part), backbone.d), np.float32) if slot_Md is None else slot_Md[first : first + TEXT_BATCH]
        prefix_BPd = _prompt(backbone, av, slot_Bd)
        if slot_Md is None:
            prefix_BPd = prefix_BPd[:, av.config.num_inject_slots :]
            if not prefix_BPd.shape[1]:
                break  # an AV of no prefix has nothing that a first token could be predicted from
        nats_MT[first : first + len(part), : max(map(len, part))] = _batch_nats(backbone, prefix_BPd, part)
    return nats_MT


@torch.inference_mode()
def _prompt(backbone: Backbone, av: ActivationVerbalizer, v_Bd: np.ndarray) -> Tensor:
    return av(torch.tensor(v_Bd).to(backbone.device), backbone.dtype)


@torch.inference_mode()
def _batch_nats(backbone: Backbone, prefix_BPd: Tensor, texts: list[list[int]]) -> np.ndarray:
    ids_BT, valid_BT = (x.to(backbone.device) for x in pad(texts, backbone.pad_id, "right"))
    valid_BT = valid_BT.bool()
    logp_BT = text_logprobs(backbone, prefix_BPd, ids_BT, backbone.embed(ids_BT), valid_BT)
    return (-logp_BT).masked_fill(~valid_BT, torch.nan).cpu().numpy()
