"""What the AV writes, and what v is worth to it: rollouts re-encoded (PROTOCOL.md §3), and losses of the sources (§9)."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from nla_utils.config import AVConfig, RunConfig
from nla_utils.encoding import re_encode, text_logprobs
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import SamplingSettings, pad, row_streams, sample
from nla_utils.protocol import CORRECTED, PUBLISHED, Protocol
from nla_utils.run import Run
from nla_utils.store import SPECS, Artefact, ChunkStore, require_disk
from nla_utils.targets import Targets
from nla_utils.training import load_av
from nla_utils.verbalizer import BEST_AV, ActivationVerbalizer

ROLLOUTS = "rollouts"


@dataclass
class Rollouts:
    """Rollouts of M targets, whose ``rows`` (M,) they are.

    ``ids`` (M, 1+K, T) and ``lengths`` (M, 1+K): column 0 is greedy. ``h_bos``, ``h_nobos`` (M, 1+K, d): the
    re-encoded activation with and without the start token. ``logp`` (M, K): mean token log-probability under the
    distribution that was sampled; ``logp_published`` (M, K): as the authors compute it, on the targets that ``published``
    evaluates, NaN elsewhere. ``sha256`` is that of the artefact that holds them.
    """

    rows: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    h_bos: np.ndarray
    h_nobos: np.ndarray
    logp: np.ndarray
    logp_published: np.ndarray
    sha256: str = ""

    @classmethod
    def of(cls, artefact: Artefact) -> "Rollouts":
        arrays = {f.name: artefact.tensors[f.name] for f in fields(cls) if f.name != "sha256"}
        return cls(**arrays, sha256=artefact.sha256)

    def at(self, rows: np.ndarray) -> "Rollouts":
        """The rollouts of some of the targets, in the order asked for."""
        at = rows_at(self.rows, rows)
        return replace(self, **{f.name: getattr(self, f.name)[at] for f in fields(self) if f.name != "sha256"})

    def h(self, protocol: Protocol) -> np.ndarray:
        """(M, 1+K, d) as the protocol encodes it."""
        return self.h_bos if "bos" not in protocol.slips else self.h_nobos

    def mean_logp(self, protocol: Protocol) -> np.ndarray:
        """(M, K) as the protocol computes it."""
        return self.logp if "logp_embeds" not in protocol.slips else self.logp_published

    def sequence(self, m: int, column: int) -> list[int]:
        return self.ids[m, column, : self.lengths[m, column]].tolist()

    @property
    def k(self) -> int:
        return self.ids.shape[1] - 1


def rows_at(held: np.ndarray, rows: np.ndarray) -> list[int]:
    """Where targets stand among those that an artefact holds."""
    return [int(np.flatnonzero(held == r)[0]) for r in rows]


def spec(config: RunConfig) -> dict:
    """What rollouts depend on beside the run's identity, its targets and its AV."""
    sizes = config.sizes
    sampling = SamplingSettings(sizes.max_new_tokens, AVConfig.temperature, top_p=AVConfig.top_p).record()
    if config.av is not None:
        # The rest is said by the configuration of the AV itself.
        sampling = {key: sampling[key] for key in ("max_new_tokens", "top_k")}
    return {"n_eval": sizes.n_eval, "k": sizes.n_rollouts, "rollout_sampling": sampling}


SPECS[ROLLOUTS] = spec


