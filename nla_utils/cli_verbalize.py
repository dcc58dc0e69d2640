"""``nla verbalize``, ``nla bundle``, ``nla publish``: reading one activation, packing and releasing verbalizers."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import numpy as np
import typer

from nla_utils.config import ROOT, ConfigError, RunConfig, size_overrides

SET_HELP = "Override a size: n_targets=, n_eval=, n_rollouts= or pool_size=."


def fail(error: Exception) -> None:
    """Say what was wrong and leave with status 2."""
    typer.secho(f"error: {error}", fg="red", err=True)
    raise typer.Exit(2)


def read_vector(path: Path) -> np.ndarray:
    """The one vector in a ``.npy`` or ``.safetensors`` file; raises ``ConfigError`` that says what is wrong."""
    if not path.exists():
        raise ConfigError(f"{path} does not exist")
    if path.suffix == ".npy":
        # numpy refuses object arrays unless told otherwise.
        return np.load(path).squeeze()
    if path.suffix == ".safetensors":
        from safetensors.numpy import load_file

        tensors = load_file(path)
        if len(tensors) != 1:
            raise ConfigError(f"{path} holds {sorted(tensors)}; exactly one tensor is read")
        return next(iter(tensors.values())).squeeze()
    raise ConfigError(f"{path}: a vector is read from .npy or .safetensors, not {path.suffix or 'a bare name'}")


def verbalize(
    text: Annotated[Optional[str], typer.Option(help="Take the activation of this text.")] = None,
    vector: Annotated[Optional[Path], typer.Option(help="Or read it from a .npy or .safetensors file.")] = None,
    token: Annotated[int, typer.Option(help="Which token of the text; negative counts from the end.")] = -1,
    backbone: Annotated[str, typer.Option(help="Registry name, hub id or folder.")] = "gemma3-270m",
    run: Annotated[Optional[Path], typer.Option(help="A finished run folder, if not the shipped verbalizers.")] = None,
    method: Annotated[str, typer.Option(help="reader, guided or av.")] = "reader",
    k: Annotated[int, typer.Option(help="How many texts to choose from.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put one activation into words: the best of k texts, its score, and what chance and retrieval give."""
    from nla_utils.api import NLA
    from nla_utils.backbone import BackboneError
    from nla_utils.sources import SourceError
    from nla_utils.store import ArtefactError

    try:
        if (text is None) == (vector is None):
            raise ConfigError("give either --text or --vector")
        given = None if vector is None else read_vector(vector)
        # What loading says is not part of the answer.
        with contextlib.redirect_stdout(sys.stderr):
            nla = NLA.load(backbone, run)
        v = nla.activation(text, token) if given is None else given
        found = nla.verbalize(v, k, method, seed)
    except (ConfigError, SourceError, ArtefactError, BackboneError, ValueError) as error:
        fail(error)
    if json_:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False))
        return
    typer.echo(f"{found.text!r}")
    typer.echo(
        f"  centred score {found.score:.3f}, best of {k} by {found.method}; the best of {k} unrelated texts "
        f"scores less in {found.percentile:.1%}"
    )
    typer.echo(f"  greedy        {found.greedy_score:.3f}  {found.greedy!r}")
    typer.echo(f"  retrieved     {found.retrieved_score:.3f}  {found.retrieved!r}")


def bundle(
    backbone: Annotated[str, typer.Option(help="Registry name, hub id or folder.")] = "gemma3-270m",
    profile: Annotated[str, typer.Option(help="Profile of the run to pack.")] = "laptop",
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = ROOT / "runs",
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],
) -> None:
    """Pack a run's verbalizers into bundles/<backbone>, from where `nla verbalize` takes them."""
    from nla_utils.backbone import BackboneError
    from nla_utils.bundle import BUNDLES, write_bundle
    from nla_utils.run import open_run
    from nla_utils.sources import SourceError
    from nla_utils.store import ArtefactError

    try:
        config = RunConfig(backbone=backbone, profile=profile, out=str(out.resolve()), **size_overrides(set_))
        opened = open_run(config)
        written = write_bundle(config, opened.backbone, opened.folder, BUNDLES / opened.backbone.name)
    except (ConfigError, SourceError, ArtefactError, BackboneError) as error:
        fail(error)
    for path in written:
        typer.echo(f"  {path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")


def publish(
    backbone: Annotated[str, typer.Option(help="Registry name, hub id or folder.")] = "gemma3-270m",
    profile: Annotated[str, typer.Option(help="Profile of the run to release.")] = "laptop",
    runs: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = ROOT / "runs",
    to: Annotated[Optional[str], typer.Option(help="Push to org/name and org/name-targets.")] = None,
    set_: Annotated[list[str], typer.Option("--set", help=SET_HELP)] = [],
    dry_run: Annotated[bool, typer.Option("--dry-run/--push", help="Only write the folders, or push them.")] = True,
) -> None:
    """Write a release of a finished run: AV in both formats, evaluation, targets as Parquet and safetensors, cards."""
    from transformers import AutoTokenizer

    from nla_utils.publish import make_release, push
    from nla_utils.run import open_folder
    from nla_utils.sources import SourceError, fetch, resolve
    from nla_utils.store import ArtefactError
    from nla_utils.targets import load_targets

    try:
        if not dry_run and to is None:
            raise ConfigError("--push needs --to org/name")
        config = RunConfig(backbone=backbone, profile=profile, out=str(runs.resolve()), **size_overrides(set_))
        folder = open_folder(config)
        targets = load_targets(config, folder)
        tokenizer = AutoTokenizer.from_pretrained(fetch(resolve(backbone)))
        texts = [tokenizer.decode(targets.sequence(i), skip_special_tokens=True) for i in range(len(targets.v))]
        release = make_release(folder, texts, folder.file("release"))
    except (ConfigError, SourceError, ArtefactError) as error:
        fail(error)
    for part in (release.model, release.dataset):
        for path in release.files(part):
            typer.echo(f"  {path.relative_to(release.model.parent)}  {path.stat().st_size:,} bytes")
    if dry_run:
        typer.echo(f"dry run: nothing was pushed; look at {release.model.parent}, then add --push --to org/name")
        return
    for line in push(release, to, f"{to}-targets"):
        typer.echo(f"  pushed {line}")
