"""The ``nla`` command whole: that of §11, with the commands, notebooks and pages of what stands beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Optional

import click

from nla_utils.cli import BESIDE, PAGES, adopt_option, app, finish, show, with_config
from nla_utils.config import RunConfig, parse_seeds
from nla_utils.errors import ConfigError, nearest

FILE = click.Path(path_type=Path)
layers_option = click.option("--layers", default="all", show_default=True, help="all, or numbers with commas: 6,13")
sequences_option = click.option(
    "--sequences",
    type=FILE,
    help="A file of `nla sequences` to take the run's sequences from, instead of drawing them.",
)
backbone_option = click.option(
    "--backbone", default="gemma3-270m", show_default=True, help="Registry name, hub id or folder."
)
run_option = click.option("--run", type=FILE, help="A finished run folder, if not the shipped verbalizers.")


def _tail_reader():
    from nla_extensions.tail_reader import reader, rollouts
    from nla_utils.notebooks import Stage

    return Stage("extensions/07_tail_reader", (reader.ARTEFACT, rollouts.ARTEFACT), "tail_reader", (1, 3, 4))


def _depth():
    from nla_extensions.depth.tables import RESULTS
    from nla_utils.notebooks import Stage

    return Stage("extensions/08_depth", (), RESULTS)


def _pages():
    from nla_extensions.comparison.page import comparison_page
    from nla_extensions.depth.page import depth_page
    from nla_extensions.tail_reader.page import reader_page

    return reader_page(), depth_page(), comparison_page()


BESIDE |= {"tail-reader": _tail_reader, "depth": _depth}
PAGES.append(_pages)


@with_config("layer")
@layers_option
@sequences_option
@adopt_option
def sweep(config: RunConfig, layers: str, sequences: Optional[Path], adopt: bool) -> None:
    """Run the notebooks at several layers, all from the same sequences, whose activations are taken in one pass."""
    from nla_extensions.depth.layers import extract_layers, parse_layers
    from nla_utils.notebooks import reproduce
    from nla_utils.run import open_run

    run = open_run(config)
    chosen = parse_layers(layers, run.backbone.n_layers)
    extract_layers(run, chosen, sequences)
    configs = [run.at(layer).config for layer in chosen]
    # The notebooks load the backbone themselves: it need not be held twice.
    del run
    reproduce(configs, lambda folder: finish(folder, adopt))


@with_config("layer")
@layers_option
@sequences_option
@adopt_option
def depth(config: RunConfig, layers: str, sequences: Optional[Path], adopt: bool) -> None:
    """Measure what text can reach at each layer, the tail reader's among it: nothing is trained."""
    from nla_extensions.depth.layers import parse_layers
    from nla_extensions.depth.measure import reach_of_text
    from nla_extensions.depth.tables import RESULTS
    from nla_utils.run import open_run

    run = open_run(config)
    record, made_from = reach_of_text(run, parse_layers(layers, run.backbone.n_layers), sequences)
    run.write_results(RESULTS, record, made_from)
    finish(run.folder, adopt)


@with_config()
@click.option("--to", type=FILE, help="File to write, if not the repository's own.")
def sequences(config: RunConfig, to: Optional[Path]) -> None:
    """Keep a run's sequences in one small file, for `sweep` and `depth` on another machine to go on from."""
    from nla_extensions.depth.layers import committed_sequences, write_sequences
    from nla_utils.run import open_run
    from nla_utils.targets import load_targets

    run = open_run(config, weights=False)
    path = committed_sequences(run) if to is None else to
    write_sequences(path, run, load_targets(run))
    click.echo(f"  {show(path)}  {path.stat().st_size / 1e6:.1f} MB")


@with_config("seed")
@click.option(
    "--seeds", default="1", help="Seed of the run; more of them add their training targets to the growth with N."
)
def ablate(config: RunConfig, seeds: str) -> None:
    """Take the tail reader of a run apart: one change at a time, and its growth with N. Needs notebook 07."""
    from nla_extensions.tail_reader.ablation import ablate_reader
    from nla_extensions.tail_reader.seeds import training_targets, with_seed
    from nla_extensions.tail_reader.tables import ABLATION_RESULTS
    from nla_utils.run import open_run
    from nla_utils.targets import load_targets

    first, *others = parse_seeds(seeds)
    run = open_run(dataclasses.replace(config, seed=first))
    targets = load_targets(run)
    made_from = {"targets": targets.sha256, "reader": run.folder.load("reader").sha256}
    more = [training_targets(with_seed(run, seed)) for seed in others]
    made_from |= {f"targets of seed {seed}": own.sha256 for seed, (own, _) in zip(others, more)}
    path = run.write_results(ABLATION_RESULTS, ablate_reader(run, targets, more), made_from)
    click.echo(f"  reader ablation     {show(path)}")


