"""The whole ``nla`` command: that of §11, with the commands, notebooks and pages of the extensions."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Optional

import click

from nla_utils.cli import BESIDE, FILE, OPTIONS, PAGES, adopt_option, app, finish, show, with_config, write_pages
from nla_utils.config import RunConfig, parse_seeds
from nla_utils.errors import ConfigError, nearest

layers_option = click.option("--layers", default="all", help="all, or numbers with commas: 6,13")
sequences_option = click.option("--sequences", type=FILE, help="A file of `nla sequences`, instead of drawing them.")
backbone_option = click.option("--backbone", **OPTIONS["backbone"])
run_option = click.option("--run", type=FILE, help="A finished run folder, if not the shipped verbalizers.")


def model_options(command):
    """Decorator: the options that a backbone is loaded with."""
    for name in ("device", "dtype", "layer"):
        command = click.option(f"--{name}", **OPTIONS[name])(command)
    return command


def loaded(backbone: str, checked: bool = True, **config):
    """A backbone by what the command line calls it."""
    from nla_utils.lm.loading import load_backbone
    from nla_utils.lm.weights import canonical_name

    return load_backbone(RunConfig(backbone=canonical_name(backbone), **config), checked)


def said(label: str, path: Path) -> None:
    click.echo(f"  {label:<20}{show(path)}")


def opened(config: RunConfig, weights: bool = True):
    """A run and its targets."""
    from nla_utils.run import open_run
    from nla_utils.targets import load_targets

    run = open_run(config, weights)
    return run, load_targets(run)


def _tail_reader():
    from nla_extensions.tail_reader import reader, rollouts
    from nla_utils.notebooks import Stage

    return Stage("extensions/07_tail_reader", (reader.ARTEFACT, rollouts.ARTEFACT), "tail_reader", (1, 3, 4))


def _depth():
    from nla_extensions.depth.page import RESULTS
    from nla_utils.notebooks import Stage

    return Stage("extensions/08_depth", (), RESULTS)


def _pages():
    from nla_extensions.comparison.page import comparison_page
    from nla_extensions.depth.page import depth_page
    from nla_extensions.requantize.page import requantized_page
    from nla_extensions.scoring.page import scores_page
    from nla_extensions.tail_reader.page import reader_page

    return reader_page(), depth_page(), comparison_page(), requantized_page(), scores_page()


BESIDE |= {"tail-reader": _tail_reader, "depth": _depth}
PAGES.append(_pages)


@with_config("layer")
@layers_option
@sequences_option
@adopt_option
def sweep(config: RunConfig, layers: str, sequences: Optional[Path], adopt: bool) -> None:
    """Run the notebooks at several layers, all from the same sequences, whose activations are taken in one pass."""
    from nla_extensions.depth.measure import extract_layers, parse_layers
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
    from nla_extensions.depth.measure import parse_layers, reach_of_text
    from nla_extensions.depth.page import RESULTS
    from nla_utils.report.results import COMMITTED
    from nla_utils.run import open_run
    from nla_utils.store import atomic_write

    run = open_run(config)
    path = run.write_results(RESULTS, *reach_of_text(run, parse_layers(layers, run.backbone.n_layers), sequences))
    finish(run.folder, adopt=False)
    if adopt:
        # Beside the runs of any seed.
        beside = dataclasses.replace(config, seed=1).folder_name
        atomic_write(COMMITTED / run.folder.backbone / beside / path.name, path.read_bytes())
        write_pages()


@with_config()
@click.option("--to", type=FILE, help="File to write, if not the repository's own.")
def sequences(config: RunConfig, to: Optional[Path]) -> None:
    """Keep a run's sequences in one small file, for `sweep` and `depth` on another machine to start from."""
    from nla_extensions.depth.measure import committed_sequences, write_sequences

    run, targets = opened(config, weights=False)
    path = to or committed_sequences(run)
    write_sequences(path, run, targets)
    click.echo(f"  {show(path)}  {path.stat().st_size / 1e6:.1f} MB")


@with_config("seed")
@click.option("--seeds", default="1", help="Seed of the run; the targets of more of them add to the growth with N.")
def ablate(config: RunConfig, seeds: str) -> None:
    """Take the tail reader of a run apart: one change at a time, and its growth with N. Needs notebook 07."""
    from nla_extensions.tail_reader.page import ABLATION_RESULTS
    from nla_extensions.tail_reader.study import ablate_reader

    first, *others = parse_seeds(seeds)
    run, targets = opened(dataclasses.replace(config, seed=first))
    said("reader ablation", run.write_results(ABLATION_RESULTS, *ablate_reader(run, targets, others)))


