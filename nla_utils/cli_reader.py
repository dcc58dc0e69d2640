"""``nla ablate``, ``nla replicate``: the tail reader taken apart, and its final claims on targets drawn anew."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from nla_utils.cli_options import Backbone, Out, ProfileName, Sizes
from nla_utils.cli_verbalize import fail
from nla_utils.config import ROOT, ConfigError, RunConfig, parse_seeds, size_overrides


def _config(backbone: str, profile: str, out: Path, seed: int, set_: list[str]) -> RunConfig:
    sizes = size_overrides(set_)
    return RunConfig(backbone=backbone, profile=profile, seed=seed, out=str(out.resolve()), **sizes)


def ablate(
    backbone: Backbone = "gemma3-270m",
    profile: ProfileName = "quick",
    out: Out = ROOT / "runs",
    seeds: Annotated[str, typer.Option(help="Seed of the run; more of them add their training targets to the growth "
                                            "with N, drawn where they are not there.")] = "1",
    set_: Sizes = [],
) -> None:  # fmt: skip
    """Take the tail reader of a run apart: one change at a time, and its growth with N. Needs notebooks 01 and 02."""
    from nla_utils.backbone import BackboneError
    from nla_utils.reader_ablation import ablate_reader
    from nla_utils.replication import training_targets
    from nla_utils.results import write_results
    from nla_utils.run import open_run
    from nla_utils.sources import SourceError
    from nla_utils.store import ArtefactError
    from nla_utils.targets import load_targets

    try:
        first, *others = parse_seeds(seeds)
        config = _config(backbone, profile, out, first, set_)
        run = open_run(config)
        targets = load_targets(config, run.folder)
        made_from = {"targets": targets.sha256, "reader": run.folder.load("reader").sha256}
        more = [training_targets(dataclasses.replace(config, seed=seed), run.backbone) for seed in others]
        made_from |= {f"targets of seed {seed}": own.sha256 for seed, (own, _) in zip(others, more)}
        record = ablate_reader(config, run.backbone, targets, run.folder, more)
    except (ConfigError, SourceError, ArtefactError, BackboneError) as error:
        fail(error)
    typer.echo(f"  reader ablation     {write_results(run.folder, config, 'reader_ablation', record, made_from)}")


def replicate(
    backbone: Backbone = "gemma3-270m",
    profile: ProfileName = "quick",
    out: Out = ROOT / "runs",
    seeds: Annotated[str, typer.Option(help="Seeds, the first that of the run that keeps the result.")] = "1,2,3",
    set_: Sizes = [],
) -> None:
    """Repeat the tail reader's claims on targets drawn anew for each seed; trains no AV."""
    from nla_utils.backbone import BackboneError
    from nla_utils.replication import replicate as repeat
    from nla_utils.results import write_results
    from nla_utils.run import open_run
    from nla_utils.sources import SourceError
    from nla_utils.store import ArtefactError

    try:
        chosen = parse_seeds(seeds)
        if len(chosen) < 2:
            raise ConfigError(f"--seeds {seeds}: a spread needs at least two seeds, for example 1,2,3")
        config = _config(backbone, profile, out, chosen[0], set_)
        run = open_run(config)
        record, made_from = repeat(config, run.backbone, chosen)
    except (ConfigError, SourceError, ArtefactError, BackboneError) as error:
        fail(error)
    typer.echo(f"  reader over seeds   {write_results(run.folder, config, 'reader_seeds', record, made_from)}")
