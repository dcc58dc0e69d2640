"""Downloads from a model hub: pinned to a commit, resumed, hashes checked, failures explained."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable, Optional, Sequence

from nla_utils.config import cache_dir
from nla_utils.errors import ConfigError, SourceError, nearest
from nla_utils.store import atomic_write, hold, json_hash, read_json, require_disk, sha256_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
VERIFIED = ".verified"


def snapshot(
    source: str,
    patterns: Sequence[str],
    kind: str = "model",
    ignored: Sequence[str] = (),
    check_config: Callable[[Path], object] | None = None,
) -> Path:
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
                info.id,
                repo_type=kind,
                revision=info.sha,
                cache_dir=_hub_cache(),
                allow_patterns=list(patterns),
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
    wanted = [
        s
        for s in info.siblings
        if any(fnmatch(s.rfilename, p) for p in patterns) and not any(fnmatch(s.rfilename, p) for p in ignored)
    ]
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


@dataclass(frozen=True)
class GGUFPackage:
    """A GGUF file inside pinned PyPI wheels; ``members`` are joined in order."""

    requirements: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone and how the paper's measurement is set up on it.

    ``layer`` None means round(0.73 L). ``start_id`` None means the tokenizer's BOS. ``eos_ids``
    None means the tokenizer's EOS. ``padding_side`` None means the tokenizer's own.
    ``ceiling`` is the row that the paper divides by in ρ on this backbone. ``license`` is that of the weights, which
    holds for what derives from them; None where it is not known here. ``title`` is the name as its makers write it,
    ``variant`` and ``weights`` are what pages say of the weights, in short and in full, ``samples`` what they say of the
    texts that it writes without a prompt; empty where nothing is to be said.
    ``av`` and ``targets`` are the repositories of what the authors published for it, ``targets_file`` the file in the
    latter; their vectors alone are in ``…_pool.pt`` beside it. ``unverified`` says why a backbone may not work here, None
    for those that were run or rehearsed.
    """

    name: str
    source: GGUFPackage | str
    layer: Optional[int] = None
    num_prefix_tokens: int = 1
    start_id: Optional[int] = None
    eos_ids: Optional[tuple[int, ...]] = None
    padding_side: Optional[str] = None
    ceiling: str = "paraphrase_bestof8"
    license: Optional[str] = None
    title: str = ""
    variant: str = ""
    weights: str = ""
    samples: str = ""
    av: Optional[str] = None
    targets: Optional[str] = None
    targets_file: Optional[str] = None
    unverified: Optional[str] = None

    @property
    def shown(self) -> str:
        """The name for readers, with the variant: ``Gemma-3-270M (base, 4-bit)``."""
        return (self.title or self.name) + (f" ({self.variant})" if self.variant else "")


def _read_registry() -> dict[str, BackboneSpec]:
    """The backbones of ``backbones.toml`` beside this file."""
    entries = tomllib.loads(Path(__file__).with_name("backbones.toml").read_text(encoding="utf-8"))
    found = {}
    for name, entry in entries.items():
        package = entry.pop("package", None)
        source = entry.pop("source") if package is None else GGUFPackage(**{k: _frozen(v) for k, v in package.items()})
        found[name] = BackboneSpec(name, source, **{k: _frozen(v) for k, v in entry.items()})
    return found


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value


REGISTRY = _read_registry()


def weights_note(names: Iterable[str]) -> str:
    """A sentence or two for each backbone of ``names`` whose weights the registry describes."""
    specs = (REGISTRY[name] for name in dict.fromkeys(names) if name in REGISTRY)
    return " ".join(f"{spec.shown}: {spec.weights}. {spec.samples}".strip() for spec in specs if spec.weights)


# The same weights again, under another name or in a folder.
OTHER_LAYOUTS = ("consolidated*", "*/*")
# What the library notes in a model's settings that changes nothing.
NOTES = ("transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype")
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.txt")


def resolve(name: str) -> BackboneSpec:
    """Spec for a registry name, a local folder or a hub id (``org/name`` or ``org/name@commit``).

    Raises ``ConfigError`` that names the nearest registry entries for anything else.
    """
    if name in REGISTRY:
        return REGISTRY[name]
    repo, _, revision = name.partition("@")
    # A run's folder is named after its backbone, so another revision needs another name.
    at = "@" + revision.replace("/", "-") if revision else ""
    for spec in REGISTRY.values():
        if spec.source == repo:
            return dataclasses.replace(spec, name=spec.name + at, source=name)
    if Path(name).is_dir():
        folder = Path(name).resolve()
        return BackboneSpec(folder.name, str(folder))
    if HUB_ID.match(name):
        return BackboneSpec(repo.replace("/", "--") + at, name)
    raise ConfigError(
        f"unknown backbone {name!r}: {nearest(name, REGISTRY)} (or a hub id org/name, or a folder that exists)"
    )


def settled(name: str) -> str:
    """A backbone's name that means the same from any working directory: a folder by its full path.

    Registry names come first: a run's output may lie in a folder of that name.
    """
    return str(Path(name).resolve()) if name not in REGISTRY and Path(name).is_dir() else name