@with_config("seed")
@click.option("--seeds", default="1,2,3", help="The first is that of the run that keeps the result.")
def replicate(config: RunConfig, seeds: str) -> None:
    """Repeat the tail reader's claims on targets drawn anew for each seed; trains no AV."""
    from nla_extensions.tail_reader import study
    from nla_extensions.tail_reader.page import SEEDS_RESULTS
    from nla_utils.run import open_run

    chosen = parse_seeds(seeds)
    if len(chosen) < 2:
        raise ConfigError(f"--seeds {seeds}: a spread needs at least two seeds, for example 1,2,3")
    run = open_run(dataclasses.replace(config, seed=chosen[0]))
    said("reader over seeds", run.write_results(SEEDS_RESULTS, *study.replicate(run, chosen)))


@with_config()
@click.option("--parts", help="Which tables, with commas; all if not given.")
def study(config: RunConfig, parts: Optional[str]) -> None:
    """Train the AV in other ways, one factor at a time, and measure what it takes from v. Needs notebook 02."""
    from nla_extensions import training_study as of
    from nla_utils.report.claims import STUDY

    run, targets = opened(config)
    planned = of.study_of(run, targets)
    known = {v.part for v in planned}
    wanted = known if parts is None else {p.strip() for p in parts.split(",")}
    for part in wanted - known:
        raise ConfigError(f"--parts {part!r}: {nearest(part, known)}")
    records = of.study(run, targets, [v for v in planned if v.part in wanted])
    made_from = {"targets": targets.sha256, "best_av": run.folder.sha256_of("best_av")}
    variants = [*records, of.run_itself(run, targets)]
    said("training study", run.write_results(STUDY, {"variants": variants}, made_from))


@with_config()
@click.option("--n", default=256, help="How many training targets it writes for.")
@click.option("--k", default=16, help="How many rollouts the best is chosen from.")
@click.option("--rounds", default=2, help="Rounds of expert iteration.")
@click.option("--av", help="The released AV that the run has, if it trained none.")
def iterate(config: RunConfig, n: int, k: int, rounds: int, av: Optional[str]) -> None:
    """Train a run's AV on the best of its own texts, and on the guided search's. Needs notebook 02."""
    from nla_extensions import training_study as of
    from nla_utils.report.claims import ITERATION

    run, targets = opened(dataclasses.replace(config, av=av))
    made_from = {"targets": targets.sha256, "best_av": run.folder.sha256_of("best_av")}
    record = {"k": k, "rounds": of.iterate(run, targets, n, k, rounds)}
    said("expert iteration", run.write_results(ITERATION, record, made_from))


@with_config()
def requantize(config: RunConfig) -> None:
    """Round the weights of a run's backbone once more, to 8 and to 4 bits, and measure how far v and the scores of the
    same texts move. Needs notebooks 01 to 04."""
    from nla_extensions.requantize import measure
    from nla_extensions.requantize.page import RESULTS

    run, targets = opened(config)
    said("weights requantized", run.write_results(RESULTS, *measure.requantize(run, targets)))


@app.command()
@click.option("--text", help="Take the activation of this text.")
@click.option("--vector", type=click.Path(exists=True, path_type=Path), help="Or a .npy, .safetensors or .pt file.")
@click.option("--vectors", type=FILE, help="Or a file of many, whose texts go --to.")
@click.option("--to", type=FILE, help="JSON Lines of k texts for each of --vectors, for `nla score`.")
@click.option("--token", default=-1, help="Which token of the text; negative counts from the end.")
@backbone_option
@click.option("--layer", **OPTIONS["layer"])
@run_option
@click.option("--method", default="reader", help="reader, guided, av, lens, patchscope, or module:Class.")
@click.option("--k", default=64, help="How many texts to choose from.")
@click.option("--seed", default=0, help="Seed of the draws.")
@click.option("--fluency", type=float, help="Score penalty per nat per token; guided has 0.02 if not given.")
@click.option("--others", default=0, help="A p-value from the texts of so many other activations; so much slower.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verbalize(
    text: Optional[str],
    vector: Optional[Path],
    vectors: Optional[Path],
    to: Optional[Path],
    token: int,
    backbone: str,
    layer: Optional[int],
    run: Optional[Path],
    as_json: bool,
    **how,
) -> None:
    """Put an activation into words: the best of k texts, its score, and what chance and retrieval give. Of many
    --vectors, write k texts each to a file."""
    from nla_extensions.release.api import NLA
    from nla_extensions.release.verbalizers import METHODS
    from nla_extensions.scoring.files import read_vector, read_vectors

    if sum(given is not None for given in (text, vector, vectors)) != 1:
        raise ConfigError("give one of --text, --vector and --vectors")
    if (vectors is None) != (to is None):
        raise ConfigError("--vectors and --to go together: the texts of many activations go to a file")
    if vectors is not None:
        alone = {"--token": token != -1, "--fluency": how["fluency"] is not None, "--others": how["others"] != 0}
        for option, given in {**alone, "--json": as_json}.items():
            if given:
                raise ConfigError(f"{option} is for a single activation; leave it out beside --vectors")
        names, v_Md = read_vectors(vectors)
        nla = NLA.load(backbone, run, layer=layer, bundled=how["method"] in METHODS)
        nla.verbalize_many(names, v_Md, to.resolve(), how["k"], how["method"], how["seed"])
        click.echo(f"  {show(to.resolve())}  {len(names):,} × {how['k']} texts")
        return
    given = None if vector is None else read_vector(vector)
    # What loading says is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        nla = NLA.load(backbone, run, layer=layer)
    found = nla.verbalize(nla.activation(text, token) if given is None else given, **how)
    click.echo(json.dumps(dataclasses.asdict(found), ensure_ascii=False, allow_nan=False) if as_json else str(found))


