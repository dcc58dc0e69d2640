"""What commands share: the app, its options, the one place where errors become messages, and how a run ends."""

from __future__ import annotations

import errno
import inspect
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Callable, Collection, Optional, get_type_hints

import typer
from typer.core import TyperGroup

from nla_utils import __version__
from nla_utils.artefacts import RunFolder
from nla_utils.config import PROFILES, ROOT, RunConfig, size_overrides
from nla_utils.errors import NLAError

SET_HELP = "Override a size: n_targets=, n_eval=, n_rollouts= or pool_size=."
SHARED = {
    "backbone": (Annotated[str, typer.Option(help="Registry name, hub id (org/name@commit) or folder.")], "gemma3-270m"),
    "profile": (Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")], "quick"),
    "out": (Annotated[Path, typer.Option(help="Folder for everything a run writes.")], ROOT / "runs"),
    "seed": (Annotated[int, typer.Option(help="Seed of targets, training and rollouts.")], 1),
    "layer": (Annotated[Optional[int], typer.Option(help="Extraction layer, if not the backbone's own.")], None),
    "device": (Annotated[str, typer.Option(help="auto, cpu, cuda, mps, or split: spread over all cards.")], "auto"),
    "dtype": (Annotated[str, typer.Option(help="Backbone dtype: bfloat16, float32 or float16.")], "bfloat16"),
    "set_": (Annotated[list[str], typer.Option("--set", help=SET_HELP)], []),
}  # fmt: skip
ADOPT_HELP = "Copy results and executed notebooks into the repository and rebuild the paper."
Adopt = Annotated[bool, typer.Option("--adopt", help=ADOPT_HELP)]
Layers = Annotated[str, typer.Option(help="all, or numbers with commas: 6,13")]
SEQUENCES_HELP = "A file of `nla sequences` to take the run's sequences from, instead of drawing them."
Sequences = Annotated[Optional[Path], typer.Option(help=SEQUENCES_HELP)]


class OneHandler(TyperGroup):
    """Prints what a user can mend in one line and ends with status 2; anything else is a bug, and keeps its traceback."""

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
            typer.secho(f"{error if error.args else 'stopped'}; the same command resumes", err=True)
            raise typer.Exit(130) from None
        typer.secho(f"error: {message}", fg="red", err=True)
        raise typer.Exit(2)


app = typer.Typer(
    cls=OneHandler, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Activations as text: §11 reproduced, audited, and what stands beside it."""
    # A batch system's end of a job is Ctrl-C: what was made is kept, and the same command resumes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Figures are drawn without a window, and without the user's own style.
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    # A terminal that cannot show a character shows another; it is no reason to stop.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")


def with_config(without: Collection[str] = (), **defaults: object) -> Callable:
    """Decorator: a command whose first parameter is the configuration made from the options that commands share.

    Args:
        without: shared options that the command does not have, or has in a form of its own.
        defaults: of shared options, where they are not the usual ones.
    """

    def register(command: Callable) -> Callable:
        shared = {name: option for name, option in SHARED.items() if name not in without}
        hints = get_type_hints(command, include_extras=True)
        _, *own = (p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values())

        def run(**values):
            given = {name: values.pop(name) for name in shared}
            return command(_config(**given), **values)

        parameters = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=defaults.get(name, default))
            for name, (kind, default) in shared.items()
        ] + [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        app.command(name=command.__name__, help=command.__doc__)(run)
        return command

    return register


def _config(out: Path, set_: list[str], backbone: str = RunConfig.backbone, **values: object) -> RunConfig:
    from nla_utils.lm.registry import settled

    return RunConfig(backbone=settled(backbone), out=where(out), **values, **size_overrides(set_))


def where(path: Path) -> str:
    """A path as a run's configuration holds it: from the repository's root where it lies inside."""
    return show(path.resolve())


def show(path: Path) -> str:
    """A path as it is printed: from the repository's root where it lies inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def finish(folder: RunFolder, adopt: bool) -> None:
    """Say where everything of a run is, compare it with the committed run, and adopt it if that was asked for."""
    from nla_utils.paper.reproduction import write_reproduction
    from nla_utils.runner.notebooks import adopt as adopt_run

    typer.echo(f"\n{folder.backbone}")
    places = (("executed notebooks", "executed"), ("results (JSON)", "results"), ("tables and figures", "report"),
              ("paper section", "report/section11.md"))  # fmt: skip
    for label, name in places:
        if folder.file(name).exists():
            typer.echo(f"  {label:<20}{show(folder.file(name))}")
    reproduction = write_reproduction(folder.path)
    if reproduction is not None:
        typer.echo(f"  {'comparison':<20}{show(folder.file('reproduction.md'))}\n\n{reproduction}")
    if adopt:
        adopt_run(folder)
        write_pages()


def write_pages() -> None:
    """Write the repository's own pages, tables and figures anew, and say where they are."""
    from nla_utils.extensions.comparison.page import comparison_page
    from nla_utils.extensions.depth.page import depth_page
    from nla_utils.extensions.tail_reader.page import reader_page
    from nla_utils.paper.appendix import appendix_page
    from nla_utils.paper.section import section_page

    typer.echo("\nthe repository's own")
    for page in (section_page(), appendix_page(), reader_page(), depth_page(), comparison_page()):
        typer.echo(f"  page                {show(page.write()[0])}")
    typer.echo(f"  tables              {show(ROOT / 'paper' / 'tables')}")
    typer.echo(f"  figures             {show(ROOT / 'figures')}")