def fetch(spec: BackboneSpec) -> Path:
    """Folder with the backbone's config, tokenizer and safetensors; fetched once, then cached.

    Raises ``SourceError`` if a download fails or a hash differs, ``ConfigError`` as :func:`read_model_config` does
    before the weights are fetched.
    """
    if isinstance(spec.source, GGUFPackage):
        return _fetch_package(spec.name, spec.source)
    if Path(spec.source).is_dir():
        return Path(spec.source)
    return snapshot(spec.source, HUB_FILES, ignored=OTHER_LAYOUTS, check_config=lambda f: read_model_config(spec, f))


def read_model_config(spec: BackboneSpec, folder: Path) -> PreTrainedConfig:
    """The model's configuration; raises ``ConfigError`` for a kind of model that is not supported,
    ``SourceError`` for a file that is no configuration."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # each architecture validates its configuration in its own way
        said = f"{folder / 'config.json'} is no configuration of a model known here ({error})"
        raise SourceError(f"{said}; mend or replace it, then run the same command again") from None
    text = config.get_text_config()
    if text is not config and spec.unverified:
        config = text
    elif text is not config:
        raise ConfigError(
            f"{spec.name} is multimodal ({type(config).__name__}); save its language model alone, of kind "
            f"{text.model_type}, and give that folder"
        )
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise ConfigError(
            f"{spec.name}: its embeddings have width {config.word_embed_proj_dim}, its layers {config.hidden_size}; "
            f"an activation cannot enter as an embedding"
        )
    return config


def settings_hash(folder: Path) -> str:
    """sha256 over a model's configuration and its tokenizer, 16 hex digits; versions and paths that the library notes there
    are left out."""
    settings = [folder / name for name in ("config.json", "tokenizer_config.json") if (folder / name).exists()]
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]
    said = [{k: v for k, v in read_json(path).items() if k not in NOTES} for path in settings]
    return json_hash(said + [[f.name, sha256_once(f)] for f in files])[:16]


def weight_hash(folder: Path) -> str:
    """sha256 over the safetensors of a folder, names and contents, 16 hex digits."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{folder} holds no .safetensors file; convert the weights first")
    return hashlib.sha256("".join(f"{f.name} {sha256_once(f)}\n" for f in files).encode()).hexdigest()[:16]


def _fetch_package(name: str, package: GGUFPackage) -> Path:
    folder = cache_dir() / "backbones" / f"{name}-{package.sha256[:12]}"
    if (folder / "source.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    with hold(lock, f"another process is fetching {name} into {folder}", wait=True):
        if not (folder / "source.json").exists():
            _make_folder(name, package, folder)
    return folder


def _make_folder(name: str, package: GGUFPackage, folder: Path) -> None:
    require_disk(cache_dir(), 2_500_000_000)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="fetch-", ignore_cleanup_errors=True) as tmp:
        gguf = _assemble(package, Path(tmp))
        converted = Path(tmp) / "converted"
        print(f"{name}: converting {gguf.name} to bf16 safetensors (once, about a minute)")
        _convert(gguf, converted)
        write_json(converted / "source.json", {"requirements": package.requirements, "gguf_sha256": package.sha256})
        os.replace(converted, folder)


def download_wheels(requirements: tuple[str, ...], folder: Path) -> None:
    """Put pinned wheels into a folder; raises ``SourceError`` with what pip said, or where there is no pip."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{', '.join(requirements)} cannot be downloaded: {sys.executable} has no pip, as in an environment made by uv; "
            f"run `uv pip install pip` or `{sys.executable} -m ensurepip`, then the same command again"
        )
    print(f"downloading {', '.join(requirements)}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        *requirements,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"pip could not download {requirements}:\n{done.stderr[-2000:]}")


def _assemble(package: GGUFPackage, folder: Path) -> Path:
    """Download the wheels, join the GGUF parts inside, check the hash."""
    download_wheels(package.requirements, folder)
    gguf = folder / "weights.gguf"
    with open(gguf, "wb") as out:
        for member in package.members:
            out.write(read_member(folder, member))
    check_hash(gguf, package.sha256)
    return gguf


def read_member(folder: Path, member: str) -> bytes:
    """A file inside the wheels of a folder; raises ``SourceError`` where none holds it."""
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as z:
            if member in z.namelist():
                return z.read(member)
    raise SourceError(f"none of the wheels in {folder} holds {member}")


def check_hash(path: Path, expected: str) -> None:
    """Raise ``SourceError`` unless the file's sha256 is ``expected``."""
    actual = sha256_file(path)
    if actual != expected:
        raise SourceError(
            f"{path.name}: sha256 is {actual}, expected {expected}; the package was changed or the "
            f"download is broken, nothing was kept"
        )


