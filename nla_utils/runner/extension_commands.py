"""Commands of what stands beside §11: reading one activation, depth, the tail reader taken apart, releases."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from nla_utils.config import RunConfig, parse_seeds
from nla_utils.errors import ConfigError, nearest
from nla_utils.runner.options import Adopt, Layers, Sequences, app, finish, show, with_config


@with_config(without=("layer",))
def sweep(config: RunConfig, layers: Layers = "all", sequences: Sequences = None, adopt: Adopt = False) -> None:
    """Run the notebooks at several layers, all from the same sequences, whose activations are taken in one pass."""
    from nla_utils.extensions.depth.layers import extract_layers, parse_layers
    from nla_utils.run import open_run
    from nla_utils.runner.notebooks import reproduce, select_stages

    run = open_run(config)
    chosen = parse_layers(layers, run.backbone.n_layers)
    extract_layers(run, chosen, sequences)
    configs = [run.at(layer).config for layer in chosen]
    # The notebooks load the backbone themselves: it need not be held twice.
    del run
    reproduce(configs, lambda folder: finish(folder, adopt), select_stages(1, 6))


@with_config(without=("layer",))
def depth(config: RunConfig, layers: Layers = "all", sequences: Sequences = None, adopt: Adopt = False) -> None:
    """Measure what text can reach at each layer, the tail reader's among it: nothing is trained."""
    from nla_utils.extensions.depth.layers import parse_layers
    from nla_utils.extensions.depth.measure import reach_of_text
    from nla_utils.extensions.depth.tables import RESULTS
    from nla_utils.run import open_run

    run = open_run(config)
    record, made_from = reach_of_text(run, parse_layers(layers, run.backbone.n_layers), sequences)
    run.write_results(RESULTS, record, made_from)
    finish(run.folder, adopt)


@with_config()
def sequences(
    config: RunConfig,
    to: Annotated[Optional[Path], typer.Option(help="File to write, if not the repository's own.")] = None,
) -> None:
    """Keep a run's sequences in one small file, for `sweep` and `depth` on another machine to go on from."""
    from nla_utils.extensions.depth.layers import committed_sequences, write_sequences
    from nla_utils.run import open_run
    from nla_utils.stages.targets import load_targets

    run = open_run(config, weights=False)
    path = committed_sequences(run) if to is None else to
    write_sequences(path, run, load_targets(run))
    typer.echo(f"  {show(path)}  {path.stat().st_size / 1e6:.1f} MB")


ABLATE_SEEDS_HELP = "Seed of the run; more of them add their training targets to the growth with N."


@with_config(without=("seed",))
def ablate(config: RunConfig, seeds: Annotated[str, typer.Option(help=ABLATE_SEEDS_HELP)] = "1") -> None:
    """Take the tail reader of a run apart: one change at a time, and its growth with N. Needs notebook 07."""
    from nla_utils.extensions.tail_reader.ablation import ablate_reader
    from nla_utils.extensions.tail_reader.seeds import training_targets, with_seed
    from nla_utils.extensions.tail_reader.tables import ABLATION_RESULTS
    from nla_utils.run import open_run
    from nla_utils.stages.targets import load_targets

    first, *others = parse_seeds(seeds)
    run = open_run(dataclasses.replace(config, seed=first))
    targets = load_targets(run)
    made_from = {"targets": targets.sha256, "reader": run.folder.load("reader").sha256}
    more = [training_targets(with_seed(run, seed)) for seed in others]
    made_from |= {f"targets of seed {seed}": own.sha256 for seed, (own, _) in zip(others, more)}
    path = run.write_results(ABLATION_RESULTS, ablate_reader(run, targets, more), made_from)
    typer.echo(f"  reader ablation     {show(path)}")


