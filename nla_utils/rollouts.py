"""What the AV writes: rollouts, re-encoded, with both kinds of log-probability (PROTOCOL.md §3)."""

from __future__ import annotations

import numpy as np
import torch

from nla_utils.config import AVConfig, RunConfig
from nla_utils.encoding import TEXTS_FORMAT, Texts, read, save_texts, text_logprobs, texts_of, write_in_chunks
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import SamplingSettings, row_streams
from nla_utils.protocol import PROTOCOLS
from nla_utils.run import Run
from nla_utils.store import SPECS, ChunkStore, require_disk
from nla_utils.targets import Targets
from nla_utils.training import load_av
from nla_utils.verbalizer import BEST_AV, ActivationVerbalizer

ROLLOUTS = "rollouts"


def spec(config: RunConfig) -> dict:
    """What rollouts depend on beside the run's identity, its targets and its AV."""
    sizes = config.sizes
    sampling = SamplingSettings(sizes.max_new_tokens, AVConfig.temperature, top_p=AVConfig.top_p).record()
    if config.av is not None:
        # The rest is said by the configuration of the AV itself.
        sampling = {key: sampling[key] for key in ("max_new_tokens", "top_k")}
    return {**TEXTS_FORMAT, "n_eval": sizes.n_eval, "k": sizes.n_rollouts, "rollout_sampling": sampling}


SPECS[ROLLOUTS] = spec


def make_rollouts(run: Run, targets: Targets) -> Texts:
    """Roll out the AV on the in-sample and the held-out targets, or load finished rollouts.

    Text 0 of each target is greedy. ``logp`` is ``sampled``, under the distribution that was sampled, and
    ``published``, as the authors compute it, of the targets that the published protocol evaluates.
    """
    folder, backbone, k = run.folder, run.backbone, run.sizes.n_rollouts
    if folder.has(ROLLOUTS):
        return load_rollouts(run)
    av = load_av(run)
    rows = np.concatenate([targets.in_sample, targets.held_out])
    require_disk(folder.path, 4 * len(rows) * (k + 1) * (2 * backbone.d + run.sizes.max_new_tokens) * 4)
    settings = av.sampling(run.sizes.max_new_tokens)
    if settings != SamplingSettings(run.sizes.max_new_tokens):
        print(
            f"the AV's configuration has temperature {settings.temperature} and top_p {settings.top_p}: so its "
            f"rollouts are sampled, where the run's own targets and paraphrases are sampled at temperature 1"
        )
    parents = {"targets": targets.sha256, BEST_AV: folder.sha256_of(BEST_AV)}
    plan = {**folder.conditions, **parents, **spec(run.config), "sampling": settings.record()}
    chunks = ChunkStore(folder.file("rollouts.chunks"), plan)

    def write(chosen: np.ndarray) -> Texts:
        streams_B = row_streams(run.seed, "rollouts", chosen, k + 1)
        texts = av.write(backbone, targets.v[chosen], k, settings, streams_B, chosen)
        wanted_M = np.isin(chosen, targets.in_sample)
        texts.logp["published"] = published_logprobs(backbone, av, targets.v[chosen], texts, wanted_M)
        return read(backbone, texts, *PROTOCOLS)

    per_chunk = max(1, backbone.sample_batch // (k + 1))
    rollouts = write_in_chunks(chunks, "rollout", rows, per_chunk, write, "rolling out")
    save_texts(folder, ROLLOUTS, {"rollout": rollouts}, made_from=parents, sampling=settings.record())
    chunks.clear()
    return rollouts


def load_rollouts(run: Run) -> Texts:
    """Rollouts made by notebook 04; raises ``ArtefactError`` if they are missing, of another run or broken."""
    return texts_of(run.folder.load(ROLLOUTS))["rollout"]


@torch.inference_mode()
def published_logprobs(
    backbone: Backbone, av: ActivationVerbalizer, v_Md: np.ndarray, rollouts: Texts, wanted_M: np.ndarray
) -> np.ndarray:
    """Mean token log-probability (M, 1 + K) as the authors' rerank script computes it, one target's draws at a time;
    NaN of greedy texts and where it is not wanted. Slips ``logp_embeds``, ``top_k``.

    Token embeddings are rows of the raw table, so Gemma's √d scale is missing, and the normaliser is the whole
    vocabulary's although the sampling was truncated to 50.
    """
    logp_Mn = np.full(rollouts.lengths.shape, np.nan, dtype=np.float32)
    table_Vd = backbone.model.get_input_embeddings().weight
    for m in np.flatnonzero(wanted_M):
        draws = [rollouts.sequence(m, j) for j in range(1, rollouts.k + 1)]
        v_Bd = torch.from_numpy(v_Md[m]).to(backbone.device).expand(len(draws), -1)
        logp_BT = text_logprobs(backbone, av(v_Bd, backbone.dtype), draws, lambda ids_BT: table_Vd[ids_BT])
        logp_Mn[m, 1:] = logp_BT.nanmean(dim=1).cpu().numpy()
    return logp_Mn
