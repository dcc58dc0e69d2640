"""Several processes on one run: each makes its share of the chunks, the first one writes what they make together.

Without a process group, as in every notebook, there is one process and nothing waits. This module does not load
torch: there is a process group only where torch has been loaded.
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
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    """The number of this process, from 0."""
    group = _group()
    return group.get_rank() if group else 0


def leads() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def wait() -> None:
    """Return once every process has called this."""
    group = _group()
    if group:
        group.barrier()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    group = _group()
    for x in tensors if group else ():
        group.all_reduce(x)


def start(device: str) -> None:
    """Join the process group that a launcher has prepared, if there is one, and take this process's own card."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)