@with_config(without=("seed",))
def replicate(
    config: RunConfig,
    seeds: Annotated[str, typer.Option(help="Seeds, the first that of the run that keeps the result.")] = "1,2,3",
) -> None:
    """Repeat the tail reader's claims on targets drawn anew for each seed; trains no AV."""
    from nla_utils.extensions.tail_reader.seeds import replicate as repeat
    from nla_utils.extensions.tail_reader.tables import SEEDS_RESULTS
    from nla_utils.run import open_run

    chosen = parse_seeds(seeds)
    if len(chosen) < 2:
        raise ConfigError(f"--seeds {seeds}: a spread needs at least two seeds, for example 1,2,3")
    run = open_run(dataclasses.replace(config, seed=chosen[0]))
    typer.echo(f"  reader over seeds   {show(run.write_results(SEEDS_RESULTS, *repeat(run, chosen)))}")


@with_config()
def study(
    config: RunConfig,
    parts: Annotated[Optional[str], typer.Option(help="Which tables, with commas; all if not given.")] = None,
) -> None:
    """Train the AV in other ways, one factor at a time, and measure what it takes from v. Needs notebook 02."""
    from nla_utils.extensions.training_study import study as of
    from nla_utils.paper.findings import STUDY
    from nla_utils.run import open_run
    from nla_utils.stages.targets import load_targets

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
    typer.echo(f"  training study      {show(path)}")


@with_config()
def iterate(
    config: RunConfig,
    n: Annotated[int, typer.Option(help="How many training targets it writes for.")] = 256,
    k: Annotated[int, typer.Option(help="How many rollouts the best is chosen from.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds of expert iteration.")] = 2,
    av: Annotated[Optional[str], typer.Option(help="The released AV that the run has, if it trained none.")] = None,
) -> None:
    """Train a run's AV on the best of its own texts, and on the guided search's. Needs notebook 02."""
    from nla_utils.extensions.training_study.iteration import iterate as of
    from nla_utils.paper.findings import ITERATION
    from nla_utils.run import open_run
    from nla_utils.stages.targets import load_targets

    run = open_run(dataclasses.replace(config, av=av))
    targets = load_targets(run)
    made_from = {"targets": targets.sha256, "best_av": run.folder.sha256_of("best_av")}
    path = run.write_results(ITERATION, {"k": k, "rounds": of(run, targets, n, k, rounds)}, made_from)
    typer.echo(f"  expert iteration    {show(path)}")


FLUENCY_HELP = "What every nat a token that the text's words cost takes off its score; guided has 0.02 if not given."


