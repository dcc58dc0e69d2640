"""A training step on a GPU as one CUDA graph: forward and backward of a batch of fixed shape, replayed.

A small backbone is held up by the launches of its hundreds of kernels; a replay launches once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nla_utils.config import BATCH_SIZE
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import pad
from nla_utils.stages.verbalizer import ActivationVerbalizer, text_hidden

WARM_UP = 3


def padded_loss(
    backbone: Backbone, av: ActivationVerbalizer, v_Bd: Tensor, ids_BT: Tensor, share_BT: Tensor
) -> Tensor:
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