def _convert(gguf: Path, out: Path) -> None:
    """GGUF to a Hugging Face folder: bf16 safetensors, tokenizer, config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # transformers refuses to save a model it believes to be still quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    write_json(out / "config.json", config)


# What --av and --targets call the authors' own, and --targets their vectors alone.
RELEASED, POOL = "released", "pool"
AV_FILES = ("config.json", "best_av.safetensors", "best_av.pt", "best_av/*")
# Files that hold targets; the first kind that is there is taken.
TARGET_FILES = ("targets.safetensors", "*.pt", "*.parquet")


def fetch_av(source: str, spec: BackboneSpec) -> Path:
    """Folder of a released AV: the authors' own (``released``), ``hub:org/name[@commit]``, or a folder with its files.

    Raises ``SourceError`` if it is none of them, was not published for this backbone, or lacks ``config.json`` or both
    checkpoint formats.
    """
    folder = snapshot(*hub) if (hub := av_on_hub(source, spec)) else _local(source)
    found = {path.name for place in (folder, folder / "best_av") for path in place.glob("*") if path.is_file()}
    if "config.json" not in found or not {"best_av.safetensors", "best_av.pt"} & found:
        raise SourceError(f"{source}: an AV is config.json with best_av.safetensors or best_av.pt; {folder} lacks them")
    return folder


def fetch_targets(source: str, spec: BackboneSpec) -> Path:
    """The file of released targets: the authors' own (``released``, or ``pool`` for their vectors alone),
    ``hub:org/name[@commit]``, a folder that holds one, or the file itself.

    Raises ``SourceError`` if it is none of them, was not published for this backbone or cannot be fetched.
    """
    hub = targets_on_hub(source, spec)
    if hub is None and Path(source).is_file():
        return Path(source)
    return _targets_in(snapshot(*hub) if hub else _local(source), hub[1] if hub else TARGET_FILES)


def targets_content(source: str, spec: BackboneSpec) -> str:
    """What tells released targets from others: the file and its commit on the hub, else its sha256."""
    path, hub = fetch_targets(source, spec), targets_on_hub(source, spec)
    return f"{hub[0].partition('@')[0]}@{path.parent.name}/{path.name}" if hub else sha256_once(path)


def _targets_in(folder: Path, patterns: tuple[str, ...]) -> Path:
    for pattern in (*patterns, *TARGET_FILES):
        files = sorted(folder.glob(pattern))
        # The vectors alone are taken where there is nothing more.
        found = [p for p in files if not p.stem.endswith("_pool")] or files
        if len(found) == 1:
            return found[0]
        if found:
            names = [p.name for p in found]
            raise SourceError(f"{folder} holds {names}: give the path of the one that is meant")
    held = sorted(p.name for p in folder.iterdir())
    raise SourceError(f"{folder} holds {held}; targets are targets.safetensors, a .pt or a .parquet")


def av_on_hub(source: str, spec: BackboneSpec) -> Optional[tuple[str, tuple[str, ...], str]]:
    """What :func:`snapshot` is to fetch for ``--av``: repository, patterns and kind; ``None`` for a folder."""
    repo = _published(source, spec, "av") if source == RELEASED else _hub_name(source)
    return repo and (repo, AV_FILES, "model")


def targets_on_hub(source: str, spec: BackboneSpec) -> Optional[tuple[str, tuple[str, ...], str]]:
    """The same for ``--targets``."""
    if source in (RELEASED, POOL):
        repo, name = _published(source, spec, "targets"), spec.targets_file
        return repo, (name if source == RELEASED else f"{Path(name).stem}_pool.pt",), "dataset"
    repo = _hub_name(source)
    return repo and (repo, TARGET_FILES[:2], "dataset")


def _published(source: str, spec: BackboneSpec, what: str) -> str:
    repo = getattr(spec, what)
    if repo is None:
        there = ", ".join(s.name for s in REGISTRY.values() if getattr(s, what))
        option = "--av" if what == "av" else "--targets"
        raise SourceError(f"{option} {source}: none are known for {spec.name}; the authors published some for {there}")
    return repo


def _hub_name(source: str) -> Optional[str]:
    if not source.startswith("hub:"):
        return None
    name = source.removeprefix("hub:")
    if not HUB_ID.match(name):
        raise SourceError(f"{source}: write it as hub:org/name or hub:org/name@commit")
    return name


def _local(source: str) -> Path:
    if not Path(source).is_dir():
        raise SourceError(f"{source} is neither a folder nor written as hub:org/name")
    return Path(source)


def sources_on_hub(spec: BackboneSpec, av: Optional[str], targets: Optional[str]) -> dict[str, tuple]:
    """Arguments of :func:`bytes_to_fetch` by what they are: of a run's backbone, AV and targets, those on the hub."""
    on_hub = isinstance(spec.source, str) and not Path(spec.source).is_dir()
    found = {
        "backbone": (spec.source, HUB_FILES, "model", OTHER_LAYOUTS) if on_hub else None,
        "AV": av and av_on_hub(av, spec),
        "targets": targets and targets_on_hub(targets, spec),
    }
    return {what: arguments for what, arguments in found.items() if arguments}
