"""Downloads from a model hub: pinned to a commit, resumed, hashes checked, failures said in plain words."""

from __future__ import annotations

import hashlib
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Callable, Sequence

from nla_utils.artefacts import require_disk, sha256_file
from nla_utils.config import cache_dir
from nla_utils.errors import SourceError

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")


def snapshot(source: str, patterns: Sequence[str], kind: str = "model", ignored: Sequence[str] = (),
             check_config: Callable[[Path], object] | None = None) -> Path:  # fmt: skip
    """Folder with a repository's files that match ``patterns`` and none of ``ignored``, at one commit.

    ``source`` is ``org/name`` or ``org/name@revision``, ``kind`` ``model`` or ``dataset``; without a revision the
    newest commit is resolved and printed, so that it can be pinned. What is in the cache is not fetched again; a cut
    download goes on where it was. Raises ``SourceError`` for everything that can go wrong, with what to do about it.
    """
    from huggingface_hub import HfApi, snapshot_download

    repo, _, revision = source.partition("@")
    kept = _kept(repo, revision, kind)
    if kept is not None:
        return kept
    try:
        info = HfApi().repo_info(repo, revision=revision or None, repo_type=kind, files_metadata=True)
        if not COMMIT.match(revision):
            print(f"{repo}: using commit {info.sha}; pin it with {repo}@{info.sha}")
        wanted = [s for s in info.siblings if any(fnmatch(s.rfilename, p) for p in patterns)
                  and not any(fnmatch(s.rfilename, p) for p in ignored)]  # fmt: skip
        own = _users_own(repo, kind, info.sha, wanted)
        if own is not None:
            return own
        require_disk(_hub_cache(), sum(s.size or 0 for s in wanted))
        if check_config is not None:
            check_config(_config_alone(info))
        folder = Path(
            snapshot_download(
                repo, repo_type=kind, revision=info.sha, cache_dir=_hub_cache(), allow_patterns=list(patterns),
                ignore_patterns=list(ignored),
            )
        )
    except (OSError, _transport_error()) as error:
        raise SourceError(_explain(repo, revision, kind, error)) from None
    for sibling in info.siblings:
        if (folder / sibling.rfilename).exists():
            _check_hash(folder / sibling.rfilename, sibling, info)
    (folder / ".verified").touch()
    return folder


def _config_alone(info) -> Path:
    from huggingface_hub import hf_hub_download

    config = next((s for s in info.siblings if s.rfilename == "config.json"), None)
    if config is None:
        raise SourceError(f"{info.id} has no config.json; it is no model of the transformers library")
    path = Path(hf_hub_download(info.id, config.rfilename, revision=info.sha, cache_dir=_hub_cache()))
    _check_hash(path, config, info)
    return path.parent


def _transport_error() -> type[Exception]:
    """The base of the transport's errors, whichever HTTP library this version of the hub's client is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")


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


def _kept(repo: str, revision: str, kind: str) -> Path | None:
    """A snapshot of a pinned commit that was fetched completely and checked before."""
    folder = _hub_cache() / f"{kind}s--{repo.replace('/', '--')}" / "snapshots" / revision
    return folder if COMMIT.match(revision) and (folder / ".verified").exists() else None


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
        return sha256_file(path) == sibling.lfs.sha256
    data = path.read_bytes()
    return sibling.blob_id in (None, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def _explain(repo: str, revision: str, kind: str, error: Exception) -> str:
    """What went wrong and what to do, by kind of failure."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    where = f"{repo}@{revision}" if revision else repo
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, GatedRepoError):
        return (
            f"{where} is gated: open {page} signed in, accept its terms, then run "
            f"`hf auth login` with a token that may read it, and start again"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; leave it out to use the newest, or give one of its commits"
    if isinstance(error, RepositoryNotFoundError):
        return f"{where} does not exist, or is private and you are not signed in (`hf auth login`)"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"{where}: the hub answered {status}: {error}"
    return (
        f"{where} could not be reached ({type(error).__name__}); check the network and HF_HUB_OFFLINE, or give a local "
        f"folder or a commit that was fetched before"
    )
