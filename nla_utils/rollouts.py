"""Rollouts of the AV: one greedy and K sampled per target, re-encoded with and without BOS (§3).

One set of rollouts serves both protocols and both notebooks 04 and 05.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from nla_utils import paper_way
from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.progress import Progress
from nla_utils.sampling import SAMPLE_BATCH, Samples, SamplingSettings, sample
from nla_utils.store import Artefact, ChunkStore, RunFolder, derive_seed, require_disk
from nla_utils.targets import Targets
from nla_utils.training import ARTEFACT as AV_ARTEFACT
from nla_utils.training import load_av
from nla_utils.verbalizer import ActivationVerbalizer

ARTEFACT = "rollouts"


@dataclass
class RolloutSet:
    """Rollouts of M targets.

    ``ids`` (M, 1+K, T) and ``lengths`` (M, 1+K): column 0 is greedy. ``h_bos``, ``h_nobos``
    (M, 1+K, d): the re-encoded activation with and without the start token. ``logp`` (M, K): mean
    token log-probability under the distribution that was sampled; ``logp_paper`` (M, K): as the
    authors compute it.
    """

    rows: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    h_bos: np.ndarray
    h_nobos: np.ndarray
    logp: np.ndarray
    logp_paper: np.ndarray

    def h(self, protocol: str) -> np.ndarray:
        """(M, 1+K, d) as the protocol encodes it."""
        return self.h_nobos if protocol == "paper" else self.h_bos

    def sequence(self, m: int, column: int) -> list[int]:
        return self.ids[m, column, : self.lengths[m, column]].tolist()


def make_rollouts(run: RunConfig, backbone: Backbone, targets: Targets, folder: RunFolder) -> Artefact:
    """Roll out the AV on the in-sample and the held-out targets, or load what is whole."""
    if folder.has(ARTEFACT):
        return folder.load(ARTEFACT)
    av = load_av(run, backbone, folder)
    av_sha = folder.load(AV_ARTEFACT).sha256
    sizes = run.sizes
    rows = np.concatenate([targets.in_sample, targets.held_out])
    require_disk(folder.path, 4 * len(rows) * (sizes.n_rollouts + 1) * (2 * backbone.d + sizes.max_new_tokens) * 4)
    settings = SamplingSettings(max_new_tokens=sizes.max_new_tokens)
    parents = {"targets": targets.sha256, AV_ARTEFACT: av_sha}
    plan = {**folder.identity, **parents, "k": sizes.n_rollouts, "sampling": settings.record()}
    chunks = ChunkStore(folder.file("rollouts.chunks"), plan)
    per_chunk = max(1, SAMPLE_BATCH // (sizes.n_rollouts + 1))
    parts = []
    with Progress(total=len(rows), desc="rolling out", unit="target") as bar:
        for c, first in enumerate(range(0, len(rows), per_chunk)):
            part = chunks.get(c)
            chosen = rows[first : first + per_chunk]
            if part is None:
                v_Md = torch.from_numpy(targets.v[chosen]).to(backbone.device)
                seed = derive_seed(run.seed, "rollouts", c)
                part = _roll_out(backbone, av, v_Md, settings, sizes.n_rollouts, seed)
                chunks.put(c, part)
            parts.append(part)
            bar.update(len(chosen))
    tensors = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    tensors["rows"] = rows
    artefact = folder.save(
        ARTEFACT, tensors, made_from=parents, sampling=settings.record(), seed=run.seed, k=sizes.n_rollouts
    )
    chunks.clear()
    return artefact


def rollout_set(artefact: Artefact, targets: Targets, protocol: str) -> RolloutSet:
    """The part of the rollouts that a protocol evaluates (see :meth:`Targets.eval_rows`)."""
    return rollouts_of_rows(artefact, targets.eval_rows(protocol))


def rollouts_of_rows(artefact: Artefact, rows: np.ndarray) -> RolloutSet:
    at = [int(np.flatnonzero(artefact.tensors["rows"] == r)[0]) for r in rows]
    return RolloutSet(**{k: t[at] for k, t in artefact.tensors.items()})


def _roll_out(
    backbone: Backbone, av: ActivationVerbalizer, v_Md: torch.Tensor, settings: SamplingSettings, k: int, seed: int
) -> dict[str, np.ndarray]:
    m = len(v_Md)
    with torch.inference_mode():
        prompt_MPd = av(v_Md, backbone.dtype)
        greedy_settings = SamplingSettings(settings.max_new_tokens, temperature=0.0)
        greedy = sample(backbone, prompt_MPd, greedy_settings, seed)
        sampled = sample(backbone, prompt_MPd.repeat_interleave(k, dim=0), settings, seed)
    ids = np.concatenate([greedy.ids[:, None], sampled.ids.reshape(m, k, -1)], axis=1)
    lengths = np.concatenate([greedy.lengths[:, None], sampled.lengths.reshape(m, k)], axis=1)
    flat = [ids[i, j, : lengths[i, j]].tolist() for i in range(m) for j in range(k + 1)]
    return {
        "ids": ids,
        "lengths": lengths,
        "h_bos": backbone.encode(flat, start=True).reshape(m, k + 1, -1),
        "h_nobos": backbone.encode(flat, start=False).reshape(m, k + 1, -1),
        "logp": sampled.mean_logprob.reshape(m, k),
        "logp_paper": _paper_logprobs(backbone, av, v_Md, sampled, k),
    }


def _paper_logprobs(
    backbone: Backbone, av: ActivationVerbalizer, v_Md: torch.Tensor, sampled: Samples, k: int
) -> np.ndarray:
    """(M, K), one target's rollouts at a time: the logits of a chunk are the only large thing."""
    per_target = [
        paper_way.rollout_logprobs(
            backbone, av, v_Md[i : i + 1].expand(k, -1), [sampled.sequence(i * k + j) for j in range(k)]
        )
        for i in range(len(v_Md))
    ]
    return np.stack(per_target).astype(np.float32)
