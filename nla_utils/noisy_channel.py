"""The tail reader with the frozen model's own likelihood as prior: a noisy channel read backwards by beam search.

score(x) = log p(v | x), from the reader, + λ log p(x), from the language model behind BOS. The unigram prior
only proposes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nla_utils.backbone import Backbone
from nla_utils.head_loss import head_logprobs
from nla_utils.progress import Progress
from nla_utils.reader import TailReader

BEAMS = 4
SHORTLIST = 16
# Targets whose candidates are scored together.
TARGETS_TOGETHER = 16


@torch.inference_mode()
def read_with_language_model(reader: TailReader, backbone: Backbone, v_Md: Tensor, weight: float) -> Tensor:
    """The best tail of each target by reader and language model together (M, n), in reading order.

    Args:
        weight: λ, of the language model's log-probability.
    """
    parts = v_Md.split(TARGETS_TOGETHER)
    return torch.cat([_beam_search(reader, backbone, part, weight) for part in Progress(parts, desc="noisy channel")])


def _beam_search(reader: TailReader, backbone: Backbone, v_Md: Tensor, weight: float) -> Tensor:
    m, d = v_Md.shape
    residual_MBd = reader.first_residual(v_Md)[:, None]
    ids_MBj = torch.zeros(m, 1, 0, dtype=torch.long, device=v_Md.device)
    channel_MB = torch.zeros(m, 1, device=v_Md.device)
    language_MB = torch.zeros(m, 1, device=v_Md.device)
    for j in range(reader.n):
        token, rough = reader.candidates(j, residual_MBd.flatten(0, 1), SHORTLIST)
        rough = rough.view(m, -1, token.shape[1]) + (channel_MB + weight * language_MB)[:, :, None]
        top = rough.flatten(1).topk(min(SHORTLIST, rough[0].numel()))
        beam, token = top.indices // token.shape[1], token.view(m, -1).gather(1, top.indices)
        ids = torch.cat([token[:, :, None], _of_beam(ids_MBj, beam)], dim=2)
        channel = top.values - reader.log_prior_V[token] - weight * language_MB.gather(1, beam)
        language = _log_probability(backbone, ids.flatten(0, 1)).view(m, -1)
        keep = (channel + weight * language).topk(min(BEAMS, ids.shape[1])).indices
        ids_MBj = _of_beam(ids, keep)
        channel_MB, language_MB = channel.gather(1, keep), language.gather(1, keep)
        explained = reader.explained(j, ids_MBj[:, :, 0].flatten()).view(m, -1, d)
        residual_MBd = _of_beam(residual_MBd, beam.gather(1, keep)) - explained
    return ids_MBj[:, 0].cpu()


def _of_beam(x_MBz: Tensor, beam_MC: Tensor) -> Tensor:
    """Rows of the chosen beams (M, C, z)."""
    return x_MBz.gather(1, beam_MC[:, :, None].expand(-1, -1, x_MBz.shape[2]))


def _log_probability(backbone: Backbone, ids_Bj: Tensor) -> Tensor:
    """log p of each text behind the start token (B,)."""
    start_B1 = torch.full((len(ids_Bj), 1), backbone.start_id, device=ids_Bj.device)
    inputs_Bj = torch.cat([start_B1, ids_Bj[:, :-1]], dim=1)
    hidden_Bjd = backbone.last_hidden(input_ids=inputs_Bj)
    logp = head_logprobs(hidden_Bjd.flatten(0, 1), backbone.head_weight, ids_Bj.flatten(), backbone.softcap)
    return logp.view(ids_Bj.shape).sum(dim=1)
