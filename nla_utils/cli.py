"""The ``nla`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nla_utils import cli_reader, cli_verbalize
from nla_utils.cli_options import Backbone, Device, Dtype, Out, ProfileName, Seed, Sequences, Sizes
from nla_utils.config import ROOT, ConfigError, RunConfig, parse_seeds, size_overrides

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)

app.command()(cli_verbalize.verbalize)
app.command()(cli_verbalize.bundle)
app.command()(cli_verbalize.publish)
app.command()(cli_reader.ablate)
app.command()(cli_reader.replicate)

BACKBONE_HELP = "Registry name, hub id (org/name@commit) or folder; repeat for several."
AV_HELP = "A released AV to evaluate instead of training one: hub:org/name[@commit] or a folder."
TARGETS_HELP = "Released targets instead of drawing them: hub:org/name[@commit] or a folder."
SEEDS_HELP = "Seeds of targets, training and rollouts, with commas; each is a run of its own."
ADOPT_HELP = "Copy results and executed notebooks into the repository and rebuild the paper."


def _where(out: Path) -> str:
    """``out`` as a run's configuration holds it: from the repository's root where it lies inside."""
    out = out.resolve()
    return str(out.relative_to(ROOT)) if out.is_relative_to(ROOT) else str(out)


def _show(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


@app.command()
def reproduce(
    backbone: Annotated[list[str], typer.Option(help=BACKBONE_HELP)] = ["gemma3-270m"],
    profile: ProfileName = "quick",
    first: Annotated[int, typer.Option("--from", help="First notebook to run.")] = 1,
    last: Annotated[int, typer.Option("--until", help="Last notebook to run.")] = 6,
    out: Out = ROOT / "runs",
    seeds: Annotated[str, typer.Option("--seeds", "--seed", help=SEEDS_HELP)] = "1",
    layer: Annotated[Optional[int], typer.Option(help="Extraction layer, if not the backbone's own.")] = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    target_span: Annotated[str, typer.Option(help="What the AV is trained to write: full, or last:n.")] = "full",
    av: Annotated[Optional[str], typer.Option(help=AV_HELP)] = None,
    targets: Annotated[Optional[str], typer.Option(help=TARGETS_HELP)] = None,
    set_: Sizes = [],
    adopt: Annotated[bool, typer.Option("--adopt", help=ADOPT_HELP)] = False,
) -> None:
    """Run the notebooks 01-06 through papermill; what is whole and matches is skipped."""
    from nla_utils.backbone import BackboneError
    from nla_utils.reproduce import NotebookFailed
    from nla_utils.reproduce import reproduce as run_all
    from nla_utils.sources import SourceError, settled
    from nla_utils.store import ArtefactError

    where = _where(out)
    try:
        configs = [
            RunConfig.from_mapping(
                {"backbone": b, "profile": profile, "seed": seed, "out": where, "layer": layer, "device": device,
                 "dtype": dtype, "target_span": target_span, "av": av, "released_targets": targets,
                 **size_overrides(set_)}
            )
            for b in map(settled, backbone)
            for seed in parse_seeds(seeds)
        ]  # fmt: skip
        run_all(configs, lambda folder: _finish(folder, adopt), first, last)
    except (ConfigError, SourceError, ArtefactError, BackboneError, NotebookFailed, ValueError) as error:
        cli_verbalize.fail(error)


def _finish(folder, adopt: bool) -> None:
    """Say where everything of a run is, and adopt it if that was asked for."""
    from nla_utils.reproduce import adopt as adopt_run

    typer.echo(f"\n{folder.backbone}")
    if folder.file("executed").exists():
        typer.echo(f"  executed notebooks  {_show(folder.file('executed'))}")
    if folder.file("results").exists():
        typer.echo(f"  results (JSON)      {_show(folder.file('results'))}")
    if folder.file("report").exists():
        typer.echo(f"  tables and figures  {_show(folder.file('report'))}")
        typer.echo(f"  paper section       {_show(folder.file('report/section11.md'))}")
    if adopt:
        adopt_run(folder)
        paper()


LAYERS = Annotated[str, typer.Option(help="all, or numbers with commas: 6,13")]


@app.command()
def sweep(
    layers: LAYERS = "all",
    backbone: Backbone = "gemma3-270m",
    profile: ProfileName = "quick",
    out: Out = ROOT / "runs",
    seed: Seed = 1,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    set_: Sizes = [],
    sequences: Sequences = None,
    adopt: Annotated[bool, typer.Option("--adopt", help=ADOPT_HELP)] = False,
) -> None:
    """Run the notebooks at several layers, all from the same sequences, whose activations are taken in one pass."""
    from nla_utils.backbone import BackboneError
    from nla_utils.layers import config_at, extract_layers
    from nla_utils.reproduce import NotebookFailed
    from nla_utils.reproduce import reproduce as run_all
    from nla_utils.sources import SourceError
    from nla_utils.store import ArtefactError

    try:
        run, chosen = _open_at(layers, backbone, profile, out, seed, device, dtype, set_)
        config, opened = run.config, run.backbone
        extract_layers(config, opened, chosen, sequences)
        configs = [config_at(config, opened.layer, x) for x in chosen]
        # The notebooks load the backbone themselves: it need not be held twice.
        del run, opened
        run_all(configs, lambda folder: _finish(folder, adopt))
    except (ConfigError, SourceError, ArtefactError, BackboneError, NotebookFailed) as error:
        cli_verbalize.fail(error)


@app.command()
def depth(
    layers: LAYERS = "all",
    backbone: Backbone = "gemma3-270m",
    profile: ProfileName = "quick",
    out: Out = ROOT / "runs",
    seed: Seed = 1,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    set_: Sizes = [],
    sequences: Sequences = None,
    adopt: Annotated[bool, typer.Option("--adopt", help=ADOPT_HELP)] = False,
) -> None:
    """Measure what text can reach at each layer, the tail reader's among it: nothing is trained."""
    from nla_utils.backbone import BackboneError
    from nla_utils.depth import reach_of_text
    from nla_utils.results import DEPTH, write_results
    from nla_utils.sources import SourceError
    from nla_utils.store import ArtefactError

    try:
        run, chosen = _open_at(layers, backbone, profile, out, seed, device, dtype, set_)
        record, made_from = reach_of_text(run.config, run.backbone, chosen, sequences)
    except (ConfigError, SourceError, ArtefactError, BackboneError) as error:
        cli_verbalize.fail(error)
    write_results(run.folder, run.config, DEPTH, record, made_from)
    _finish(run.folder, adopt)


