"""Where weights come from: the registry of backbones, the model hub, pinned PyPI wheels, released AVs and targets."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Iterator, Optional, Sequence

from nla_utils.config import cache_dir
from nla_utils.errors import ConfigError, SourceError, nearest
from nla_utils.store import atomic_write, hold, json_hash, read_json, require_disk, sha256_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")
COMMIT = re.compile(r"^[0-9a-f]{40}$")
# In a snapshot's folder: the patterns whose files are complete and have the hub's hashes.
VERIFIED = ".verified"
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "*.txt")
# Files that hold a tokenizer.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# The same weights again, under another name or in a folder.
OTHER_LAYOUTS = ("consolidated*", "*/*")


@dataclass(frozen=True)
class HubFiles:
    """Files of a hub repository, all at one commit: those that match ``patterns`` and none of ``ignored``; one of
    ``needed`` must be among them, if any are named.

    ``source`` is ``org/name`` or ``org/name@revision``, ``kind`` ``model`` or ``dataset``. Without a revision it is the
    commit that an earlier download pinned, else the newest. Raises ``SourceError`` that says what to do.
    """

    source: str
    patterns: Sequence[str]
    kind: str = "model"
    ignored: Sequence[str] = ()
    needed: Sequence[str] = ()

    @property
    def repo(self) -> str:
        return self.source.partition("@")[0]

    @property
    def _pin(self) -> Path:
        return cache_dir() / "pins" / f"{self.kind}s--{self.repo.replace('/', '--')}"

    @property
    def revision(self) -> str:
        """The one that is asked for or pinned, else empty."""
        stated = self.source.partition("@")[2]
        return stated or (self._pin.read_text(encoding="ascii").strip() if self._pin.exists() else "")

    @property
    def _wanted(self) -> dict:
        return {"allow_patterns": [*self.patterns], "ignore_patterns": [*self.ignored]}

    def fetch(self) -> Path:
        """Their folder; without a revision the commit is pinned, so that later runs take the same one."""
        revision, folder = self.revision, self.fetch_once()
        if not COMMIT.match(revision):
            print(f"{self.repo}: using commit {folder.name}; pin it with {self.repo}@{folder.name}")
        if not revision:
            atomic_write(self._pin, folder.name.encode())
        return folder

    def fetch_once(self) -> Path:
        """Their folder, nothing pinned. Files in a cache are not fetched again; hashes are compared with the hub's."""
        from huggingface_hub import snapshot_download

        if kept := self._kept():
            return kept
        commit, files = self._published()
        own, missing = self._cached(commit, files)
        if own:
            return own
        require_disk(_hub_cache(), missing)
        where = dict(repo_type=self.kind, revision=commit, cache_dir=_hub_cache())
        with self.explained():
            folder = Path(snapshot_download(self.repo, **where, **self._wanted))
        for file in files:
            path = folder / file.rfilename
            if not _is_published(path, file):
                path.resolve().unlink()
                path.unlink()
                said = f"{self.repo}@{commit}: {file.rfilename} does not have the hash that the hub names"
                raise SourceError(f"{said}; it was removed, run the command again")
        atomic_write(folder / VERIFIED, "\n".join({*_verified(folder), *self.patterns}).encode())
        return folder

    def bytes_to_fetch(self) -> int:
        """How many bytes :meth:`fetch` would still fetch."""
        return 0 if self._kept() else self._cached(*self._published())[1]

    def _kept(self) -> Optional[Path]:
        """A snapshot of a pinned commit whose files of these patterns were fetched completely and checked before."""
        revision = self.revision
        folder = _hub_cache() / self._pin.name / "snapshots" / revision
        return folder if COMMIT.match(revision) and set(self.patterns) <= _verified(folder) else None

    def _published(self) -> tuple[str, list]:
        """The commit, and the hub's records of the files."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils import filter_repo_objects

        how = dict(revision=self.revision or None, repo_type=self.kind, files_metadata=True)
        with self.explained():
            info = HfApi().repo_info(self.repo, **how)
        files = list(filter_repo_objects(info.siblings, **self._wanted, key=lambda file: file.rfilename))
        if not files:
            names = sorted(file.rfilename for file in info.siblings)
            raise SourceError(f"{self.repo}@{info.sha} has no file {' or '.join(self.patterns)}; it holds {names}")
        if self.needed and not {*self.needed} & {file.rfilename for file in files}:
            lacks = f"{self.repo}@{info.sha} holds no tokenizer ({', '.join(self.needed)})"
            raise SourceError(f"{lacks}; give a folder of its files with that of the model added")
        return info.sha, files

    def _cached(self, commit: str, files: list) -> tuple[Optional[Path], int]:
        """The snapshot in the user's own cache (``HF_HOME``), if it is complete and has the hub's hashes; else the
        bytes that ours lacks."""
        from huggingface_hub import try_to_load_from_cache

        def found(file, cache: Optional[Path]) -> Optional[Path]:
            where = dict(cache_dir=cache, revision=commit, repo_type=self.kind)
            path = try_to_load_from_cache(self.repo, file.rfilename, **where)
            return Path(path) if isinstance(path, str) else None

        own = [found(file, None) for file in files]
        if all(path and _is_published(path, file) for path, file in zip(own, files)):
            return own[0].parents[files[0].rfilename.count("/")], 0
        return None, sum(file.size or 0 for file in files if not found(file, _hub_cache()))

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within it, what the hub's client raises becomes ``SourceError``."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        # The base of its transport's errors, whichever HTTP library this version is built on. The part of it that
        # fetches large files raises a plain RuntimeError.
        transport = next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
        try:
            yield
        except (OSError, transport, HFValidationError, RuntimeError) as error:
            raise SourceError(self._explain(error)) from None

    def _explain(self, error: Exception) -> str:
        from huggingface_hub import errors as hub

        repo, where, said = self.repo, self.source, " ".join(str(error).split())
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, hub.HFValidationError):
            return f"{repo} is no name that a repository of the hub can have: {said}"
        if isinstance(error, hub.GatedRepoError):
            page = f"https://huggingface.co/{'datasets/' if self.kind == 'dataset' else ''}{repo}"
            sign_in = "run `hf auth login` with a token that may read it"
            return f"{where} is gated: open {page} signed in, accept its terms, then {sign_in}, and start again"
        if isinstance(error, hub.RevisionNotFoundError):
            if repo == where:
                pinned = f"{repo} no longer has {self.revision}, which an earlier run pinned"
                return f"{pinned}; to take the newest, delete {self._pin}"
            return (
                f"{repo} has no revision {self.revision!r}; leave it out to use the newest, or give one of its commits"
            )
        if isinstance(error, hub.RepositoryNotFoundError):
            return f"{where} does not exist, or is private and you are not signed in (`hf auth login`)"
        if status is not None:
            sign_in = "; run `hf auth login` with a token that may do this" if status in (401, 403) else ""
            return f"{where}: the hub answered {status}: {said}{sign_in}"
        if isinstance(error, OSError) and error.filename:
            return f"{where}: {error.filename}: {error.strerror}; put that right, then run the same command again"
        name = type(error).__name__ + (f": {said}" if type(error) is RuntimeError else "")
        remedy = "check the network and HF_HUB_OFFLINE, or give a local folder or a commit that was fetched before"
        return f"{where} could not be reached ({name}); {remedy}"


def _hub_cache() -> Path:
    return cache_dir() / "hub"


def _verified(folder: Path) -> set[str]:
    path = folder / VERIFIED
    return set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()


def _is_published(path: Path, file) -> bool:
    """Whether a file is the hub's: large ones are named by their sha256, small ones by git's id of their content."""
    if file.lfs is not None:
        return sha256_once(path) == file.lfs.sha256
    data = path.read_bytes()
    return file.blob_id in (None, hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())


def sha256_once(path: Path) -> str:
    """A large file's sha256, read once a process, however often it is looked up."""
    about = path.stat()
    return _sha256(path, about.st_mtime_ns, about.st_size)


