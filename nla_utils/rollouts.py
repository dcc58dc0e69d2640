"""Rollouts of the AV: one greedy and K sampled per target, re-encoded with and without BOS (§3).

One set of rollouts serves both protocols and both notebooks 04 and 05.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from nla_utils import paper_way
from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.parallel import fill_chunks
from nla_utils.sampling import SAMPLE_BATCH, SamplingSettings, sample
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
    authors compute it, on the targets that ``paper`` evaluates, NaN elsewhere.
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
    require_disk(folder.path, 4 * len(rows) * (sizes.n_rollouts + 1) * (2 * backbone.d + run.text_length) * 4)
    settings = SamplingSettings(max_new_tokens=run.text_length)
    parents = {"targets": targets.sha256, AV_ARTEFACT: av_sha}
    plan = {**folder.identity, **parents, "k": sizes.n_rollouts, "sampling": settings.record()}
    chunks = ChunkStore(folder.file("rollouts.chunks"), plan)
    per_chunk = max(1, SAMPLE_BATCH // (sizes.n_rollouts + 1))

    def draw(c: int, part_of: slice) -> dict[str, np.ndarray]:
        chosen = rows[part_of]
        v_Md = torch.from_numpy(targets.v[chosen]).to(backbone.device)
        part = roll_out(backbone, av, v_Md, settings, sizes.n_rollouts, derive_seed(run.seed, "rollouts", c))
        part["logp_paper"] = paper_logprobs(backbone, av, v_Md, part, np.isin(chosen, targets.in_sample))
        return part

    tensors = {**fill_chunks(chunks, len(rows), per_chunk, draw, "rolling out", "target"), "rows": rows}
    artefact = folder.save(
        ARTEFACT, tensors, made_from=parents, sampling=settings.record(), seed=run.seed, k=sizes.n_rollouts
    )
    chunks.clear()
    return artefact


def rollout_set(artefact: Artefact, targets: Targets, protocol: str) -> RolloutSet:
    """The part of the rollouts that a protocol evaluates (see :meth:`Targets.eval_rows`)."""
    return rollouts_of_rows(artefact, targets.eval_rows(protocol))


def rows_at(artefact: Artefact, rows: np.ndarray) -> list[int]:
    """Where targets stand in an artefact that keeps some of them."""
    return [int(np.flatnonzero(artefact.tensors["rows"] == r)[0]) for r in rows]


def rollouts_of_rows(artefact: Artefact, rows: np.ndarray) -> RolloutSet:
    at = rows_at(artefact, rows)
    return RolloutSet(**{f.name: artefact.tensors[f.name][at] for f in fields(RolloutSet)})


def roll_out(
    backbone: Backbone, av: ActivationVerbalizer, v_Md: torch.Tensor, settings: SamplingSettings, k: int, seed: int
) -> dict[str, np.ndarray]:
    """The greedy and the K sampled rollouts of each target, decoded in one batch."""
    m = len(v_Md)
    with torch.inference_mode():
        prompt_BPd = av(v_Md, backbone.dtype).repeat_interleave(k + 1, dim=0)
        greedy_B = torch.arange(len(prompt_BPd), device=backbone.device) % (k + 1) == 0
        samples = sample(backbone, prompt_BPd, settings, seed, greedy_B=greedy_B)
    flat = [samples.sequence(i) for i in range(len(greedy_B))]
    return {
        "ids": samples.ids.reshape(m, k + 1, -1),
        "lengths": samples.lengths.reshape(m, k + 1),
        "h_bos": backbone.encode(flat, start=True).reshape(m, k + 1, -1),
        "h_nobos": backbone.encode(flat, start=False).reshape(m, k + 1, -1),
        "logp": samples.mean_logprob.reshape(m, k + 1)[:, 1:],
    }


def paper_logprobs(
    backbone: Backbone, av: ActivationVerbalizer, v_Md: torch.Tensor, part: dict[str, np.ndarray], wanted_M: np.ndarray
) -> np.ndarray:
    """(M, K) the authors' way, one target's rollouts at a time; NaN where it is not wanted."""
    logp_MK = np.full_like(part["logp"], np.nan)
    k = logp_MK.shape[1]
    for m in np.flatnonzero(wanted_M):
        rollouts = [part["ids"][m, j, : part["lengths"][m, j]].tolist() for j in range(1, k + 1)]
        logp_MK[m] = paper_way.rollout_logprobs(backbone, av, v_Md[m : m + 1].expand(k, -1), rollouts)
    return logp_MK
