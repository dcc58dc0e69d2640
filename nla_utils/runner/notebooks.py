"""The notebooks through papermill: preflight, skip what is cached, one progress line a notebook."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Sequence

from nla_utils.artefacts import RunFolder, atomic_write, require_disk
from nla_utils.config import ROOT, RunConfig, cache_dir
from nla_utils.errors import ArtefactError, ConfigError, nearest
from nla_utils.extensions.depth.tables import RESULTS as DEPTH
from nla_utils.extensions.tail_reader import reader
from nla_utils.extensions.tail_reader import rollouts as readings
from nla_utils.lm.hub import bytes_to_fetch, config_alone
from nla_utils.lm.loading import describe, pick_layer
from nla_utils.lm.registry import read_model_config, resolve
from nla_utils.lm.releases import fetch_av, fetch_targets, sources_on_hub
from nla_utils.locks import hold
from nla_utils.paper.results import COMMITTED, load_results
from nla_utils.run import described_folder
from nla_utils.runner.execution import run_notebook
from nla_utils.scores.evidence import FILE, is_kept
from nla_utils.scores.rows import CEILING_FILE, EVALUATION_FILE
from nla_utils.stages import ablation, ceilings, probe, rollouts, source_loss, targets, training
from nla_utils.stages.corpus import corpus_rows, read_texts
from nla_utils.stages.released import check_released
from nla_utils.stages.verbalizer import check_av


@dataclass(frozen=True)
class Stage:
    """A notebook, the artefacts and the results file that it leaves, and the notebooks whose artefacts it needs.

    One that leaves no results compares those that are there.
    """

    notebook: str
    artefacts: tuple[str, ...]
    results: str | None
    needs: tuple[int, ...] = ()

    @property
    def number(self) -> int:
        return int(self.notebook.split("/")[-1][:2])

    @property
    def name(self) -> str:
        return self.notebook.split("/")[-1]


STAGES = (
    Stage("01_extract_targets", (targets.ARTEFACT,), "targets"),
    Stage("02_train_av", (training.ARTEFACT,), "training", (1,)),
    Stage("03_ceilings", (ceilings.ARTEFACT, ablation.ARTEFACT), "oracle_ceiling", (1,)),
    Stage("04_centred_eval", (rollouts.ARTEFACT, probe.ARTEFACT, source_loss.ARTEFACT), "centered_eval", (1, 2, 3)),
    Stage("05_k_curve", (), "rerank_eval", (1, 2, 3, 4)),
    Stage("06_cross_backbone", (), None),
)
# Results whose notebooks add to the run's evidence.
EVIDENCED = (CEILING_FILE, EVALUATION_FILE)
EXTENSIONS = {
    "tail-reader": Stage("extensions/07_tail_reader", (reader.ARTEFACT, readings.ARTEFACT), "tail_reader", (1, 3, 4)),
    "depth": Stage("extensions/08_depth", (), DEPTH),
}
ALL_STAGES = (*STAGES, *EXTENSIONS.values())


def select_stages(first: int, last: int, extensions: str = "") -> list[Stage]:
    """The notebooks from one number to another, and those of the named extensions; raises ``ConfigError``."""
    if not 1 <= first <= last <= len(ALL_STAGES):
        raise ConfigError(f"--from {first} --until {last}: choose 1 to {len(ALL_STAGES)}, from not after until")
    named = [name.strip() for name in extensions.split(",") if name.strip()]
    for name in named:
        if name not in EXTENSIONS:
            raise ConfigError(f"--with {name!r}: {nearest(name, EXTENSIONS)}")
    chosen = {EXTENSIONS[name].number for name in named} | set(range(first, last + 1))
    return [s for s in ALL_STAGES if s.number in chosen]


def is_cached(folder: RunFolder, stage: Stage) -> bool:
    """Whether a stage can be skipped: its artefacts load, its results were made from them, its executed
    notebook is there. Raises ``ArtefactError`` for what is broken or of another run."""
    if stage.results is None or not folder.file(f"executed/{stage.name}.ipynb").exists():
        return False
    if not all(folder.has(name) for name in stage.artefacts):
        return False
    for name in stage.artefacts:
        folder.load(name)
    path = folder.file(f"results/{stage.results}.json")
    if not path.exists():
        return False
    made_from = folder.read_results(stage.results)["made_from"]
    if stage.results in EVIDENCED and not is_kept(folder, stage.results, made_from):
        return False
    return all(folder.sha256_of(name) == digest for name, digest in made_from.items())


def preflight(config: RunConfig, stages: Sequence[Stage]) -> RunFolder:
    """Refuse, before long work, what can be refused: names, layer, weights, artefacts, disk; returns the run's folder."""
    say_what_is_fetched(config)
    found = describe(config)
    folder = described_folder(config, found)
    if config.av is not None:
        check_av(fetch_av(config.av, found.spec), found.layer, found.d, found.n_layers)
    if config.released_targets is not None:
        path = fetch_targets(config.released_targets, found.spec)
        check_released(path, found.spec, found.layer, found.d, found.special[0], config.sizes.n_targets)
    if config.corpus is not None:
        path, s = ROOT / config.corpus, config.sizes
        corpus_rows(read_texts(path), path, found.tokenizer, s.n_targets, s.max_new_tokens)
    if all(stage.results is None for stage in stages):
        _require_results(folder)
    else:
        _require_artefacts(folder, stages)
        require_disk(folder.path, disk_of_run(config, found.d))
    return folder