def make_rollouts(run: Run, targets: Targets) -> Rollouts:
    """Roll out the AV on the in-sample and the held-out targets, or load finished rollouts."""
    folder, backbone, k = run.folder, run.backbone, run.sizes.n_rollouts
    if folder.has(ROLLOUTS):
        return load_rollouts(run)
    av = load_av(run)
    rows = np.concatenate([targets.in_sample, targets.held_out])
    require_disk(folder.path, 4 * len(rows) * (k + 1) * (2 * backbone.d + run.sizes.max_new_tokens) * 4)
    settings = av.sampling(run.sizes.max_new_tokens)
    if settings != SamplingSettings(run.sizes.max_new_tokens):
        print(
            f"the AV's configuration has temperature {settings.temperature} and top_p {settings.top_p}: so its rollouts "
            f"are sampled, where the run's own targets and paraphrases are sampled at temperature 1"
        )
    parents = {"targets": targets.sha256, BEST_AV: folder.sha256_of(BEST_AV)}
    plan = {**folder.conditions, **parents, **spec(run.config), "sampling": settings.record()}
    chunks = ChunkStore(folder.file("rollouts.chunks"), plan)

    def draw(c: int, part_of: slice) -> dict[str, np.ndarray]:
        chosen = rows[part_of]
        v_Md = torch.from_numpy(targets.v[chosen]).to(backbone.device)
        part = roll_out(backbone, av, v_Md, settings, k, row_streams(run.seed, "rollouts", chosen, k + 1))
        part["logp_published"] = published_logprobs(backbone, av, v_Md, part, np.isin(chosen, targets.in_sample))
        return part

    drawn = chunks.fill(len(rows), max(1, backbone.sample_batch // (k + 1)), draw, "rolling out", "target")
    artefact = folder.save(ROLLOUTS, {**drawn, "rows": rows}, made_from=parents, sampling=settings.record())
    chunks.clear()
    return Rollouts.of(artefact)


def load_rollouts(run: Run) -> Rollouts:
    """Rollouts made by notebook 04; raises ``ArtefactError`` if they are missing, of another run or broken."""
    return Rollouts.of(run.folder.load(ROLLOUTS))


def roll_out(
    backbone: Backbone,
    av: ActivationVerbalizer,
    v_Md: torch.Tensor,
    settings: SamplingSettings,
    k: int,
    streams_B: np.ndarray,
) -> dict[str, np.ndarray]:
    """The greedy and the K sampled rollouts of each target, decoded in one batch; each of the M (1 + K) has a stream."""
    m = len(v_Md)
    with torch.inference_mode():
        prompt_BPd = av(v_Md, backbone.dtype).repeat_interleave(k + 1, dim=0)
        greedy_B = torch.arange(len(prompt_BPd), device=backbone.device) % (k + 1) == 0
        samples = sample(backbone, prompt_BPd, settings, streams_B, greedy_B=greedy_B)
    flat = [samples.sequence(i) for i in range(len(greedy_B))]
    return {
        "ids": samples.ids.reshape(m, k + 1, -1),
        "lengths": samples.lengths.reshape(m, k + 1),
        "h_bos": re_encode(backbone, flat, CORRECTED.on_ids).reshape(m, k + 1, -1),
        "h_nobos": re_encode(backbone, flat, PUBLISHED.on_ids).reshape(m, k + 1, -1),
        "logp": samples.mean_logprob.reshape(m, k + 1)[:, 1:],
    }


@torch.inference_mode()
def rollout_logprobs(
    backbone: Backbone, av: ActivationVerbalizer, v_Bd: torch.Tensor, rollouts: list[list[int]]
) -> np.ndarray:
    """Mean token log-probability (B,) as the authors' rerank script computes it: slips ``logp_embeds``, ``top_k``.

    Token embeddings are rows of the raw table, so Gemma's √d scale is missing, and the
    normaliser is the whole vocabulary's although the sampling was truncated to 50.
    """
    ids_BT, mask_BT = pad(rollouts, backbone.pad_id, "right")
    ids_BT, valid_BT = ids_BT.to(backbone.device), mask_BT.bool().to(backbone.device)
    prefix_BPd = av(v_Bd.to(backbone.device), backbone.dtype)
    table_Vd = backbone.model.get_input_embeddings().weight
    logp_BT = text_logprobs(backbone, prefix_BPd, ids_BT, table_Vd[ids_BT], valid_BT)
    return (logp_BT.sum(1) / valid_BT.sum(1)).cpu().numpy()


def published_logprobs(
    backbone: Backbone, av: ActivationVerbalizer, v_Md: torch.Tensor, part: dict[str, np.ndarray], wanted_M: np.ndarray
) -> np.ndarray:
    """(M, K) as the authors compute it, one target's rollouts at a time; NaN where it is not wanted."""
    logp_MK = np.full_like(part["logp"], np.nan)
    k = logp_MK.shape[1]
    for m in np.flatnonzero(wanted_M):
        rollouts = [part["ids"][m, j, : part["lengths"][m, j]].tolist() for j in range(1, k + 1)]
        logp_MK[m] = rollout_logprobs(backbone, av, v_Md[m : m + 1].expand(k, -1), rollouts)
    return logp_MK
