"""A long stage in fixed chunks, each one file, so that a killed stage resumes where it was."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Mapping, Optional

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nla_utils import workers
from nla_utils.artefacts import arrays_hash, atomic_write, read_json, require_same, write_json
from nla_utils.progress import Progress


@dataclass
class ChunkStore:
    """Fixed chunks of a long stage, each one file, so that a killed stage resumes where it was.

    Raises ``ArtefactError`` where the folder holds chunks of another ``plan``: chunks resume under the same device,
    libraries and code alone.
    """

    folder: Path
    plan: dict

    def __post_init__(self) -> None:
        record = self.folder / "chunks.json"
        if record.exists():
            remedy = f"go back to that, or delete {self.folder} to begin this stage anew"
            require_same(self.folder, read_json(record), self.plan, remedy)
        if workers.leads():
            write_json(record, self.plan)
        workers.wait()

    def _file(self, i: int) -> Path:
        return self.folder / f"{i:06d}.safetensors"

    def get(self, i: int) -> Optional[dict[str, np.ndarray]]:
        """Chunk ``i``, or ``None`` if it was never finished; a file that is broken or altered counts as unfinished."""
        try:
            with safe_open(self._file(i), "np") as f:
                tensors, stated = {name: f.get_tensor(name) for name in f.keys()}, (f.metadata() or {}).get("sha256")
        except (OSError, SafetensorError):
            return None
        return tensors if stated == arrays_hash(tensors) else None

    def tensor(self, i: int, name: str) -> np.ndarray:
        """One tensor of a finished chunk, the others left on disk."""
        with safe_open(self._file(i), "np") as f:
            return f.get_tensor(name)

    def put(self, i: int, tensors: Mapping[str, np.ndarray]) -> None:
        tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
        atomic_write(self._file(i), save(tensors, metadata={"sha256": arrays_hash(tensors)}))

    def fill(
        self, total: int, per_chunk: int, make: Callable[[int, slice], dict], desc: str, unit: str
    ) -> dict[str, np.ndarray]:
        """Every chunk, joined along the first axis.

        ``make(chunk, rows)`` gives a chunk that is missing, for a slice of the ``total`` rows. Of several processes
        each makes its share, and all of them return all rows.
        """
        starts = range(0, total, per_chunk)
        with Progress(total=total, desc=desc, unit=unit) as bar:
            for c, first in enumerate(starts):
                rows = slice(first, min(first + per_chunk, total))
                if c % workers.size() == workers.rank() and self.get(c) is None:
                    self.put(c, make(c, rows))
                bar.update(rows.stop - rows.start)
        workers.wait()
        parts = [self.get(c) for c in range(len(starts))]
        workers.wait()
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def clear(self) -> None:
        """Remove the chunks once the artefact is on disk."""
        if workers.leads():
            shutil.rmtree(self.folder, ignore_errors=True)