@app.command()
@click.option("--text", required=True, help="The text to look at.")
@click.option("--to", type=FILE, default=Path("explore.html"), help="The page to write.")
@backbone_option
@run_option
@layers_option
@click.option("--k", default=8, help="How many readings of each activation.")
def explore(text: str, to: Path, backbone: str, run: Optional[Path], layers: str, k: int) -> None:
    """Write one HTML page that shows what every token's activation reads as at every layer."""
    from nla_extensions.depth.measure import parse_layers
    from nla_extensions.release import explore as of
    from nla_extensions.release.api import NLA

    nla = NLA.load(backbone, run)
    found = of.explore(nla, text, parse_layers(layers, nla.backbone.n_layers), k)
    click.echo(f"  page  {show(of.write_page(found, to.resolve()))}")


@app.command()
@click.argument("backbone")
@click.option("--activations", type=FILE, help="Check these instead: a .safetensors file with ids (N, T) and h (N, d).")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(backbone: str, activations: Optional[Path], as_json: bool, **given) -> None:
    """Check whether a model's activations can be trusted, or whether activations from elsewhere are this model's.

    Ends with status 1 if a check fails."""
    from nla_extensions.activations import check_activations, read_activations
    from nla_utils.lm.checks import run_checks

    read = activations and read_activations(activations)
    # What loading says is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        model = loaded(backbone, checked=False, **given)
    about = {k: model.identity()[k] for k in ("backbone", "weight_hash", "layer", "dtype")}
    about |= {"n_layers": model.n_layers, "device": model.device.type}
    if not as_json:
        click.echo("{backbone}, layer {layer} of {n_layers}, {dtype}, {device}".format(**about))
    found = []
    for finding in check_activations(*read, model) if read else run_checks(model):
        found.append(finding)
        if not as_json:
            click.echo(str(finding))
    failed = [finding.name for finding in found if finding.passed is False]
    if as_json:
        record = {**about, "passed": not failed, "findings": [finding.record() for finding in found]}
        click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))
    else:
        click.echo(f"  failed: {', '.join(failed)}" if failed else "  nothing failed")
    if failed:
        raise click.exceptions.Exit(1)


