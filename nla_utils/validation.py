"""What an AV's greedy text scores: the criterion that checkpoints are kept by (PROTOCOL.md §2)."""

from __future__ import annotations

import numpy as np
import torch

from nla_utils.backbone import Backbone
from nla_utils.metrics import fve
from nla_utils.sampling import SAMPLE_BATCH, SamplingSettings, sample
from nla_utils.targets import Targets
from nla_utils.verbalizer import ActivationVerbalizer


@torch.inference_mode()
def greedy_rollouts(backbone: Backbone, av: ActivationVerbalizer, v_Nd: np.ndarray, limit: int) -> list[list[int]]:
    """Token ids of the AV's greedy text for each v, at most ``limit`` tokens."""
    greedy, ids = SamplingSettings(max_new_tokens=limit, temperature=0.0), []
    for first in range(0, len(v_Nd), SAMPLE_BATCH):
        v_Bd = torch.from_numpy(v_Nd[first : first + SAMPLE_BATCH]).to(backbone.device)
        samples = sample(backbone, av(v_Bd, backbone.dtype), greedy, seed=0)
        ids += [samples.sequence(i) for i in range(len(v_Bd))]
    return ids


@torch.inference_mode()
def validate(backbone: Backbone, av: ActivationVerbalizer, targets: Targets, rows: list[int], limit: int) -> dict:
    """Greedy rollouts of validation targets, re-encoded.

    Returns ``fve_nrm`` (raw, no BOS: the paper's criterion) and ``fve_nrm_cen`` (centred, with BOS).
    """
    v = targets.v[rows]
    ids = greedy_rollouts(backbone, av, v, limit)
    return {
        "fve_nrm": float(fve(backbone.encode(ids, start=False), v).mean()),
        "fve_nrm_cen": float(fve(backbone.encode(ids, start=True), v, targets.mu).mean()),
    }
