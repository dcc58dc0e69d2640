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
    runs: dict[str, BatchRun] = {}
    chosen = [(name, layer) for name, layers in batch["backbones"].items() for layer in layers or [None]]
    for (name, layer), profile, seed in itertools.product(chosen, batch["profiles"], batch["seeds"]):
        # The jobs work elsewhere than where the batch was started.
        name = str((ROOT / name).resolve()) if name not in REGISTRY and (ROOT / name).is_dir() else name
        spec = resolve(name)
        options = ["--backbone", name, "--profile", profile, "--seeds", str(seed), "--out", str(out)]
        # A backbone's own layer is the plain run, not one of a sweep.
        layer = None if layer == spec.layer else layer
        options += [] if layer is None else ["--layer", str(layer)]
        config = RunConfig(backbone=name, profile=profile, seed=seed, layer=layer, out=str(out))
        run = BatchRun(config, spec.name, f"{shlex.join(options)} {batch['options']}".strip())
        other = runs.setdefault(f"{run.backbone}/{config.folder_name}", run)
        if other.config.backbone != name:
            raise ConfigError(f"{other.config.backbone} and {name} would both be {spec.name}; rename one")
    return runs


def memory_mb(fetched: str, sizes: Profile) -> int:
    """Main memory that a job asks for. ``fetched`` is a file with the size of the weights in bytes.

    7 GB for libraries and batches; the weights three times, as they are read, and widened to float32 on a CPU without
    bfloat16 instructions; and the targets' activations. Raises ``FileNotFoundError`` before weights are fetched.
    """
    weights = int(Path(fetched).read_text()) / 1e6
    return round(7000 + 3 * weights + sizes.n_targets * 0.05)


def failures(runs: Mapping[str, BatchRun], out: Path, notebooks: Sequence[str]) -> dict[str, str]:
    """The runs that are not complete, each with the notebook it stopped at and the last line of that one's log."""
    found = {}
    for name in runs:
        undone = [n for n in notebooks if not (out / name / "executed" / f"{n}.ipynb").exists()]
        if undone:
            log = out / name / "logs" / f"{undone[0]}.log"
            said = (
                [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
            )
            why = f"{undone[0]}: {said[-1] if said else 'no output'} (see {log})"
            found[name] = why if log.exists() else f"{undone[0]} was not begun"
    return found


def seconds(run: Path, notebooks: Sequence[str]) -> float:
    """Seconds that the notebooks of a run took, as far as they are finished."""
    paths = [run / "executed" / f"{n}.ipynb" for n in notebooks]
    return sum(read_json(p)["metadata"]["papermill"]["duration"] for p in paths if p.exists())
