"""One process at a time: a lock that a process lets go of when it dies, also where the file system has no flock."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Iterator

import filelock

from nla_utils.errors import ArtefactError

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
