"""Several processes on one run: each makes its share of the chunks, the first one writes what they make together.

Without a process group, as in every notebook, there is one process and nothing waits. Torch is not loaded here: there
is a process group only where it has been loaded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Sequence

if TYPE_CHECKING:
    from torch import Tensor


def _group():
    """torch.distributed where a process group was joined."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def size() -> int:
    """How many processes work on this run."""
    return _group().get_world_size() if _group() else 1


def rank() -> int:
    """The number of this process, from 0; the first one writes."""
    return _group().get_rank() if _group() else 0


def wait() -> None:
    """Return once every process has called this."""
    if _group():
        _group().barrier()


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    for x in tensors if _group() else ():
        _group().all_reduce(x)


def start(device: str) -> None:
    """Join the process group that a launcher has prepared, if there is one, and take this process's own card."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)
