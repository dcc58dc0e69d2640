"""Progress of long stages: a bar with rate and end time, mirrored to whoever started the notebook."""

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
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Optional

import filelock
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save
from tqdm import tqdm

from nla_utils import __version__, workers
from nla_utils.config import CHECKOUT, ROOT, RunConfig
from nla_utils.errors import ArtefactError

MIRROR_VARIABLE = "NLA_PROGRESS_FILE"


class Progress(tqdm):
    """A tqdm bar that also leaves its line in the file named by ``$NLA_PROGRESS_FILE``.

    A notebook's output is not on the terminal of ``nla reproduce``; that command reads the file and shows the line.
    """

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
    """Hold the lock file ``path``; ``busy`` says who has it, where another process does.

    Without flock a second file names the process and the host that hold it. It is taken over from a dead process of this
    host where the file system can exchange two files (NFS can't); else the message says which file to delete.

    Raises ``ArtefactError`` where another process holds it, unless this one is to ``wait`` for it.
    """
    way_on = "wait for it"
    lock: filelock.BaseFileLock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        held = _try(lock)
    except OSError as error:
        if error.errno not in WITHOUT_FLOCK:
            said = f"{path} could not be locked ({error.strerror or error})"
            raise ArtefactError(f"{said}; put that right, then run the same command again") from None
        named = path.with_name(f"{path.name}.held")
        way_on = f"wait for it, or delete {named} if the process that it names is dead"
        lock = filelock.SoftFileLock(named)
        held = _try(lock)
    if not held and not wait:
        raise ArtefactError(f"{busy}; {way_on}")
    if not held:
        print(f"{busy}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        # It ends with the process in any case.
        with contextlib.suppress(OSError):
            lock.release()


def _try(lock: filelock.BaseFileLock) -> bool:
    """Whether the lock was free, and is now this process's."""
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    return True


# By artefact, what it depends on beside the run's identity and its parents; each stage adds its own.
SPECS: dict[str, Callable[[RunConfig], dict]] = {}


def require_same(path: Path, theirs: Mapping[str, Any], own: Mapping[str, Any], remedy: str) -> None:
    """Raise ``ArtefactError`` that names the first key in which what is on disk differs from the run that asks, with both
    values and what to do."""
    for key, value in json.loads(json.dumps(own)).items():
        if theirs.get(key) != value:
            raise ArtefactError(
                f"{path} was made with {key} = {theirs.get(key)!r}, this run has {key} = {value!r}; {remedy}"
            )


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
    except FileNotFoundError:
        raise ArtefactError(f"{path} does not exist") from None
    except (OSError, ValueError) as e:
        raise ArtefactError(f"{path} is not complete JSON ({e}); delete it and rerun its stage") from None


def write_record(path: Path, record: dict) -> None:
    """Write a JSON object with a hash of its own contents, which :func:`read_record` compares."""
    # As it will be read: keys are text there.
    record = json.loads(json.dumps(record))
    write_json(path, {**record, "record_sha256": json_hash(record)})


def read_record(path: Path) -> dict:
    """Read what :func:`write_record` wrote; raises ``ArtefactError`` where it was altered since."""
    record = read_json(path)
    if not isinstance(record, dict):
        raise ArtefactError(f"{path} holds no record; delete it and rerun its stage")
    stated = record.pop("record_sha256", None)
    if stated is not None and stated != json_hash(record):
        raise ArtefactError(f"{path} was altered since it was written; delete it and rerun its stage")
    return record


@functools.cache
def code_version() -> dict:
    """Git commit of this checkout and whether its code differs from that commit."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    # Git would take a repository further up for this one's.
    if not CHECKOUT or not (ROOT / ".git").exists():
        return {"git_commit": None, "dirty": None}
    try:
        dirty = git(
            "status",
            "--porcelain",
            "--",
            "nla_utils",
            ":(glob)notebooks/**/0*.ipynb",
            "requirements.lock",
            ":(exclude)notebooks/executed",
        )
        return {"git_commit": git("rev-parse", "HEAD"), "dirty": bool(dirty)}
    except (OSError, subprocess.CalledProcessError):
        return {"git_commit": None, "dirty": None}


@functools.cache
def library_versions() -> dict:
    """Versions of the libraries that numbers depend on."""
    names = ("torch", "transformers", "tokenizers", "numpy", "scipy", "safetensors")
    return {n: importlib.metadata.version(n) for n in names}


def require_disk(folder: Path, n_bytes: int) -> None:
    """Raise ``ArtefactError`` before work starts if ``folder``'s disk cannot hold ``n_bytes``."""
    existing = Path(folder)
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise ArtefactError(f"{folder}: the run needs about {n_bytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")


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
    """Where one run writes; ``identity`` is what every artefact of the run must agree on, ``device`` where it computes.

    Without a ``config`` it is a folder that is read as it is: specs are not compared beyond the identity."""

    path: Path
    identity: dict = field(default_factory=dict)
    config: Optional[RunConfig] = field(default=None, compare=False)
    device: Optional[str] = None

    @classmethod
    def of(cls, config: RunConfig, backbone_name: str, identity: Mapping[str, Any], device: str) -> "RunFolder":
        """Folder of a run; a relative ``out`` is taken from the repository's root, wherever a notebook runs."""
        identity = {**identity, "seed": config.seed}
        return cls(ROOT / config.out / backbone_name / config.folder_name, identity, config, device)

    @property
    def backbone(self) -> str:
        return self.path.parent.name

    @property
    def conditions(self) -> dict:
        """What an unfinished stage must share with whoever resumes it: identity, device, libraries and code."""
        code = code_version()
        commit = (code["git_commit"] or __version__) + (" + changes" if code["dirty"] else "")
        return {**self.identity, "device": self.device, **library_versions(), "code": commit}

    @property
    def remedy(self) -> str:
        return f"choose another --out, or delete {self.path}"

    def spec(self, name: str) -> dict:
        """All that an artefact depends on beside its parents."""
        return {**self.identity, **(SPECS[name](self.config) if self.config and name in SPECS else {})}

    def file(self, name: str) -> Path:
        return self.path / name

    def save(
        self, name: str, tensors: Mapping[str, np.ndarray], made_from: Optional[Mapping[str, str]] = None, **facts: Any
    ) -> Artefact:
        """Write ``name.safetensors`` and then its sidecar; returns what a load would return.

        Of several processes the first one writes, and the others load what it has written.
        """
        if not workers.leads():
            workers.wait()
            return self.load(name)
        path = self.file(f"{name}.safetensors")
        data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
        record = path.with_name(path.name + ".json")
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
        workers.wait()
        return Artefact(dict(tensors), sidecar, path)

    def load(self, name: str) -> Artefact:
        """Read an artefact of this run; raises ``ArtefactError`` if it is incomplete or of another run."""
        path = self.file(f"{name}.safetensors")
        if not path.is_file() or not self.has(name):
            raise ArtefactError(f"{path} is missing or unfinished; run the notebook that makes it")
        sidecar = self.sidecar(name)
        digest = sha256_file(path)
        if digest != sidecar["sha256"]:
            raise ArtefactError(
                f"{path} is truncated or altered: sha256 {digest[:12]}…, its sidecar says "
                f"{sidecar['sha256'][:12]}…; delete both and rerun"
            )
        for parent, made_from in sidecar["made_from"].items():
            found = self.sha256_of(parent)
            if found != made_from:
                raise ArtefactError(
                    f"{path} was made from {parent} {made_from[:12]}…, which is now "
                    f"{found[:12] + '…' if found else 'missing'}; delete {path.name} and its sidecar and rerun"
                )
        return Artefact(load_file(path), sidecar, path)

    def has(self, name: str) -> bool:
        """Whether the artefact is finished; one that is broken or of another run still raises on load."""
        return self._record(name).exists()

    def sha256_of(self, name: str) -> Optional[str]:
        """The hash that an artefact's sidecar gives, ``None`` without one; raises as :meth:`sidecar` does."""
        return self.sidecar(name)["sha256"] if self.has(name) else None

    def sidecar(self, name: str) -> dict:
        """An artefact's sidecar; raises ``ArtefactError`` where its spec is not that of this run."""
        sidecar = read_record(self._record(name))
        if not {"sha256", "made_from"} <= set(sidecar):
            raise ArtefactError(f"{self._record(name)} is no sidecar; delete it and rerun its stage")
        if "spec" not in sidecar:
            raise ArtefactError(
                f"{self._record(name)} is of an older version, which did not keep what it was made of; {self.remedy}"
            )
        require_same(self._record(name).with_suffix(""), sidecar["spec"], self.spec(name), self.remedy)
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


def derive_seed(run_seed: int, stage: str, *at: int) -> int:
    """Seed of one place in a stage, the same on every machine: 63 bits of sha256 over (seed, stage, numbers)."""
    digest = hashlib.sha256("/".join(map(str, (run_seed, stage, *at))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
