"""The heavy part of notebooks 01-04 in several processes, for ``accelerate launch -m nla_utils.work``.

The artefacts are those of one process; ``nla reproduce`` with the same options then runs the notebooks over them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nla_utils import parallel
from nla_utils.cli_verbalize import SET_HELP, fail
from nla_utils.config import PROFILES, ROOT, ConfigError, RunConfig, size_overrides


def work(
    backbone: Annotated[str, typer.Option(help="Registry name, hub id (org/name@commit) or folder.")] = "gemma3-270m",
    profile: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "quick",
    out: Annotated[Path, typer.Option(help="Folder for everything a run writes.")] = ROOT / "runs",
    seed: Annotated[int, typer.Option(help="Seed of targets, training and rollouts.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Backbone dtype: bfloat16, float32 or float16.")] = "bfloat16",
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],
) -> None:
    """Draw targets, train the AV, make ceilings and rollouts, the work shared between the processes."""
    from nla_utils.backbone import BackboneError
    from nla_utils.ceilings import make_ceilings
    from nla_utils.rollouts import make_rollouts
    from nla_utils.run import open_run
    from nla_utils.sources import SourceError, fetch, resolve, settled
    from nla_utils.store import ArtefactError
    from nla_utils.targets import make_targets
    from nla_utils.training import train_av

    name = settled(backbone)
    try:
        config = RunConfig(backbone=name, profile=profile, seed=seed, out=str(out.resolve()), device=device,
                           dtype=dtype, **size_overrides(set_))  # fmt: skip
        parallel.start(device)
        if parallel.leads():
            fetch(resolve(name))
        parallel.wait()
        run = open_run(config)
        targets = make_targets(config, run.backbone, run.folder)
        train_av(config, run.backbone, targets, run.folder)
        make_ceilings(config, run.backbone, targets, run.folder)
        make_rollouts(config, run.backbone, targets, run.folder)
    except (ConfigError, SourceError, ArtefactError, BackboneError) as error:
        fail(error)
    if parallel.leads():
        typer.echo(f"  artefacts           {run.folder.path}")


if __name__ == "__main__":
    typer.run(work)
