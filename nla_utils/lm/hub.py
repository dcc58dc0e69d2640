"""Downloads from a model hub: pinned to a commit, resumed, hashes checked, failures explained."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Callable, Sequence

from nla_utils.artefacts import atomic_write, require_disk, sha256_file
from nla_utils.config import cache_dir
from nla_utils.errors import SourceError

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
VERIFIED = ".verified"


def snapshot(source: str, patterns: Sequence[str], kind: str = "model", ignored: Sequence[str] = (),
             check_config: Callable[[Path], object] | None = None) -> Path:  # fmt: skip
    """Folder with a repository's files that match ``patterns`` and none of ``ignored``, at one commit.

    ``source`` is ``org/name`` or ``org/name@revision``, ``kind`` ``model`` or ``dataset``. Without a revision the newest
    commit is resolved, printed and pinned: later runs take the same one. What is in the cache is not fetched again, and
    interrupted downloads resume. Raises ``SourceError`` for everything that can go wrong, with what to do about it.
    """
    from huggingface_hub import snapshot_download

    found = _look_up(source, patterns, kind, ignored)
    if found.folder is not None:
        return _pin(found, found.folder)
    info, wanted = found.info, found.wanted
    if not wanted:
        names = sorted(s.rfilename for s in info.siblings)
        raise SourceError(f"{info.id}@{info.sha} has no file {' or '.join(patterns)}; it holds {names}")
    if not COMMIT.match(found.revision):
        print(f"{info.id}: using commit {info.sha}; pin it with {info.id}@{info.sha}")
    require_disk(_hub_cache(), _missing(found))
    try:
        if check_config is not None:
            check_config(_config_alone(info))
        folder = Path(
            snapshot_download(
                info.id, repo_type=kind, revision=info.sha, cache_dir=_hub_cache(), allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
            )
        )
    except failures() as error:
        raise SourceError(explain(info.id, found.revision, kind, error)) from None
    for sibling in wanted:
        _check_hash(folder / sibling.rfilename, sibling, info)
    atomic_write(folder / VERIFIED, "\n".join({*_verified(folder), *patterns}).encode())
    return _pin(found, folder)


@dataclass(frozen=True)
class _Found:
    """A repository as it was looked up: its ``folder`` if nothing has to be fetched, else the hub's record of it."""

    repo: str
    revision: str
    kind: str
    folder: Path | None = None
    info: object = None
    wanted: Sequence = ()


def bytes_to_fetch(source: str, patterns: Sequence[str], kind: str = "model", ignored: Sequence[str] = ()) -> int:
    """How many bytes :func:`snapshot` would still fetch; raises ``SourceError`` as it does."""
    return _missing(_look_up(source, patterns, kind, ignored))


def config_alone(source: str) -> Path:
    """Folder with a model's ``config.json``, fetched before its weights."""
    found = _look_up(source, ("config.json",), "model", ())
    return found.folder if found.folder is not None else _config_alone(found.info)


def _look_up(source: str, patterns: Sequence[str], kind: str, ignored: Sequence[str]) -> _Found:
    from huggingface_hub import HfApi

    repo, _, revision = source.partition("@")
    revision = revision or _pinned(repo, kind)
    kept = _kept(repo, revision, kind, patterns)
    if kept is not None:
        return _Found(repo, revision, kind, kept)
    try:
        info = HfApi().repo_info(repo, revision=revision or None, repo_type=kind, files_metadata=True)
    except failures() as error:
        raise SourceError(explain(repo, revision, kind, error)) from None
    wanted = [s for s in info.siblings if any(fnmatch(s.rfilename, p) for p in patterns)
              and not any(fnmatch(s.rfilename, p) for p in ignored)]  # fmt: skip
    return _Found(repo, revision, kind, _users_own(repo, kind, info.sha, wanted), info, wanted)