def disk_of_run(config: RunConfig, d: int) -> int:
    """Bytes that a run writes at most."""
    s = config.sizes
    return 4 * d * (3 * s.n_targets + 8 * s.n_eval * (s.n_rollouts + 30)) + 50_000_000


def say_what_is_fetched(config: RunConfig) -> None:
    """Print the disk and memory that a run needs, where anything of it is still to be fetched from the hub.

    Raises ``ArtefactError`` where there is no room, ``ConfigError`` or ``SourceError`` for what cannot be fetched or used.
    """
    spec = resolve(config.backbone)
    sources = sources_on_hub(spec, config.av, config.released_targets)
    sizes = {what: bytes_to_fetch(*arguments) for what, arguments in sources.items()}
    if not any(sizes.values()):
        return
    parts = ", ".join(f"{what} {sources[what][0]} {size / 1e9:.2f} GB" for what, size in sizes.items())
    print(f"to fetch: {parts}; into {cache_dir()}")
    require_disk(cache_dir(), sum(sizes.values()))
    if sizes.get("backbone"):
        model = read_model_config(spec, config_alone(spec.source))
        pick_layer(config.layer, spec, model.num_hidden_layers)
        s, d = config.sizes, model.hidden_size
        # The weights; targets as read and as used; re-encoded rollouts of both protocols, and as they are scored.
        memory = sizes["backbone"] + 4 * d * (2 * s.n_targets + 8 * s.n_eval * (s.n_rollouts + 1))
        print(f"the run writes up to {disk_of_run(config, d) / 1e9:.2f} GB; memory, weights included: {memory / 1e9:.1f} GB "
              f"and what torch takes for a batch")  # fmt: skip


def _require_results(folder: RunFolder) -> None:
    """The run's own, or those that the repository keeps of a run of the same name."""
    kept = COMMITTED / folder.backbone / folder.path.name
    if not any(load_results(place) for place in (folder.path, kept)):
        raise ArtefactError(f"neither {folder.path} nor paper/results has all results of this run; start with --from 01")


def _require_artefacts(folder: RunFolder, stages: Sequence[Stage]) -> None:
    """What there is loads, and what the chosen stages need and do not make themselves is there."""
    made = {stage.number for stage in stages}
    needed = {number for stage in stages for number in stage.needs} - made
    for stage in ALL_STAGES:
        present = [name for name in stage.artefacts if folder.has(name)]
        for name in present:
            folder.load(name)
        if len(present) < len(stage.artefacts) and stage.number in needed:
            raise ArtefactError(f"{folder.path} lacks what {stage.name} makes; start with --from {stage.number:02d}")


def reproduce(configs: Sequence[RunConfig], finish: Callable[[RunFolder], None], stages: Sequence[Stage] = STAGES) -> None:
    """Run the notebooks for each configuration, and ``finish`` with the folder of each as soon as it is through.

    All configurations are checked before the first long stage starts. Raises ``NotebookError``.
    """
    folders = [preflight(c, stages) for c in configs]
    _require_distinct(configs, folders)
    for config, folder in zip(configs, folders):
        folder.path.mkdir(parents=True, exist_ok=True)
        busy = f"another process is at work in {folder.path}, and another --out would be free"
        with hold(folder.file("run.lock"), busy):
            _run_stages(config, folder, stages)
            finish(folder)


def _run_stages(config: RunConfig, folder: RunFolder, stages: Sequence[Stage]) -> None:
    # What a run that was ended while it cleared up has left.
    for chunks in folder.path.glob("*.chunks"):
        if folder.has(chunks.stem):
            shutil.rmtree(chunks, ignore_errors=True)
    stale = False
    for stage in stages:
        label = f"{folder.backbone} {stage.name}"
        # Whatever comes after a stage that ran is run again: it may have been made from older inputs.
        if not stale and is_cached(folder, stage):
            print(f"{label}: cached, skipped", flush=True)
            continue
        stale = True
        run_notebook(config, folder, stage.notebook, label)


def _require_distinct(configs: Sequence[RunConfig], folders: Sequence[RunFolder]) -> None:
    """Raise ``ConfigError`` where two runs would write into one folder."""
    by_path: dict[Path, RunConfig] = {}
    for config, folder in zip(configs, folders):
        other = by_path.setdefault(folder.path, config)
        if other is not config:
            raise ConfigError(
                f"{other.backbone} and {config.backbone} would both write into {folder.path}; give one another --out, or "
                f"rename its folder"
            )


def adopt(folder: RunFolder) -> None:
    """Copy a run's results and evidence to where the repository keeps them, and its executed notebooks if it is a run of
    its own: of the runs of a sweep no notebooks are kept. What text alone reaches by depth is kept beside the runs of any
    seed."""
    results, alone = COMMITTED / folder.backbone, dataclasses.replace(folder.config, layer=None, seed=1).folder_name
    for path in [*sorted(folder.file("results").glob("*.json")), *folder.path.glob(FILE)]:
        beside = alone if path.stem == DEPTH else folder.path.name
        atomic_write(results / beside / path.name, path.read_bytes())
    if alone != folder.path.name:
        return
    executed = ROOT / "notebooks" / "executed" / folder.backbone / folder.path.name
    for path in sorted(folder.file("executed").glob("0?_*.ipynb")):
        if not path.name.endswith(".failed.ipynb"):
            atomic_write(executed / path.name, path.read_bytes())
