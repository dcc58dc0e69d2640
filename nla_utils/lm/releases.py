"""Where released AVs and targets come from: what the authors published for a backbone, the hub, a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

from nla_utils.errors import SourceError
from nla_utils.lm.hub import HUB_ID, sha256_once, snapshot
from nla_utils.lm.registry import HUB_FILES, OTHER_LAYOUTS, REGISTRY, BackboneSpec

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