@functools.cache
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    return sha256_file(path)


@dataclass(frozen=True)
class GGUFPackage:
    """A GGUF file inside pinned PyPI wheels; ``members`` are joined in order."""

    requirements: Sequence[str]
    members: Sequence[str]
    sha256: str


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone and how the paper's measurement is set up on it; ``backbones.toml`` explains the fields.

    ``source`` is a package, a hub id or a folder.
    """

    name: str
    source: GGUFPackage | str
    layer: Optional[int] = None
    num_prefix_tokens: int = 1
    start_id: Optional[int] = None
    eos_ids: Optional[Sequence[int]] = None
    padding_side: Optional[str] = None
    ceiling: str = "paraphrase_bestof8"
    license: Optional[str] = None
    title: str = ""
    family: str = "other"
    variant: str = ""
    weights: str = ""
    samples: str = ""
    av: Optional[str] = None
    targets: Optional[str] = None
    targets_file: Optional[str] = None
    unverified: Optional[str] = None

    @property
    def shown(self) -> str:
        """The name for readers, with the variant: ``Gemma-3-270M (base, Q4)``."""
        return (self.title or self.name) + (f" ({self.variant})" if self.variant else "")

    @property
    def on_hub(self) -> Optional[HubFiles]:
        """The files of a backbone that comes from the hub."""
        if isinstance(self.source, GGUFPackage) or Path(self.source).is_dir():
            return None
        return HubFiles(self.source, HUB_FILES, ignored=OTHER_LAYOUTS, needed=TOKENIZERS)


def _read_registry() -> dict[str, BackboneSpec]:
    """The backbones of ``backbones.toml`` beside this file."""
    found = {}
    for name, entry in tomllib.loads(Path(__file__).with_name("backbones.toml").read_text(encoding="utf-8")).items():
        package = entry.pop("package", None)
        found[name] = BackboneSpec(name, GGUFPackage(**package) if package else entry.pop("source"), **entry)
    return found


REGISTRY = _read_registry()


def weights_note(names: Iterable[str]) -> str:
    """A sentence or two for each backbone of ``names`` whose weights the registry describes."""
    specs = (REGISTRY[name] for name in dict.fromkeys(names) if name in REGISTRY)
    return " ".join(f"{spec.shown}: {spec.weights}. {spec.samples}".strip() for spec in specs if spec.weights)


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


def canonical_name(name: str) -> str:
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
    if not (files := spec.on_hub):
        return Path(spec.source)
    if files.bytes_to_fetch():
        read_model_config(spec)
    return files.fetch()


def read_model_config(spec: BackboneSpec, folder: Optional[Path] = None) -> PreTrainedConfig:
    """The model's configuration, fetched alone from the hub where its ``folder`` is not there yet.

    Raises ``ConfigError`` for a kind of model that is not supported, ``SourceError`` for what is no configuration.
    """
    from transformers import AutoConfig

    folder = folder or HubFiles(spec.source, ("config.json",)).fetch_once()
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # each architecture validates its configuration in its own way
        said = f"{folder / 'config.json'} is no configuration of a model known here ({error})"
        raise SourceError(f"{said}; mend or replace it, then run the same command again") from None
    text = config.get_text_config()
    if text is not config and not spec.unverified:
        raise ConfigError(
            f"{spec.name} is multimodal ({type(config).__name__}); save its language model alone, of kind "
            f"{text.model_type}, and give that folder"
        )
    width = getattr(text, "word_embed_proj_dim", text.hidden_size)
    if width != text.hidden_size:
        raise ConfigError(
            f"{spec.name}: its embeddings have width {width}, its layers {text.hidden_size}; "
            f"an activation cannot enter as an embedding"
        )
    method = quantized(config).get("quant_method", "bitsandbytes")
    if quantized(config) and method not in DEQUANTIZED:
        raise ConfigError(
            f"{spec.name} is quantized with {method}, which is not served: give the checkpoint that it was made from, "
            f"or dequantize it where {method} is installed, save it, and give that folder"
        )
    return text


# Quantized weights that are widened as they are read, without a package or a GPU.
DEQUANTIZED = ("fp8", "mxfp4")


def quantized(config: PreTrainedConfig) -> dict:
    """What a model's configuration says of quantized weights; empty where they are not quantized."""
    return next((x for c in (config, config.get_text_config()) if (x := getattr(c, "quantization_config", None))), {})