@app.command()
@click.option("--vectors", type=FILE, required=True, help="M vectors: .safetensors, .npy or .pt, named or numbered.")
@click.option(
    "--texts", type=FILE, multiple=True, required=True, help="Texts as JSON Lines; repeat for several methods."
)
@click.option("--sources", type=FILE, help="The vectors' own sources as JSON Lines.")
@backbone_option
@model_options
@click.option("--pool", type=FILE, help="A folder of `nla pool`, or a finished run, if not one drawn and cached.")
@click.option("--protocol", default="corrected", help="corrected, or published: read without the start token.")
@click.option("--directions", is_flag=True, help="The vectors are directions (SAE decoder rows, steering vectors).")
@click.option(
    "--searched",
    is_flag=True,
    help="The texts were optimised against this score, or chosen by it: no bits, no p-values.",
)
@click.option("--max-over-tokens", is_flag=True, help="Read a text at every token; the best counts.")
@click.option("--encoder", help="module:Class of a trained reconstructor, which gives activations of token ids.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--parquet", type=FILE, help="Write a row a text here; of several --texts, each to a file with its name.")
@click.option("--html", type=FILE, help="Write a page here; of several --texts, each to a file with its name.")
def score(
    vectors: Path,
    texts: tuple[Path, ...],
    sources: Optional[Path],
    encoder: Optional[str],
    as_json: bool,
    parquet: Optional[Path],
    html: Optional[Path],
    **how,
) -> None:
    """Score texts against the vectors that they were written for, beside unrelated texts at equal K."""
    from nla_extensions.release.verbalizers import load_class
    from nla_extensions.scoring import files
    from nla_extensions.scoring.page import RESULTS
    from nla_extensions.scoring.pool import pool_of
    from nla_extensions.scoring.scores import score as score_texts
    from nla_utils.store import sha256_file

    if len({path.stem for path in texts}) < len(texts):
        raise ConfigError("two files of texts have the same name; it is what their methods are called")
    names, v_Md = files.read_vectors(vectors)
    out, records = sys.stdout, []
    # What loading says is not part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        backbone = loaded(**{key: how.pop(key) for key in ("backbone", "layer", "dtype", "device")})
        files.check_vectors(v_Md, names, backbone.d, backbone.name)
        given = [files.read_texts(path, names, backbone) for path in texts]
        how["sources"] = sources and files.read_texts(sources, names, backbone)[0]
        made = encoder and load_class(encoder)(backbone)
        # Once for all methods.
        how["pool"] = pool_of(how["pool"], backbone)
        for path, (ids, notes) in zip(texts, given):
            found = score_texts(ids, v_Md, backbone, names=names, method=path.stem, encoder=made and made.encode, **how)
            found.notes += notes
            for target, write in ((parquet, found.to_parquet), (html, found.to_html)):
                if target:
                    write(target if len(texts) == 1 else target.with_stem(f"{target.stem}-{path.stem}"))
            records.append(found.record())
            if as_json:
                continue
            lines = [
                found.table().to_string(),
                found.bits_line(),
                *found.p_lines(),
                *(f"note: {x}" for x in found.notes),
            ]
            click.echo("\n".join(lines), file=out)
    if as_json:
        made_from = {path.name: sha256_file(path) for path in (vectors, *texts)}
        record = {"name": RESULTS, **found.provenance, "made_from": made_from, "methods": records}
        click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False))


@app.command()
@backbone_option
@model_options
@click.option("--n", type=int, help="How many unrelated texts.")
@click.option("--corpus", type=FILE, help="Take them from texts: a .jsonl with a field 'text', or a folder of .txt.")
@click.option("--seed", default=1, help="Seed of the draws.")
def pool(backbone: str, n: Optional[int], corpus: Optional[Path], seed: int, **config) -> None:
    """Draw the unrelated texts that `nla score` compares with, once for a backbone and layer."""
    from nla_extensions.scoring.pool import SIZE, make_pool

    made, path = make_pool(loaded(backbone, **config), SIZE if n is None else n, corpus, seed)
    click.echo(f"  {path}  {len(made.v):,} texts, {made.about['duplicates left out']} duplicates left out")


@app.command()
@backbone_option
@run_option
@click.option("--n", default=64, help="How many sources, each with a twin.")
@click.option("--k", default=16, help="Compute budget of each way of reading, in AV rollouts.")
@click.option("--directions", default=16, help="How many vectors of each kind that are no activation of a text.")
@click.option("--method", "more", multiple=True, help="A further verbalizer: module:Class, or an installed one's name.")
@click.option("--seed", default=1, help="Seed of the sources and the draws.")
@click.option("--to", type=FILE, default=Path("comparison.json"), help="The results file to write.")
def compare(
    backbone: str, run: Optional[Path], n: int, k: int, directions: int, seed: int, to: Path, more: tuple[str, ...]
) -> None:
    """Compare the ways of reading on new sources: score, fluency, and what they hold beyond the last words."""
    from nla_extensions.comparison import measure
    from nla_extensions.release.api import NLA
    from nla_utils.report.claims import COMPARISON
    from nla_utils.store import code_version, library_versions, write_record

    nla, to = NLA.load(backbone, run), to.resolve()
    unfinished = to.with_suffix(".partial.json")
    record = {
        "name": COMPARISON,
        "identity": nla.backbone.identity(),
        "made_from": nla.bundle.made_from,
        "code": code_version(),
        "libraries": library_versions(),
        "device": nla.backbone.device.type,
        **measure.compare(nla, n, k, directions, seed, unfinished, more),
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

    if not dry_run and to is None:
        raise ConfigError("--push needs --to org/name")
    run, targets = opened(config, weights=False)
    tokenizer = AutoTokenizer.from_pretrained(fetch(resolve(config.backbone)))
    texts = [tokenizer.decode(targets.sequence(i), skip_special_tokens=True) for i in range(len(targets.v))]
    out = run.folder.file("release")
    make_release(run.folder, texts, out)
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        click.echo(f"  {path.relative_to(out)}  {path.stat().st_size:,} bytes")
    if dry_run:
        click.echo(f"dry run: nothing was pushed; look at {out}, then add --push --to org/name")
    for line in [] if dry_run else push(out, to):
        click.echo(f"  pushed {line}")


if __name__ == "__main__":
    app()