@app.command()
def sequences(
    backbone: Backbone = "gemma3-270m",
    profile: ProfileName = "quick",
    out: Out = ROOT / "runs",
    seed: Seed = 1,
    layer: Annotated[Optional[int], typer.Option(help="Of a run at another layer than the backbone's own.")] = None,
    device: Device = "auto",
    dtype: Dtype = "bfloat16",
    set_: Sizes = [],
    to: Annotated[Optional[Path], typer.Option(help="File to write, if not the repository's own.")] = None,
) -> None:
    """Keep a run's sequences in one small file, for `sweep` and `depth` on another machine to go on from."""
    from nla_utils.run import open_folder
    from nla_utils.sequences import committed_sequences, write_sequences
    from nla_utils.sources import SourceError, settled
    from nla_utils.store import ArtefactError
    from nla_utils.targets import load_targets

    try:
        config = RunConfig(backbone=settled(backbone), profile=profile, seed=seed, out=_where(out), layer=layer,
                           device=device, dtype=dtype, **size_overrides(set_))  # fmt: skip
        folder = open_folder(config)
        path = committed_sequences(config, folder.backbone) if to is None else to
        write_sequences(path, config, folder, load_targets(config, folder))
    except (ConfigError, SourceError, ArtefactError) as error:
        cli_verbalize.fail(error)
    typer.echo(f"  {_show(path)}  {path.stat().st_size / 1e6:.1f} MB")


def _open_at(layers, backbone, profile, out, seed, device, dtype, set_):
    """The opened run of these options, at the backbone's own layer, and the layers that were named."""
    from nla_utils.layers import parse_layers
    from nla_utils.run import open_run
    from nla_utils.sources import settled

    config = RunConfig(backbone=settled(backbone), profile=profile, seed=seed, out=_where(out), device=device,
                       dtype=dtype, **size_overrides(set_))  # fmt: skip
    run = open_run(config)
    return run, parse_layers(layers, run.backbone.n_layers)


@app.command()
def paper() -> None:
    """Regenerate tables, figures and paper/section11.md from the JSON on disk; loads no model."""
    from nla_utils.paper import build_paper

    section, *_ = build_paper()
    typer.echo("\nthe repository's own")
    typer.echo(f"  paper section       {_show(section)}")
    typer.echo(f"  tables              {_show(section.parent / 'tables')}")
    typer.echo(f"  figures             {_show(ROOT / 'figures')}")


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="Folder of the site.")] = ROOT / "site",
) -> None:
    """Render section 11 and the executed notebooks as one static HTML site; needs no network to make or to view."""
    from nla_utils.report import build_report
    from nla_utils.store import ArtefactError

    try:
        pages = build_report(out.resolve())
    except ArtefactError as error:
        cli_verbalize.fail(error)
    typer.echo(f"  {_show(pages[0])} and {len(pages) - 1} notebooks")