@with_config("seed")
@click.option("--seeds", default="1,2,3", show_default=True, help="The first is that of the run that keeps the result.")
def replicate(config: RunConfig, seeds: str) -> None:
    """Repeat the tail reader's claims on targets drawn anew for each seed; trains no AV."""
    from nla_extensions.tail_reader.seeds import replicate as repeat
    from nla_extensions.tail_reader.tables import SEEDS_RESULTS
    from nla_utils.run import open_run

    chosen = parse_seeds(seeds)
    if len(chosen) < 2:
        raise ConfigError(f"--seeds {seeds}: a spread needs at least two seeds, for example 1,2,3")
    run = open_run(dataclasses.replace(config, seed=chosen[0]))
    click.echo(f"  reader over seeds   {show(run.write_results(SEEDS_RESULTS, *repeat(run, chosen)))}")


@with_config()
@click.option("--parts", help="Which tables, with commas; all if not given.")
def study(config: RunConfig, parts: Optional[str]) -> None:
    """Train the AV in other ways, one factor at a time, and measure what it takes from v. Needs notebook 02."""
    from nla_extensions.training_study import study as of
    from nla_utils.report.claims import STUDY
    from nla_utils.run import open_run
    from nla_utils.targets import load_targets

    run = open_run(config)
    targets = load_targets(run)
    planned = of.study_of(run, targets)
    known = list(dict.fromkeys(v.part for v in planned))
    wanted = known if parts is None else [p.strip() for p in parts.split(",")]
    for part in wanted:
        if part not in known:
            raise ConfigError(f"--parts {part!r}: {nearest(part, known)}")
    records = of.study(run, targets, [v for v in planned if v.part in wanted])
    made_from = {"targets": targets.sha256, "best_av": run.folder.sha256_of("best_av")}
    path = run.write_results(STUDY, {"variants": [*records, of.run_itself(run, targets)]}, made_from)
    click.echo(f"  training study      {show(path)}")


@with_config()
@click.option("--n", type=int, default=256, show_default=True, help="How many training targets it writes for.")
@click.option("--k", type=int, default=16, show_default=True, help="How many rollouts the best is chosen from.")
@click.option("--rounds", type=int, default=2, show_default=True, help="Rounds of expert iteration.")
@click.option("--av", help="The released AV that the run has, if it trained none.")
def iterate(config: RunConfig, n: int, k: int, rounds: int, av: Optional[str]) -> None:
    """Train a run's AV on the best of its own texts, and on the guided search's. Needs notebook 02."""
    from nla_extensions.training_study.iteration import iterate as of
    from nla_utils.report.claims import ITERATION
    from nla_utils.run import open_run
    from nla_utils.targets import load_targets

    run = open_run(dataclasses.replace(config, av=av))
    targets = load_targets(run)
    made_from = {"targets": targets.sha256, "best_av": run.folder.sha256_of("best_av")}
    path = run.write_results(ITERATION, {"k": k, "rounds": of(run, targets, n, k, rounds)}, made_from)
    click.echo(f"  expert iteration    {show(path)}")


@app.command()
@click.option("--text", help="Take the activation of this text.")
@click.option("--vector", type=FILE, help="Or read it from a .npy, .safetensors or .pt file.")
@click.option("--token", type=int, default=-1, help="Which token of the text; negative counts from the end.")
@backbone_option
@run_option
@click.option("--method", default="reader", show_default=True, help="reader, guided, av, lens or patchscope.")
@click.option("--k", type=int, default=64, show_default=True, help="How many texts to choose from.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the draws.")
@click.option(
    "--fluency",
    type=float,
    help="What every nat a token that the text's words cost takes off its score; guided has 0.02 if not given.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verbalize(
    text: Optional[str],
    vector: Optional[Path],
    token: int,
    backbone: str,
    run: Optional[Path],
    method: str,
    k: int,
    seed: int,
    fluency: Optional[float],
    as_json: bool,
) -> None:
    """Put one activation into words: the best of k texts, its score, and what chance and retrieval give."""
    from nla_extensions.release.api import NLA, read_vector

    if (text is None) == (vector is None):
        raise ConfigError("give either --text or --vector")
    given = None if vector is None else read_vector(vector)
    # What loading says is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        nla = NLA.load(backbone, run)
    found = nla.verbalize(nla.activation(text, token) if given is None else given, k, method, seed, fluency)
    click.echo(json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False) if as_json else str(found))


