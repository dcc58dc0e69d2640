"""The heavy part of notebooks 01-04 in several processes: ``accelerate launch -m nla_utils distribute``."""

from __future__ import annotations

from pathlib import Path

from nla_utils import workers
from nla_utils.config import RunConfig
from nla_utils.lm.registry import fetch, resolve
from nla_utils.run import open_run
from nla_utils.stages.ceilings import make_ceilings
from nla_utils.stages.rollouts import make_rollouts
from nla_utils.stages.targets import make_targets
from nla_utils.stages.training import train_av


def make_artefacts(config: RunConfig) -> Path:
    """Draw targets, train the AV, make ceilings and rollouts, this process's share of them; returns the run's folder.

    The artefacts are those of one process; ``nla reproduce`` with the same options then runs the notebooks over them.
    """
    # Before the processes meet: whoever waits for a long download in a process group is taken for lost.
    fetch(resolve(config.backbone))
    workers.start(config.device)
    run = open_run(config)
    targets = make_targets(run)
    train_av(run, targets)
    make_ceilings(run, targets)
    make_rollouts(run, targets)
    return run.folder.path