def _missing(found: _Found) -> int:
    """Bytes of the wanted files that are not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    def is_there(name: str) -> bool:
        where = dict(cache_dir=_hub_cache(), revision=found.info.sha, repo_type=found.kind)
        return isinstance(try_to_load_from_cache(found.repo, name, **where), str)

    if found.folder is not None:
        return 0
    return sum(s.size or 0 for s in found.wanted if not is_there(s.rfilename))


def _pin_file(repo: str, kind: str) -> Path:
    return cache_dir() / "pins" / f"{kind}s--{repo.replace('/', '--')}"


def _pinned(repo: str, kind: str) -> str:
    """The commit that the first complete download resolved, empty before that."""
    path = _pin_file(repo, kind)
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def _pin(found: _Found, folder: Path) -> Path:
    if not found.revision:
        atomic_write(_pin_file(found.repo, found.kind), folder.name.encode())
    return folder


def _config_alone(info) -> Path:
    from huggingface_hub import hf_hub_download

    config = next((s for s in info.siblings if s.rfilename == "config.json"), None)
    if config is None:
        raise SourceError(f"{info.id} has no config.json; it is no model of the transformers library")
    path = Path(hf_hub_download(info.id, config.rfilename, revision=info.sha, cache_dir=_hub_cache()))
    _check_hash(path, config, info)
    return path.parent


def failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises: the base of its transport's errors, whichever HTTP library this version is built on;
    a name that no repository can have; and a plain ``RuntimeError`` from the part of it that fetches large files."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    transport = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
    return OSError, transport, HFValidationError, RuntimeError


def _users_own(repo: str, kind: str, commit: str, wanted: Sequence) -> Path | None:
    """The snapshot in the user's own cache of the hub's client (``HF_HOME``, ``HF_HUB_CACHE``), if it is complete and
    its files have the hashes that the hub names."""
    from huggingface_hub import try_to_load_from_cache

    folder = None
    for s in wanted:
        path = try_to_load_from_cache(repo, s.rfilename, revision=commit, repo_type=kind)
        if not isinstance(path, str) or not _is_published(Path(path), s):
            return None
        folder = Path(path).parents[s.rfilename.count("/")]
    return folder


def _hub_cache() -> Path:
    return cache_dir() / "hub"


def _kept(repo: str, revision: str, kind: str, patterns: Sequence[str]) -> Path | None:
    """A snapshot of a pinned commit whose files of these patterns were fetched completely and checked before."""
    folder = _hub_cache() / f"{kind}s--{repo.replace('/', '--')}" / "snapshots" / revision
    return folder if COMMIT.match(revision) and set(patterns) <= set(_verified(folder)) else None


def _verified(folder: Path) -> list[str]:
    """The patterns whose files in a snapshot are complete and have the hub's hashes."""
    path = folder / VERIFIED
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _check_hash(path: Path, sibling, info) -> None:
    """Remove a file and raise ``SourceError`` if it does not have the hash that the hub's record of the commit names."""
    if not _is_published(path, sibling):
        path.resolve().unlink()
        path.unlink()
        raise SourceError(
            f"{info.id}@{info.sha}: {sibling.rfilename} does not have the hash that the hub names; it was removed, "
            f"run the command again"
        )


def _is_published(path: Path, sibling) -> bool:
    """Whether a file is the hub's: large ones are named by their sha256, small ones by git's id of their content."""
    if sibling.lfs is not None:
        return sha256_once(path) == sibling.lfs.sha256
    data = path.read_bytes()
    return sibling.blob_id in (None, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def sha256_once(path: Path) -> str:
    """A large file's sha256, read once a process, however often it is looked up."""
    about = path.stat()
    return _sha256(path, about.st_mtime_ns, about.st_size)


@functools.cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_file(path)


def explain(repo: str, revision: str, kind: str, error: Exception) -> str:
    """What went wrong and what to do, by kind of failure."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{repo}@{revision}" if revision else repo
    said = " ".join(str(error).split())
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, HFValidationError):
        return f"{repo} is no name that a repository of the hub can have: {said}"
    if isinstance(error, GatedRepoError):
        return (
            f"{where} is gated: open {page} signed in, accept its terms, then run "
            f"`hf auth login` with a token that may read it, and start again"
        )
    if isinstance(error, RevisionNotFoundError):
        if revision == _pinned(repo, kind):
            pinned = f"{repo} no longer has {revision}, which an earlier run pinned"
            return f"{pinned}; to take the newest, delete {_pin_file(repo, kind)}"
        return f"{repo} has no revision {revision!r}; leave it out to use the newest, or give one of its commits"
    if isinstance(error, RepositoryNotFoundError):
        return f"{where} does not exist, or is private and you are not signed in (`hf auth login`)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        sign_in = "; run `hf auth login` with a token that may do this" if status in (401, 403) else ""
        return f"{where}: the hub answered {status}: {said}{sign_in}"
    if isinstance(error, OSError) and error.filename:
        return f"{where}: {error.filename}: {error.strerror}; put that right, then run the same command again"
    kind_of_error = type(error).__name__ + (f": {said}" if type(error) is RuntimeError else "")
    return (
        f"{where} could not be reached ({kind_of_error}); check the network and HF_HUB_OFFLINE, or give a local "
        f"folder or a commit that was fetched before"
    )
