"""The runs of a batch, for the ``Snakefile`` beside this: what to run, where it goes, what failed."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from nla_utils.config import ROOT, Profile, RunConfig
from nla_utils.errors import ConfigError, nearest
from nla_utils.lm.weights import REGISTRY, resolve
from nla_utils.store import read_json

KEYS = ("out", "profiles", "seeds", "backbones", "until", "options", "threads", "gpus")


@dataclass(frozen=True)
class BatchRun:
    """One run: its configuration, the name of its backbone's folder, the options that make ``nla reproduce`` run it."""

    config: RunConfig
    backbone: str
    options: str


def runs_of(batch: Mapping[str, Any], out: Path) -> dict[str, BatchRun]:
    """``{backbone/run: BatchRun}`` of a batch's configuration.

    ``backbones`` maps each backbone to its layers, ``null`` or an empty list for the backbone's own. Raises
    ``ConfigError`` for an unknown key, a missing one, or an impossible run.
    """
    for key in batch:
        if key not in KEYS:
            raise ConfigError(f"unknown key {key!r} of the batch: {nearest(key, KEYS)}")
    missing = [key for key in KEYS if key not in batch]
    if missing:
        raise ConfigError(f"the batch's configuration lacks {', '.join(missing)}")
    runs = {}
    for (name, layers), profile, seed in itertools.product(
        batch["backbones"].items(), batch["profiles"], batch["seeds"]
    ):
        for layer in layers or [None]:
            run = _run(name, layer, profile, seed, out, batch["options"])
            other = runs.setdefault(f"{run.backbone}/{run.config.folder_name}", run)
            if other.config.backbone != run.config.backbone:
                both = f"{other.config.backbone} and {run.config.backbone}"
                raise ConfigError(f"{both} would both be {run.backbone}; rename one")
    return runs


def _run(name: str, layer: int | None, profile: str, seed: int, out: Path, more: str) -> BatchRun:
    # The jobs work elsewhere than where the batch was started.
    name = str((ROOT / name).resolve()) if name not in REGISTRY and (ROOT / name).is_dir() else name
    spec = resolve(name)
    # A backbone's own layer is the plain run, not one of a sweep.
    layer = None if layer == spec.layer else layer
    config = RunConfig(backbone=name, profile=profile, seed=seed, layer=layer, out=str(out))
    options = ["--backbone", name, "--profile", profile, "--seeds", str(seed), "--out", str(out)]
    if layer is not None:
        options += ["--layer", str(layer)]
    return BatchRun(config, spec.name, f"{shlex.join(options)} {more}".strip())


def memory_mb(fetched: str, sizes: Profile) -> int:
    """Main memory that a job asks for: 7 GB for libraries and batches, the weights three times (as they are read, and widened to
    float32 on a CPU without bfloat16 instructions), and what a run of this size holds of the targets' activations.

    ``fetched`` holds the size of the weights in bytes. Raises ``FileNotFoundError`` before they are fetched.
    """
    weights = int(Path(fetched).read_text()) / 1e6
    return round(7000 + 3 * weights + sizes.n_targets * 0.05)


def failures(runs: Mapping[str, BatchRun], out: Path, notebooks: Sequence[str]) -> dict[str, str]:
    """The runs that are not complete, each with the notebook it stopped at and the last line of that one's log."""
    found = {}
    for name in runs:
        undone = [n for n in notebooks if not (out / name / "executed" / f"{n}.ipynb").exists()]
        if undone:
            found[name] = _why(out / name / "logs" / f"{undone[0]}.log", undone[0])
    return found


def seconds(run: Path, notebooks: Sequence[str]) -> float:
    """Seconds that the notebooks of a run took, as far as they are finished."""
    paths = [run / "executed" / f"{n}.ipynb" for n in notebooks]
    return sum(read_json(p)["metadata"]["papermill"]["duration"] for p in paths if p.exists())


def _why(log: Path, notebook: str) -> str:
    if not log.exists():
        return f"{notebook} was not begun"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{notebook}: {lines[-1] if lines else 'no output'} (see {log})"
