"""Ways of reading an activation, each as the texts that it writes: the likeliest one first, then k draws."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nla_extensions.release.baselines import lens_tokens, patchscope
from nla_extensions.release.bundle import Bundle
from nla_extensions.tail_reader.reader import read_tails
from nla_utils.lm.backbone import Backbone

# Those that draw texts; the guided search goes on from the reader's.
DRAWING = ("reader", "av", "lens", "patchscope")
METHODS = ("reader", "guided", "av", "lens", "patchscope")


def draw_texts(
    backbone: Backbone, bundle: Bundle, method: str, v_Md: np.ndarray, k: int, streams_B: np.ndarray
) -> list[list[list[int]]]:
    """Token ids of 1 + k texts for each of M activations, as one of :data:`DRAWING` writes them; one batch.

    Each of the M (1 + k) texts has a random stream."""
    v_Bd = torch.from_numpy(v_Md).to(backbone.device).repeat_interleave(k + 1, dim=0)
    greedy_B = torch.arange(len(v_Bd), device=backbone.device) % (k + 1) == 0
    if method == "lens":
        flat = _lens(backbone, torch.from_numpy(v_Md).to(backbone.device), k)
    elif method == "patchscope":
        # As long as the reader's.
        flat = patchscope(backbone, v_Bd, bundle.reader.n, streams_B, greedy_B)
    elif method == "av":
        settings = bundle.av.sampling(bundle.av.config.max_new_tokens)
        flat = bundle.av.write(backbone, v_Md, k, settings, streams_B).sequences
    else:
        flat = read_tails(bundle.reader, v_Bd, streams_B, greedy_B.cpu())[0].tolist()
    return [flat[first : first + k + 1] for first in range(0, len(flat), k + 1)]


def _lens(backbone: Backbone, v_Md: Tensor, k: int) -> list[list[int]]:
    """The likeliest token, and then it and the k − 1 next to it: nothing is drawn."""
    return [[i] for row in lens_tokens(backbone, v_Md, k).tolist() for i in [row[0], *row]]
