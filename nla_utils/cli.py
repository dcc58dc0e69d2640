"""The ``nla`` command of §11, and what all commands share: options, errors as messages, how a run ends."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import signal
import sys
from pathlib import Path
from typing import Callable

import click

from nla_utils import __version__
from nla_utils.config import PROFILES, ROOT, RunConfig, parse_seeds, size_overrides
from nla_utils.errors import ArtefactError, ConfigError, NLAError, nearest
from nla_utils.store import RunFolder, join_processes, process_rank

FILE = click.Path(path_type=Path)
# The options that make a configuration.
OPTIONS: dict[str, dict] = {
    "backbone": dict(default="gemma3-270m", help="Registry name, hub id (org/name@commit) or folder."),
    "profile": dict(default="quick", help=f"One of {', '.join(PROFILES)}."),
    "out": dict(type=FILE, default=ROOT / "runs", show_default=False, help="Folder for everything a run writes."),
    "seed": dict(type=int, default=1, help="Seed of targets, training and rollouts."),
    "layer": dict(type=int, help="Extraction layer, if not the backbone's own."),
    "device": dict(default="auto", help="auto, cpu, cuda, mps, or split: spread over all cards."),
    "dtype": dict(default="bfloat16", help="bfloat16, float32 or float16."),
    "set": dict(multiple=True, help="Override a size: n_targets=, n_eval=, n_rollouts= or pool_size=."),
}
adopt_option = click.option(
    "--adopt", is_flag=True, help="Copy results and executed notebooks into the repository and rebuild its pages."
)
# What is beside §11, from those who build it: stages by the name that --with knows, and makers of pages.
BESIDE: dict[str, Callable] = {}
PAGES: list[Callable] = []


class OneHandler(click.Group):
    """Prints what a user can mend in one line and ends with status 2; a bug keeps its traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except NLAError as error:
            message = str(error)
        except OSError as error:
            # A pipe that is closed early, as by head, is the app's own to handle.
            if error.errno == errno.EPIPE:
                raise
            # Whatever the file system refuses where no module has a better word for it.
            what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            message = f"{what}; put that right, then run the same command again"
        except KeyboardInterrupt as error:
            click.echo(f"{error if error.args else 'stopped'}; the same command resumes", err=True)
            raise click.exceptions.Exit(130) from None
        click.secho(f"error: {message}", fg="red", err=True)
        raise click.exceptions.Exit(2)


@click.group(cls=OneHandler, context_settings={"help_option_names": ["--help"], "show_default": True})
@click.version_option(__version__, message="%(version)s")
def app() -> None:
    """Activations as text: §11 reproduced, audited, and what is beside it."""
    # A batch system's end of a job is Ctrl-C: what was made is kept, and the same command resumes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Figures are drawn without a window, and without the user's own style.
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    # A terminal that cannot show a character shows another; it is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def with_config(*without: str) -> Callable:
    """Decorator: a command whose first parameter is the configuration made from :data:`OPTIONS`, but for the names in
    ``without``."""
    names = [name for name in OPTIONS if name not in without]

    def register(command: Callable) -> click.Command:
        @functools.wraps(command)
        def run(**given):
            return command(_config(**{name: given.pop(name) for name in names}), **given)

        for name in reversed(names):
            run = click.option(f"--{name}", **OPTIONS[name])(run)
        return app.command()(run)

    return register


def _config(out: Path, backbone: str = RunConfig.backbone, **values) -> RunConfig:
    from nla_utils.lm.weights import canonical_name

    sizes = size_overrides(values.pop("set"))
    return RunConfig(backbone=canonical_name(backbone), out=show(out.resolve()), **values, **sizes)


def show(path: Path) -> str:
    """A path as it is printed: from the repository's root where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def finish(folder: RunFolder, adopt: bool) -> None:
    """Say where everything of a run is, compare it with the committed run, and adopt it if that was asked for."""
    from nla_utils.notebooks import adopt as adopt_run
    from nla_utils.report.pages import write_reproduction

    click.echo(f"\n{folder.backbone}")
    places = {"executed": "executed notebooks", "results": "results (JSON)", "report": "tables and figures"}
    for name, label in (places | {"report/section11.md": "paper section"}).items():
        if folder.file(name).exists():
            click.echo(f"  {label:<20}{show(folder.file(name))}")
    reproduction = write_reproduction(folder.path)
    if reproduction is not None:
        click.echo(f"  {'comparison':<20}{show(folder.file('reproduction.md'))}\n\n{reproduction}")
    if adopt:
        adopt_run(folder)
        write_pages()


def write_pages() -> None:
    """Write the repository's own pages, tables and figures anew, and say where they are."""
    from nla_utils.report.pages import appendix_page, section_page

    click.echo("\nthe repository's own")
    for page in [section_page(), appendix_page(), *(page for pages in PAGES for page in pages())]:
        click.echo(f"  page                {show(page.write()[0])}")
    click.echo(f"  tables              {show(ROOT / 'paper' / 'tables')}")
    click.echo(f"  figures             {show(ROOT / 'figures')}")


