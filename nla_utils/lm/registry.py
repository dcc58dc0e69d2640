"""Where weights come from: the registry, pinned packages (GGUF inside), the hub, a local folder.

Whatever the source, :func:`fetch` returns a Hugging Face folder that loads without a network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Iterable, Optional

from nla_utils.artefacts import json_hash, read_json, require_disk, sha256_file, write_json
from nla_utils.config import cache_dir
from nla_utils.errors import ConfigError, SourceError, nearest
from nla_utils.lm.hub import HUB_ID, sha256_once, snapshot
from nla_utils.locks import hold

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


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
        f"unknown backbone {name!r}: {nearest(name, REGISTRY)} "
        f"(or a hub id org/name, or a folder that exists)"
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
        write_json(
            converted / "source.json",
            {"requirements": package.requirements, "gguf_sha256": package.sha256},
        )
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
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--dest", str(folder), *requirements,
    ]  # fmt: skip
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
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    # transformers refuses to save a model it believes to be still quantized.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    write_json(out / "config.json", config)