# What the library notes in a model's settings that changes nothing.
NOTES = ("transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype")


def settings_hash(folder: Path) -> str:
    """sha256 over a model's configuration and tokenizer, 16 hex digits; versions and paths are left out."""
    settings = [folder / name for name in ("config.json", "tokenizer_config.json") if (folder / name).exists()]
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]
    said = [{k: v for k, v in read_json(path).items() if k not in NOTES} for path in settings]
    return json_hash(said + [[f.name, sha256_once(f)] for f in files])[:16]


def weight_hash(folder: Path) -> str:
    """sha256 over a folder's safetensors, names and contents, 16 hex digits; raises ``SourceError`` without any."""
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
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
    """Download the wheels, join the parts of the GGUF file inside, check its hash, convert it."""
    require_disk(cache_dir(), 2_500_000_000)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="fetch-", ignore_cleanup_errors=True) as tmp:
        gguf, converted = Path(tmp) / "weights.gguf", Path(tmp) / "converted"
        download_wheels(package.requirements, gguf.parent)
        with open(gguf, "wb") as out:
            for member in package.members:
                out.write(read_member(gguf.parent, member))
        check_hash(gguf, package.sha256)
        print(f"{name}: converting {gguf.name} to bf16 safetensors (once, about a minute)")
        _convert(gguf, converted)
        write_json(converted / "source.json", {"requirements": package.requirements, "gguf_sha256": package.sha256})
        os.replace(converted, folder)


