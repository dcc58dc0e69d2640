"""Several processes on one run: each takes its share of the chunks, the first one writes what they make together.

Without a process group (in every notebook) there is one process, and all of this is the plain thing. Nothing here
loads torch: a process group is only there where it has been loaded.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Callable, Sequence

import numpy as np

from nla_utils.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from nla_utils.store import ChunkStore


def _group():
    """torch.distributed where a process group was joined."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def size() -> int:
    """How many processes work on this run."""
    group = _group()
    return group.get_world_size() if group else 1


def rank() -> int:
    group = _group()
    return group.get_rank() if group else 0


def leads() -> bool:
    """Whether this process is the one that writes."""
    return rank() == 0


def wait() -> None:
    """Until every process has come here."""
    group = _group()
    if group:
        group.barrier()


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    group = _group()
    for x in tensors if group else ():
        group.all_reduce(x)


def fill_chunks(
    chunks: ChunkStore, total: int, per_chunk: int, make: Callable[[int, slice], dict], desc: str, unit: str
) -> dict[str, np.ndarray]:
    """Every chunk of a store, joined along the first axis.

    ``make(chunk, rows)`` gives a chunk that is not there yet, for a slice of the ``total`` rows. Each process makes
    its share; all of them return the whole.
    """
    starts = range(0, total, per_chunk)
    with Progress(total=total, desc=desc, unit=unit) as bar:
        for c, first in enumerate(starts):
            rows = slice(first, min(first + per_chunk, total))
            if c % size() == rank() and chunks.get(c) is None:
                chunks.put(c, make(c, rows))
            bar.update(rows.stop - rows.start)
    wait()
    parts = [chunks.get(c) for c in range(len(starts))]
    wait()
    return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def start(device: str) -> None:
    """Join the process group that a launcher has prepared, if there is one, and take this process's own card."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)
