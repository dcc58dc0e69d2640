"""The heavy part of notebooks 01-04 in several processes, for ``accelerate launch -m nla_utils.work``.

The artefacts are those of one process; ``nla reproduce`` with the same options then runs the notebooks over them.
"""

from __future__ import annotations

import typer

from nla_utils import parallel
from nla_utils.cli_options import Backbone, Device, Dtype, Out, ProfileName, Seed, Sizes
from nla_utils.cli_verbalize import fail
from nla_utils.config import ROOT, ConfigError, RunConfig, size_overrides


def work(
    backbone: Backbone = "gemma3-270m",
    profile: ProfileName = "quick",
    out: Out = ROOT / "runs",
    seed: Seed = 1,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    set_: Sizes = [],
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