def download_wheels(requirements: Sequence[str], folder: Path) -> None:
    """Put pinned wheels into a folder; raises ``SourceError`` with what pip said, or where there is no pip."""
    named = ", ".join(requirements)
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{named} cannot be downloaded: {sys.executable} has no pip, as in an environment made by uv; "
            f"run `uv pip install pip` or `{sys.executable} -m ensurepip`, then the same command again"
        )
    print(f"downloading {named}")
    download = [sys.executable, *"-m pip download --quiet --no-deps --only-binary=:all: --dest".split()]
    done = subprocess.run([*download, str(folder), *requirements], capture_output=True, text=True)
    if done.returncode:
        raise SourceError(f"pip could not download {named}:\n{done.stderr[-2000:]}")


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
    config = read_json(out / "config.json")
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
    hub = released_on_hub(source, spec, "av")
    folder = hub.fetch() if hub else _local(source)
    found = {path.name for place in (folder, folder / "best_av") for path in place.glob("*") if path.is_file()}
    if "config.json" not in found or not {"best_av.safetensors", "best_av.pt"} & found:
        raise SourceError(f"{source}: an AV is config.json with best_av.safetensors or best_av.pt; {folder} lacks them")
    return folder


def fetch_targets(source: str, spec: BackboneSpec) -> Path:
    """The file of released targets: the authors' own (``released``, or ``pool`` for their vectors alone),
    ``hub:org/name[@commit]``, a folder that holds one, or the file itself.

    Raises ``SourceError`` if it is none of them, was not published for this backbone or cannot be fetched.
    """
    hub = released_on_hub(source, spec, "targets")
    if hub is None and Path(source).is_file():
        return Path(source)
    folder = hub.fetch() if hub else _local(source)
    for pattern in (*(hub.patterns if hub else ()), *TARGET_FILES):
        files = sorted(folder.glob(pattern))
        # The vectors alone are taken where there is nothing more.
        found = [p for p in files if not p.stem.endswith("_pool")] or files
        if len(found) == 1:
            return found[0]
        if found:
            raise SourceError(f"{folder} holds {[p.name for p in found]}: give the path of the one that is meant")
    held = sorted(p.name for p in folder.iterdir())
    raise SourceError(f"{folder} holds {held}; targets are targets.safetensors, a .pt or a .parquet")


def targets_content(source: str, spec: BackboneSpec) -> str:
    """What tells released targets from others: the file and its commit on the hub, else its sha256."""
    path, hub = fetch_targets(source, spec), released_on_hub(source, spec, "targets")
    return f"{hub.repo}@{path.parent.name}/{path.name}" if hub else sha256_once(path)


def released_on_hub(source: str, spec: BackboneSpec, what: str) -> Optional[HubFiles]:
    """The files of what ``--av`` or ``--targets`` names; ``None`` for what is local. Raises ``SourceError``."""
    files, kind = (AV_FILES, "model") if what == "av" else (TARGET_FILES[:2], "dataset")
    if source == RELEASED or (source == POOL and what == "targets"):
        repo = getattr(spec, what)
        if repo is None:
            known = ", ".join(s.name for s in REGISTRY.values() if getattr(s, what))
            said = f"--{what} {source}: none are known for {spec.name}"
            raise SourceError(f"{said}; the authors published some for {known}")
        if what == "targets":
            files = (spec.targets_file if source == RELEASED else f"{Path(spec.targets_file).stem}_pool.pt",)
        return HubFiles(repo, files, kind)
    if not source.startswith("hub:"):
        return None
    if not HUB_ID.match(source.removeprefix("hub:")):
        raise SourceError(f"{source}: write it as hub:org/name or hub:org/name@commit")
    return HubFiles(source.removeprefix("hub:"), files, kind)


def _local(source: str) -> Path:
    if not Path(source).is_dir():
        raise SourceError(f"{source} is neither a folder nor written as hub:org/name")
    return Path(source)
