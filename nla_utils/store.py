"""What runs keep on disk: records with a hash, artefacts with the spec of what they depend on, chunks of unfinished
stages; with locks, disk space, the progress of long stages, and several processes on one run."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Optional, Sequence

import filelock
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from tqdm import tqdm

from nla_utils import __version__
from nla_utils.config import CHECKOUT, ROOT, RunConfig, cache_dir
from nla_utils.errors import ArtefactError

if TYPE_CHECKING:
    from torch import Tensor

MIRROR_VARIABLE = "NLA_PROGRESS_FILE"


class Progress(tqdm):
    """A tqdm bar that also leaves its line in the file ``$NLA_PROGRESS_FILE``, for ``nla reproduce`` to show."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, mininterval=1.0, dynamic_ncols=False, ncols=90, **kwargs)

    def display(self, msg=None, pos=None):
        mirror = os.environ.get(MIRROR_VARIABLE)
        if mirror:
            # A bar that cannot be shown is no reason to stop.
            with contextlib.suppress(OSError):
                Path(mirror).write_text(str(self), encoding="utf-8")
        return super().display(msg, pos)


# What mounts of NFS and Lustre answer that have no flock.
WITHOUT_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO)


@contextlib.contextmanager
def hold(path: Path, busy: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path``; raises ``ArtefactError``, which begins with ``busy``, where another process has it,
    unless this one is to ``wait``.

    Without flock a second file names the process and the host that hold it. It is taken over from a dead process of
    this host where the file system can exchange two files (NFS can't); else the message says which file to delete.
    """
    lock: filelock.BaseFileLock = filelock.FileLock(path, fallback_to_soft=False)
    way_on = "wait for it"
    try:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=0)
    except OSError as error:
        if error.errno not in WITHOUT_FLOCK:
            said = f"{path} could not be locked ({error.strerror or error})"
            raise ArtefactError(f"{said}; put that right, then run the same command again") from None
        lock = filelock.SoftFileLock(f"{path}.held")
        way_on = f"wait for it, or delete {path}.held if the process that it names is dead"
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=0)
    if not lock.is_locked:
        if not wait:
            raise ArtefactError(f"{busy}; {way_on}")
        print(f"{busy}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        # It ends with the process in any case.
        with contextlib.suppress(OSError):
            lock.release()


def derive_seed(run_seed: int, stage: str, *at: int) -> int:
    """Seed of one place in a stage, the same on every machine: 63 bits of sha256 over (seed, stage, numbers)."""
    digest = hashlib.sha256("/".join(map(str, (run_seed, stage, *at))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def json_hash(value: Any) -> str:
    """Hex sha256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def arrays_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """Hex sha256 over names, dtypes, shapes and contents."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].dtype} {arrays[name].shape}\n".encode() + arrays[name].tobytes())
    return total.hexdigest()


def require_disk(folder: Path, n_bytes: int) -> None:
    """Raise ``ArtefactError`` before work starts if ``folder``'s disk cannot hold ``n_bytes``."""
    existing = next(place for place in (Path(folder), *Path(folder).parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise ArtefactError(f"{folder}: the run needs about {n_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")


def atomic_write(path: Path, data: bytes) -> None:
    """Write ``data`` so that ``path`` is either the old file or the complete new one.

    Raises ``ArtefactError`` where it cannot be written, as on a full disk.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Runs side by side may write the same file, with the same bytes.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        said = f"{path} could not be written ({error.strerror or error})"
        raise ArtefactError(f"{said}; make room or make it writable, then run the same command again") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given, one trailing newline."""
    atomic_write(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; raises ``ArtefactError`` naming the file where it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"is not complete JSON ({error})"
        raise ArtefactError(f"{path} {why}; delete it and rerun its stage") from None


def write_record(path: Path, record: dict) -> None:
    """Write a JSON object with a hash of its own contents, which :func:`read_record` compares."""
    # As it will be read: keys are text there.
    record = json.loads(json.dumps(record))
    write_json(path, {**record, "record_sha256": json_hash(record)})


def read_record(path: Path) -> dict:
    """Read what :func:`write_record` wrote; raises ``ArtefactError`` where it was altered since."""
    record = read_json(path)
    stated = record.pop("record_sha256", None) if isinstance(record, dict) else "no record"
    if stated not in (None, json_hash(record)):
        raise ArtefactError(f"{path} was altered since it was written; delete it and rerun its stage")
    return record


def require_same(path: Path, theirs: Mapping[str, Any], own: Mapping[str, Any], remedy: str) -> None:
    """Raise ``ArtefactError`` that names the first key in which what is on disk differs from the run that asks, with
    both values and what to do."""
    for key, value in json.loads(json.dumps(own)).items():
        if theirs.get(key) != value:
            raise ArtefactError(
                f"{path} was made with {key} = {theirs.get(key)!r}, this run has {key} = {value!r}; {remedy}"
            )


# What numbers are made by, in a checkout.
CODE = "nla_utils nla_extensions requirements.lock :(glob)notebooks/**/0*.ipynb :(exclude)notebooks/executed".split()


@functools.cache
def code_version() -> dict:
    """Git commit of this checkout and whether its code differs from that commit; both ``None`` elsewhere."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    # Git would take a repository further up for this one's.
    if CHECKOUT and (ROOT / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            changes = git("status", "--porcelain", "--", *CODE)
            return {"git_commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    return {"git_commit": None, "dirty": None}


@functools.cache
def library_versions() -> dict:
    """Versions of the libraries that numbers depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors")
    return {n: importlib.metadata.version(n) for n in names}


# By artefact, what it depends on beside the run's identity and its parents. Each stage adds its own.
SPECS: dict[str, Callable[[RunConfig], dict]] = {}


@dataclass
class Artefact:
    """Tensors read back from disk with their sidecar."""

    tensors: dict[str, np.ndarray]
    sidecar: dict
    path: Path

    @property
    def sha256(self) -> str:
        return self.sidecar["sha256"]


@dataclass
class RunFolder:
    """Where one run writes; ``identity`` is what all its artefacts must agree on, ``device`` where it computes.

    Without a ``config`` it is a folder that is read as it is: specs are not compared beyond the identity."""

    path: Path
    identity: dict = field(default_factory=dict)
    config: Optional[RunConfig] = field(default=None, compare=False)
    device: Optional[str] = None

    @property
    def backbone(self) -> str:
        return self.identity["backbone"]

    @property
    def conditions(self) -> dict:
        """What an unfinished stage must share with whoever resumes it: identity, device, libraries and code."""
        code = code_version()
        commit = (code["git_commit"] or __version__) + (" + changes" if code["dirty"] else "")
        return {**self.identity, "device": self.device, **library_versions(), "code": commit}

    @property
    def remedy(self) -> str:
        return f"choose another --out, or delete {self.path}"

    def file(self, name: str) -> Path:
        return self.path / name

    def spec(self, name: str) -> dict:
        """All that an artefact depends on beside its parents; raises ``ArtefactError`` where that is unknown."""
        if self.config is None:
            return self.identity
        if name not in SPECS:
            raise ArtefactError(f"what {name} depends on is not known here; import the module that makes it")
        return {**self.identity, **SPECS[name](self.config)}

    def save(
        self, name: str, tensors: Mapping[str, np.ndarray], made_from: Optional[Mapping[str, str]] = None, **facts: Any
    ) -> Artefact:
        """Write ``name.safetensors`` and then its sidecar; returns what a load would return.

        Of several processes the first one writes, and the others load what it has written.
        """
        if process_rank():
            wait_for_processes()
            return self.load(name)
        path, record = self.file(f"{name}.safetensors"), self._record(name)
        data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
        record.unlink(missing_ok=True)
        atomic_write(path, data)
        sidecar = {
            "spec": self.spec(name),
            "sha256": hashlib.sha256(data).hexdigest(),
            "made_from": dict(made_from or {}),
            **facts,
            "device": self.device,
            "code": code_version(),
            "libraries": library_versions(),
            "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        write_record(record, sidecar)
        wait_for_processes()
        return Artefact(dict(tensors), sidecar, path)

    def load(self, name: str) -> Artefact:
        """Read an artefact of this run; raises ``ArtefactError`` if it is incomplete or of another run."""
        path = self.file(f"{name}.safetensors")
        if not path.is_file() or not self.has(name):
            raise ArtefactError(f"{path} is missing or unfinished; run the notebook that makes it")
        sidecar, digest = self.sidecar(name), sha256_file(path)
        again = "delete it and its sidecar and rerun"
        if digest != sidecar["sha256"]:
            hashes = f"sha256 {digest[:12]}…, its sidecar says {sidecar['sha256'][:12]}…"
            raise ArtefactError(f"{path} is truncated or altered: {hashes}; {again}")
        for parent, then in sidecar["made_from"].items():
            now = self.sha256_of(parent)
            if now != then:
                hashes = f"{then[:12]}…, which is now {now[:12] + '…' if now else 'missing'}"
                raise ArtefactError(f"{path} was made from {parent} {hashes}; {again}")
        return Artefact(load_file(path), sidecar, path)

    def has(self, name: str) -> bool:
        """Whether the artefact is finished; one that is broken or of another run still raises on load."""
        return self._record(name).exists()

    def sha256_of(self, name: str) -> Optional[str]:
        """The hash that an artefact's sidecar gives, ``None`` without one; raises as :meth:`sidecar` does."""
        return self.sidecar(name)["sha256"] if self.has(name) else None

    def sidecar(self, name: str) -> dict:
        """An artefact's sidecar; raises ``ArtefactError`` where its spec is not that of this run."""
        record = self._record(name)
        sidecar = read_record(record)
        if not {"spec", "sha256", "made_from"} <= set(sidecar):
            what = "is no sidecar, or one of an older version, which did not keep what it was made of"
            raise ArtefactError(f"{record} {what}; {self.remedy}")
        require_same(record.with_suffix(""), sidecar["spec"], self.spec(name), self.remedy)
        return sidecar

    def read_results(self, name: str) -> dict:
        """A results file; raises ``ArtefactError`` where it is missing, altered, or of another run or other sizes."""
        path = self.file(f"results/{name}.json")
        record = read_record(path)
        own = {"name": name, **self.identity} | (self.config.sizes.record() if self.config else {})
        require_same(path, {**record, **record.get("identity", {}), **record.get("sizes", {})}, own, self.remedy)
        return record

    def _record(self, name: str) -> Path:
        return self.file(f"{name}.safetensors.json")


def made_once(
    kind: str, name: str, identity: dict, device: str, artefact: str, make: Callable[[RunFolder], None]
) -> RunFolder:
    """The folder in the cache that holds an artefact of this identity; ``make`` saves it there where it is missing.

    Of several processes one makes it, and the others wait and find it.
    """
    path = cache_dir() / kind / f"{name}-{json_hash(identity)[:16]}"
    folder = RunFolder(path, identity, device=device)
    if not folder.has(artefact):
        path.mkdir(parents=True, exist_ok=True)
        with hold(folder.file("lock"), f"another process is filling {path}", wait=True):
            if not folder.has(artefact):
                make(folder)
    return folder


@dataclass
class ChunkStore:
    """Fixed chunks of a long stage, each one file, so that a stage that was killed resumes.

    Raises ``ArtefactError`` where the folder holds chunks of another ``plan``.
    """

    folder: Path
    plan: dict

    def __post_init__(self) -> None:
        record = self.folder / "chunks.json"
        if record.exists():
            remedy = f"go back to that, or delete {self.folder} to begin this stage anew"
            require_same(self.folder, read_json(record), self.plan, remedy)
        if process_rank() == 0:
            write_json(record, self.plan)
        wait_for_processes()

    def _file(self, i: int) -> Path:
        return self.folder / f"{i:06d}.safetensors"

    def get(self, i: int) -> Optional[dict[str, np.ndarray]]:
        """Chunk ``i``, or ``None`` if it was never finished, is broken or was altered."""
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
        self, total: int, per_chunk: int, make: Callable[[slice], dict], desc: str, unit: str
    ) -> dict[str, np.ndarray]:
        """Every chunk, joined along the first axis; ``make`` gives a missing one, for a slice of the ``total`` rows. Of
        several processes each makes its share, and all return all rows."""
        starts = range(0, total, per_chunk)
        with Progress(total=total, desc=desc, unit=unit) as bar:
            for c, first in enumerate(starts):
                rows = slice(first, min(first + per_chunk, total))
                if c % n_processes() == process_rank() and self.get(c) is None:
                    self.put(c, make(rows))
                bar.update(rows.stop - rows.start)
        wait_for_processes()
        parts = [self.get(c) for c in range(len(starts))]
        wait_for_processes()
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def clear(self) -> None:
        """Remove the chunks once the artefact is on disk."""
        if process_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)


# Several processes on one run: each makes its share of the chunks, the first one writes what they make together.
# Without a process group, as in every notebook, there is one process and nothing waits. Torch is not loaded here: there
# is a process group only where it has been loaded.


def _group():
    """torch.distributed where a process group was joined."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_initialized() else None


def n_processes() -> int:
    """How many processes work on this run."""
    return _group().get_world_size() if _group() else 1


def process_rank() -> int:
    """The number of this process, from 0; the first one writes."""
    return _group().get_rank() if _group() else 0


def wait_for_processes() -> None:
    """Return once every process has called this."""
    if _group():
        _group().barrier()


def all_reduce(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    for x in tensors if _group() else ():
        _group().all_reduce(x)


def join_processes(device: str) -> None:
    """Join the process group that a launcher has prepared, if there is one, and take this process's own card."""
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)