@app.command()
def verbalize(
    text: Annotated[Optional[str], typer.Option(help="Take the activation of this text.")] = None,
    vector: Annotated[Optional[Path], typer.Option(help="Or read it from a .npy, .safetensors or .pt file.")] = None,
    token: Annotated[int, typer.Option(help="Which token of the text; negative counts from the end.")] = -1,
    backbone: Annotated[str, typer.Option(help="Registry name, hub id or folder.")] = "gemma3-270m",
    run: Annotated[Optional[Path], typer.Option(help="A finished run folder, if not the shipped verbalizers.")] = None,
    method: Annotated[str, typer.Option(help="reader, guided, av, lens or patchscope.")] = "reader",
    k: Annotated[int, typer.Option(help="How many texts to choose from.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    fluency: Annotated[Optional[float], typer.Option(help=FLUENCY_HELP)] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Put one activation into words: the best of k texts, its score, and what chance and retrieval give."""
    from nla_utils.extensions.release.api import NLA, read_vector

    if (text is None) == (vector is None):
        raise ConfigError("give either --text or --vector")
    given = None if vector is None else read_vector(vector)
    # What loading says is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        nla = NLA.load(backbone, run)
    found = nla.verbalize(nla.activation(text, token) if given is None else given, k, method, seed, fluency)
    if json_:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False, allow_nan=False))
        return
    typer.echo(str(found))


@app.command()
def explore(
    text: Annotated[str, typer.Option(help="The text to look at.")],
    to: Annotated[Path, typer.Option(help="The page to write.")] = Path("explore.html"),
    backbone: Annotated[str, typer.Option(help="Registry name, hub id or folder.")] = "gemma3-270m",
    run: Annotated[Optional[Path], typer.Option(help="A finished run folder, if not the shipped verbalizers.")] = None,
    layers: Layers = "all",
    k: Annotated[int, typer.Option(help="How many readings of each activation.")] = 8,
) -> None:
    """Write one HTML page that shows what every token's activation reads as at every layer."""
    from nla_utils.extensions.depth.layers import parse_layers
    from nla_utils.extensions.release.api import NLA
    from nla_utils.extensions.release.explore import explore as look
    from nla_utils.extensions.release.explore import write_page

    nla = NLA.load(backbone, run)
    chosen = parse_layers(layers, nla.backbone.n_layers)
    typer.echo(f"  page  {show(write_page(look(nla, text, chosen, k), to.resolve()))}")


@app.command()
def compare(
    backbone: Annotated[str, typer.Option(help="Registry name, hub id or folder.")] = "gemma3-270m",
    run: Annotated[Optional[Path], typer.Option(help="A finished run folder, if not the shipped verbalizers.")] = None,
    n: Annotated[int, typer.Option(help="How many sources, each with a twin.")] = 64,
    k: Annotated[int, typer.Option(help="The budget of each way of reading: so many rollouts of the AV.")] = 16,
    directions: Annotated[int, typer.Option(help="How many vectors of each kind that are no activation of a text.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the sources and the draws.")] = 1,
    to: Annotated[Path, typer.Option(help="The results file to write.")] = Path("comparison.json"),
) -> None:
    """Compare the ways of reading on new sources: score, fluency, and what they hold beyond the last words."""
    from nla_utils.artefacts import code_version, library_versions, write_record
    from nla_utils.extensions.comparison.measure import compare as measure
    from nla_utils.extensions.comparison.tables import RESULTS
    from nla_utils.extensions.release.api import NLA

    nla, to = NLA.load(backbone, run), to.resolve()
    unfinished = to.with_suffix(".partial.json")
    record = {
        "name": RESULTS, "identity": nla.backbone.identity(), "made_from": nla.bundle.made_from, "code": code_version(),
        "device": nla.backbone.device.type, "libraries": library_versions(), **measure(nla, n, k, directions, seed, unfinished),
    }  # fmt: skip
    write_record(to, record)
    unfinished.unlink()
    for row in record["rows"]:
        typer.echo(f"  {row['method']:<24} {row['best_cen']:.3f}  {row['best_nats']:.2f} nats a token")
    typer.echo(f"  {show(to)}")


@with_config(profile="laptop")
def bundle(config: RunConfig) -> None:
    """Pack a run's verbalizers into bundles/<backbone>, from where `nla verbalize` takes them."""
    from nla_utils.extensions.release.bundle import BUNDLES, write_bundle
    from nla_utils.run import open_run

    run = open_run(config)
    for path in write_bundle(run, BUNDLES / run.backbone.name):
        typer.echo(f"  {show(path)}  {path.stat().st_size / 1e6:.1f} MB")


@with_config(profile="laptop")
def publish(
    config: RunConfig,
    to: Annotated[Optional[str], typer.Option(help="Push to org/name and org/name-targets.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run/--push", help="Only write the folders, or push them.")] = True,
) -> None:
    """Write a release of a finished run: AV in both formats, evaluation, targets as Parquet and safetensors, cards."""
    from transformers import AutoTokenizer

    from nla_utils.extensions.release.publish import make_release, push
    from nla_utils.lm.registry import fetch, resolve
    from nla_utils.run import open_run
    from nla_utils.stages.targets import load_targets

    if not dry_run and to is None:
        raise ConfigError("--push needs --to org/name")
    run = open_run(config, weights=False)
    targets = load_targets(run)
    tokenizer = AutoTokenizer.from_pretrained(fetch(resolve(config.backbone)))
    texts = [tokenizer.decode(targets.sequence(i), skip_special_tokens=True) for i in range(len(targets.v))]
    release = make_release(run.folder, texts, run.folder.file("release"))
    for part in (release.model, release.dataset):
        for path in release.files(part):
            typer.echo(f"  {path.relative_to(release.model.parent)}  {path.stat().st_size:,} bytes")
    if dry_run:
        typer.echo(f"dry run: nothing was pushed; look at {release.model.parent}, then add --push --to org/name")
        return
    for line in push(release, to, f"{to}-targets"):
        typer.echo(f"  pushed {line}")