@with_config("backbone", "seed")
@click.option("--backbone", multiple=True, **OPTIONS["backbone"] | {"default": ["gemma3-270m"]})
@click.option("--seeds", "--seed", default="1", help="Seeds of targets, training and rollouts, with commas.")
@click.option("--from", "first", type=int, default=1, help="First notebook to run.")
@click.option("--until", "last", type=int, default=6, help="Last notebook to run.")
@click.option("--with", "beside", help="What to run beside §11, with commas: tail-reader, depth.")
@click.option("--av", help="Evaluate this AV: released (the authors' own), hub:org/name[@commit] or a folder.")
@click.option("--targets", "released_targets", help="Use these: as --av, a file, or pool (vectors alone: no ceilings).")
@click.option("--corpus", type=FILE, help="Take targets from texts: a .jsonl with a field 'text', or a folder of .txt.")
@adopt_option
def reproduce(
    config: RunConfig, backbone: tuple[str, ...], seeds: str, first: int, last: int, beside: str, adopt: bool, **given
) -> None:
    """Run the notebooks 01-06 through papermill; what is finished and matches is skipped. Repeat --backbone for
    several; each seed is a run of its own."""
    from nla_utils.lm.weights import POOL, canonical_name
    from nla_utils.notebooks import STAGES
    from nla_utils.notebooks import reproduce as run_all

    named = [name.strip() for name in (beside or "").split(",") if name.strip()]
    for name in named:
        if name not in BESIDE:
            raise ConfigError(f"--with {name!r}: {nearest(name, BESIDE)}")
    # By the name of --with; those of §11 have none.
    known = [("", stage) for stage in STAGES] + [(name, stage()) for name, stage in BESIDE.items()]
    if not 1 <= first <= last <= len(known):
        raise ConfigError(f"--from {first} --until {last}: choose 1 to {len(known)}, from not after until")
    stages = [stage for name, stage in known if first <= stage.number <= last or name in named]
    if given["released_targets"] == POOL:
        # Vectors without texts have no ceilings, which the pages of 06 set every other row against.
        stages = [stage for stage in stages if stage.number < 6]
    for name in ("av", "released_targets"):
        given[name] = given[name] and canonical_name(given[name])
    given["corpus"] = given["corpus"] and show(given["corpus"].resolve())
    config = dataclasses.replace(config, **given)
    names = [canonical_name(name) for name in backbone]
    configs = [dataclasses.replace(config, backbone=n, seed=seed) for n in names for seed in parse_seeds(seeds)]
    run_all(configs, lambda folder: finish(folder, adopt), stages)


@with_config()
def distribute(config: RunConfig) -> None:
    """Make the artefacts of 01-04 in the processes that `accelerate launch -m nla_utils.cli distribute` has started.
    `nla reproduce` with the same options then runs the notebooks over them."""
    from nla_utils.baselines import make_ceilings
    from nla_utils.lm.weights import fetch, resolve
    from nla_utils.run import open_run
    from nla_utils.targets import make_targets
    from nla_utils.training import train_av
    from nla_utils.verbalizer import make_rollouts

    # Before the processes meet: whoever waits for a long download in a process group is taken for lost.
    fetch(resolve(config.backbone))
    join_processes(config.device)
    run = open_run(config)
    targets = make_targets(run)
    train_av(run, targets)
    make_ceilings(run, targets)
    make_rollouts(run, targets)
    if process_rank() == 0:
        click.echo(f"  artefacts           {run.folder.path}")


@app.command()
def report() -> None:
    """Regenerate paper/*.md with their tables and figures from the JSON on disk; loads no model."""
    write_pages()


@app.command()
@click.argument("folders", nargs=-1, required=True, type=FILE)
def spread(folders: tuple[Path, ...]) -> None:
    """Measure how much each row varies over seeds, which is how much a reproduction may differ; for maintainers.

    FOLDERS are run folders that differ in the seed, the committed run first."""
    from nla_utils.report.pages import SPREAD, write_spread
    from nla_utils.report.results import load_results

    runs = [load_results(folder) for folder in folders]
    if None in runs:
        raise ArtefactError(f"{folders[runs.index(None)]} has not all results of a run; run notebooks 01 to 05 there")
    click.echo(f"  spread over seeds   {show(write_spread(runs, SPREAD))}")


if __name__ == "__main__":
    app()