@app.command()
@click.option("--text", required=True, help="The text to look at.")
@click.option("--to", type=FILE, default=Path("explore.html"), show_default=True, help="The page to write.")
@backbone_option
@run_option
@layers_option
@click.option("--k", type=int, default=8, show_default=True, help="How many readings of each activation.")
def explore(text: str, to: Path, backbone: str, run: Optional[Path], layers: str, k: int) -> None:
    """Write one HTML page that shows what every token's activation reads as at every layer."""
    from nla_extensions.depth.layers import parse_layers
    from nla_extensions.release.api import NLA
    from nla_extensions.release.explore import explore as look
    from nla_extensions.release.explore import write_page

    nla = NLA.load(backbone, run)
    chosen = parse_layers(layers, nla.backbone.n_layers)
    click.echo(f"  page  {show(write_page(look(nla, text, chosen, k), to.resolve()))}")


@app.command()
@backbone_option
@run_option
@click.option("--n", type=int, default=64, show_default=True, help="How many sources, each with a twin.")
@click.option(
    "--k", type=int, default=16, show_default=True, help="Budget of each way of reading: so many rollouts of the AV."
)
@click.option(
    "--directions",
    type=int,
    default=16,
    show_default=True,
    help="How many vectors of each kind that are no activation of a text.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="Seed of the sources and the draws.")
@click.option("--to", type=FILE, default=Path("comparison.json"), show_default=True, help="The results file to write.")
def compare(backbone: str, run: Optional[Path], n: int, k: int, directions: int, seed: int, to: Path) -> None:
    """Compare the ways of reading on new sources: score, fluency, and what they hold beyond the last words."""
    from nla_extensions.comparison.measure import compare as measure
    from nla_extensions.release.api import NLA
    from nla_utils.report.claims import COMPARISON as RESULTS
    from nla_utils.store import code_version, library_versions, write_record

    nla, to = NLA.load(backbone, run), to.resolve()
    unfinished = to.with_suffix(".partial.json")
    record = {
        "name": RESULTS,
        "identity": nla.backbone.identity(),
        "made_from": nla.bundle.made_from,
        "code": code_version(),
        "libraries": library_versions(),
        **measure(nla, n, k, directions, seed, unfinished),
    }
    write_record(to, record)
    unfinished.unlink()
    for row in record["rows"]:
        click.echo(f"  {row['method']:<24} {row['best_cen']:.3f}  {row['best_nats']:.2f} nats a token")
    click.echo(f"  {show(to)}")


@with_config()
def bundle(config: RunConfig) -> None:
    """Pack a run's verbalizers into bundles/<backbone>, from where `nla verbalize` takes them."""
    from nla_extensions.release.bundle import BUNDLES, write_bundle
    from nla_utils.run import open_run

    run = open_run(config)
    for path in write_bundle(run, BUNDLES / run.backbone.name):
        click.echo(f"  {show(path)}  {path.stat().st_size / 1e6:.1f} MB")


@with_config()
@click.option("--to", help="Push to org/name and org/name-targets.")
@click.option("--dry-run/--push", default=True, help="Only write the folders, or push them.")
def publish(config: RunConfig, to: Optional[str], dry_run: bool) -> None:
    """Write a release of a finished run: AV in both formats, evaluation, targets as Parquet and safetensors, cards."""
    from transformers import AutoTokenizer

    from nla_extensions.release.publish import make_release, push
    from nla_utils.lm.weights import fetch, resolve
    from nla_utils.run import open_run
    from nla_utils.targets import load_targets

    if not dry_run and to is None:
        raise ConfigError("--push needs --to org/name")
    run = open_run(config, weights=False)
    targets = load_targets(run)
    tokenizer = AutoTokenizer.from_pretrained(fetch(resolve(config.backbone)))
    texts = [tokenizer.decode(targets.sequence(i), skip_special_tokens=True) for i in range(len(targets.v))]
    release = make_release(run.folder, texts, run.folder.file("release"))
    for part in (release.model, release.dataset):
        for path in release.files(part):
            click.echo(f"  {path.relative_to(release.model.parent)}  {path.stat().st_size:,} bytes")
    if dry_run:
        click.echo(f"dry run: nothing was pushed; look at {release.model.parent}, then add --push --to org/name")
        return
    for line in push(release, to, f"{to}-targets"):
        click.echo(f"  pushed {line}")


if __name__ == "__main__":
    app()
