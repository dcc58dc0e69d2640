"""The ``nla`` command: reproduce §11, regenerate the paper, render the site. Extensions add commands of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Optional

import typer

from nla_utils.config import ROOT, RunConfig, parse_seeds
from nla_utils.errors import ArtefactError
from nla_utils.runner import extension_commands  # noqa: F401, whose commands register themselves
from nla_utils.runner.options import Adopt, app, finish, show, where, with_config, write_pages

BACKBONE_HELP = "Registry name, hub id (org/name@commit) or folder; repeat for several."
AV_HELP = "An AV instead of training one: released (the authors' own for the backbone), hub:org/name[@commit] or a folder."
TARGETS_HELP = (
    "Targets instead of drawing them: released (the authors' own for the backbone), pool (their vectors alone: no "
    "ceilings), hub:org/name[@commit], a folder or a file."
)
CORPUS_HELP = "Targets from texts of your own instead: a .jsonl with a field 'text', or a folder of .txt files."
SEEDS_HELP = "Seeds of targets, training and rollouts, with commas; each is a run of its own."
WITH_HELP = "What to run beside §11, with commas: tail-reader, depth."


@with_config(without=("backbone", "seed"))
def reproduce(
    config: RunConfig,
    backbone: Annotated[list[str], typer.Option(help=BACKBONE_HELP)] = ["gemma3-270m"],
    seeds: Annotated[str, typer.Option("--seeds", "--seed", help=SEEDS_HELP)] = "1",
    first: Annotated[int, typer.Option("--from", help="First notebook to run.")] = 1,
    last: Annotated[int, typer.Option("--until", help="Last notebook to run.")] = 6,
    with_: Annotated[str, typer.Option("--with", help=WITH_HELP)] = "",
    av: Annotated[Optional[str], typer.Option(help=AV_HELP)] = None,
    targets: Annotated[Optional[str], typer.Option(help=TARGETS_HELP)] = None,
    corpus: Annotated[Optional[Path], typer.Option(help=CORPUS_HELP)] = None,
    adopt: Adopt = False,
) -> None:
    """Run the notebooks 01-06 through papermill; what is finished and matches is skipped."""
    from nla_utils.lm.registry import settled
    from nla_utils.lm.releases import POOL
    from nla_utils.runner.notebooks import reproduce as run_all
    from nla_utils.runner.notebooks import select_stages

    texts = None if corpus is None else where(corpus)
    configs = [
        dataclasses.replace(
            config, backbone=b, seed=seed, av=av and settled(av), released_targets=targets and settled(targets),
            corpus=texts,
        )
        for b in map(settled, backbone) for seed in parse_seeds(seeds)
    ]  # fmt: skip
    stages = select_stages(first, last, with_)
    if targets == POOL:
        # Vectors without texts have no ceilings, which the pages of 06 set every other row against.
        stages = [stage for stage in stages if stage.number < 6]
    run_all(configs, lambda folder: finish(folder, adopt), stages)


@with_config()
def distribute(config: RunConfig) -> None:
    """Make the artefacts of 01-04 in the processes that `accelerate launch -m nla_utils distribute` has started."""
    from nla_utils import workers
    from nla_utils.runner.distributed import make_artefacts

    path = make_artefacts(config)
    if workers.leads():
        typer.echo(f"  artefacts           {path}")


@app.command()
def paper() -> None:
    """Regenerate paper/*.md with their tables and figures from the JSON on disk; loads no model."""
    write_pages()


@app.command()
def spread(
    folders: Annotated[list[Path], typer.Argument(help="Run folders that differ in the seed, the committed run first.")],
) -> None:
    """Measure how much each row varies over seeds, which is how much a reproduction may differ; for maintainers."""
    from nla_utils.paper.reproduction import SPREAD, write_spread
    from nla_utils.paper.results import load_results

    runs = [load_results(folder) for folder in folders]
    if None in runs:
        raise ArtefactError(f"{folders[runs.index(None)]} has not all results of a run; run notebooks 01 to 05 there")
    typer.echo(f"  spread over seeds   {show(write_spread(runs, SPREAD))}")


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the site.")] = ROOT / "site",
) -> None:
    """Render section 11 and the executed notebooks as one static HTML site; needs no network to make or to view."""
    from nla_utils.runner.site import build_site

    pages = build_site(out.resolve())
    typer.echo(f"  {show(pages[0])} and {len(pages) - 1} more pages")

