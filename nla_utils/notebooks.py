"""The notebooks through papermill: what can be refused is refused first, and what is finished is skipped."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence

import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError

from nla_utils import baselines, targets
from nla_utils.config import DATA, ROOT, RunConfig, cache_dir, source_name
from nla_utils.errors import ArtefactError, ConfigError, NotebookError
from nla_utils.evidence import FILE, is_kept
from nla_utils.lm import weights
from nla_utils.lm.loading import describe, pick_layer
from nla_utils.report.results import COMMITTED, find_results
from nla_utils.rows import CEILING_FILE, EVALUATION_FILE
from nla_utils.run import folder_of
from nla_utils.store import MIRROR_VARIABLE, RunFolder, atomic_write, hold, read_json, require_disk
from nla_utils.verbalizer import BEST_AV, ROLLOUTS, SOURCE_LOSS, check_av


@dataclass(frozen=True)
class Stage:
    """A notebook, the artefacts and the results file that it leaves, and the notebooks whose artefacts it needs.

    One that leaves no results compares those that are there.
    """

    notebook: str
    artefacts: tuple[str, ...]
    results: Optional[str]
    needs: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.notebook.split("/")[-1]

    @property
    def number(self) -> int:
        return int(self.name[:2])


STAGES = (
    Stage("01_extract_targets", (targets.TARGETS,), "targets"),
    Stage("02_train_av", (BEST_AV,), "training", (1,)),
    Stage("03_ceilings", (baselines.CEILINGS,), CEILING_FILE, (1,)),
    Stage("04_centred_eval", (ROLLOUTS, baselines.PROBE, SOURCE_LOSS), EVALUATION_FILE, (1, 2, 3)),
    Stage("05_k_curve", (), "rerank_eval", (1, 2, 3, 4)),
    Stage("06_cross_backbone", (), None),
)


def reproduce(
    configs: Sequence[RunConfig], finish: Callable[[RunFolder], None], stages: Sequence[Stage] = STAGES
) -> None:
    """Run the notebooks for each configuration, and ``finish`` with the folder of each as soon as it is through.

    All configurations are checked before the first long stage starts. Raises ``NotebookError``.
    """
    runs: dict[Path, tuple[RunConfig, RunFolder]] = {}
    for config in configs:
        folder = preflight(config, stages)
        other, _ = runs.setdefault(folder.path, (config, folder))
        if other is not config:
            both = f"{other.backbone} and {config.backbone} would both write into {folder.path}"
            raise ConfigError(f"{both}; give one another --out, or rename its folder")
    for config, folder in runs.values():
        folder.path.mkdir(parents=True, exist_ok=True)
        busy = f"another process is at work in {folder.path}, and another --out would be free"
        with hold(folder.file("run.lock"), busy):
            # What a run that was ended while it cleared up has left.
            for chunks in folder.path.glob("*.chunks"):
                if folder.has(chunks.stem):
                    shutil.rmtree(chunks, ignore_errors=True)
            stale = False
            for stage in stages:
                label = f"{folder.backbone} {stage.name}"
                # Whatever comes after a stage that ran is run again: it may have been made from older inputs.
                stale = stale or not is_cached(folder, stage)
                if stale:
                    run_notebook(config, folder, stage.notebook, label)
                else:
                    print(f"{label}: cached, skipped", flush=True)
            finish(folder)


def preflight(config: RunConfig, stages: Sequence[Stage]) -> RunFolder:
    """The run's folder; raises before long work what can be refused: names, layer, weights, artefacts, disk."""
    require_room(config)
    found = describe(config)
    folder = folder_of(config, found)
    if config.av is not None:
        check_av(weights.fetch_av(config.av, found.spec), found.layer, found.d, found.n_layers)
    if config.released_targets is not None:
        path = weights.fetch_targets(config.released_targets, found.spec)
        targets.check_released(path, found, config.sizes.n_targets)
    if config.corpus is not None:
        path, s = ROOT / config.corpus, config.sizes
        targets.corpus_rows(targets.read_texts(path), path, found.tokenizer, s.n_targets, s.max_new_tokens)
    if all(stage.results is None for stage in stages):
        own = (folder.backbone, config.folder_name)
        if not any((r.backbone, r.profile) == own for r in find_results([COMMITTED, ROOT / config.out])):
            where = f"neither {folder.path} nor paper/results has"
            raise ArtefactError(f"{where} all results of this run; start with --from 01")
        return folder
    missing = {number for stage in stages for number in stage.needs} - {stage.number for stage in stages}
    for stage in dict.fromkeys((*STAGES, *stages)):
        present = [name for name in stage.artefacts if folder.has(name)]
        for name in present:
            folder.load(name)
        if len(present) < len(stage.artefacts) and stage.number in missing:
            raise ArtefactError(f"{folder.path} lacks what {stage.name} makes; start with --from {stage.number:02d}")
    require_disk(folder.path, disk_of_run(config, found.d))
    return folder


def require_room(config: RunConfig) -> None:
    """Print the disk and memory that a run needs, where anything of it is still to be fetched from the hub.

    Raises ``ArtefactError`` where there is no room, ``ConfigError`` or ``SourceError`` for what cannot be used.
    """
    spec = weights.resolve(config.backbone)
    sources = {
        "backbone": spec.on_hub,
        "AV": config.av and weights.released_on_hub(config.av, spec, "av"),
        "targets": config.released_targets and weights.released_on_hub(config.released_targets, spec, "targets"),
    }
    sizes = {what: files.bytes_to_fetch() for what, files in sources.items() if files}
    if not any(sizes.values()):
        return
    parts = ", ".join(f"{what} {sources[what].source} {size / 1e9:.2f} GB" for what, size in sizes.items())
    print(f"to fetch: {parts}; into {cache_dir()}")
    require_disk(cache_dir(), sum(sizes.values()))
    if sizes.get("backbone"):
        model = weights.read_model_config(spec)
        pick_layer(config.layer, spec, model.num_hidden_layers)
        s, d = config.sizes, model.hidden_size
        # The weights; targets as read and as used; re-encoded rollouts of both protocols, and as they are scored.
        memory = sizes["backbone"] + 4 * d * (2 * s.n_targets + 8 * s.n_eval * (s.n_rollouts + 1))
        written = f"the run writes up to {disk_of_run(config, d) / 1e9:.2f} GB"
        print(f"{written}; memory, weights included: {memory / 1e9:.1f} GB and what torch takes for a batch")


def disk_of_run(config: RunConfig, d: int) -> int:
    """Bytes that a run writes at most."""
    s = config.sizes
    return 4 * d * (3 * s.n_targets + 8 * s.n_eval * (s.n_rollouts + 30)) + 50_000_000


def is_cached(folder: RunFolder, stage: Stage) -> bool:
    """Whether a stage can be skipped: its artefacts, its executed notebook and results made from them are there.
    Raises ``ArtefactError`` for what is of another run."""
    if stage.results is None or not all(folder.has(name) for name in stage.artefacts):
        return False
    if not all(folder.file(f).exists() for f in (f"executed/{stage.name}.ipynb", f"results/{stage.results}.json")):
        return False
    made_from = folder.read_results(stage.results)["made_from"]
    if stage.results in (CEILING_FILE, EVALUATION_FILE) and not is_kept(folder, stage.results, made_from):
        return False
    return all(folder.sha256_of(name) == digest for name, digest in made_from.items())


def run_notebook(config: RunConfig, folder: RunFolder, notebook: str, label: str) -> None:
    """Execute one notebook into ``executed/``; a failed one is kept beside it as ``.failed.ipynb``."""
    name = notebook.split("/")[-1]
    executed = folder.file(f"executed/{name}.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    failed = executed.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    defaults = asdict(RunConfig())
    changed = {key: value for key, value in asdict(config).items() if value != defaults[key]}
    # A parameter that a notebook does not use is part of the run all the same; what fails is raised too.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    # Some network file systems keep a file that is open elsewhere: the folder's removal is no part of the run.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp, progress_line(label, Path(tmp) / "progress"):
        out, said = Path(tmp) / executed.name, Path(tmp) / "said"
        try:
            _execute(DATA / "notebooks" / f"{notebook}.ipynb", out, changed, said)
        except DeadKernelError:
            ended = "its process was ended from outside, as when memory runs out"
            raise NotebookError(f"{name}: {ended}{_last_line(said)}") from None
        except RuntimeError as error:
            remedy = "where the temporary folder is at fault, set TMPDIR to another"
            raise NotebookError(f"{name}: its kernel did not start: {error}{_last_line(said)}; {remedy}") from None
        except papermill.PapermillExecutionError as e:
            shutil.copy(out, failed)
            raise NotebookError(f"{name}: {e.ename}: {e.evalue}\n(as far as it ran: {failed})") from None
        done = tidy(read_json(out))
        atomic_write(executed, (json.dumps(done, indent=1, ensure_ascii=False) + "\n").encode())


def _execute(notebook: Path, out: Path, parameters: dict, said: Path) -> None:
    """Run a notebook in a kernel of this environment, without the user's start-up files and display settings, whose
    process writes what it says to ``said``, and its progress beside it."""

    class Kernel(AsyncKernelManager):
        process = None
        kernel_spec = KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            language="python",
            env={
                "MPLBACKEND": "module://matplotlib_inline.backend_inline",
                "IPYTHONDIR": str(said.parent / "ipython"),
                "PYTHONSTARTUP": "",
                MIRROR_VARIABLE: str(said.parent / "progress"),
                "NLA_CACHE": str(cache_dir().resolve()),
            },
        )

        async def start_kernel(self, **given) -> None:
            with open(said, "wb") as file:
                await super().start_kernel(stderr=file, **given)
            Kernel.process = self.provisioner.process

    # In a thread of its own: Ctrl-C in its event loop would leave tasks that complain at length.
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            papermill.execute_notebook,
            # Papermill reads braces in a path as fields to fill in.
            *(str(path).replace("{", "{{").replace("}", "}}") for path in (notebook, out)),
            parameters=parameters,
            kernel_name="python3",
            kernel_manager_class=Kernel,
            progress_bar=False,
            cwd=ROOT,
            # A kernel that is stopped with its command says so at length, as an error.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        try:
            running.result()
        except KeyboardInterrupt:
            while not running.done():
                if Kernel.process is not None:
                    Kernel.process.kill()
                time.sleep(0.1)
            raise


def _last_line(said: Path) -> str:
    """The last line that a process wrote, to be added to a message."""
    lines = said.read_text(encoding="utf-8", errors="replace").split("\n") if said.exists() else []
    written = [line.strip() for line in lines if line.strip()]
    return f" ({written[-1]})" if written else ""


def tidy(notebook: dict) -> dict:
    """An executed notebook without machine paths and without what was written to stderr, as progress bars are."""
    for key in ("input_path", "output_path", "environment_variables"):
        notebook["metadata"].get("papermill", {}).pop(key, None)
    for cell in (cell for cell in notebook["cells"] if "outputs" in cell):
        cell["outputs"] = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                output["text"] = "".join(output["text"]).replace(str(ROOT) + os.sep, "")
    return notebook


@contextlib.contextmanager
def progress_line(label: str, mirror: Path) -> Iterator[None]:
    """One line for a running notebook: the stage's own progress bar where there is one, and the time."""
    terminal, started, done = sys.stderr.isatty(), time.monotonic(), threading.Event()
    clear = "\r\033[K" if terminal else ""

    def elapsed() -> str:
        minutes, seconds = divmod(int(time.monotonic() - started), 60)
        return f"{minutes}:{seconds:02d}"

    def tick() -> None:
        while not done.wait(0.5 if terminal else 30):
            try:
                bar = mirror.read_text(encoding="utf-8", errors="replace")
            except OSError:
                bar = "starting"
            end = "" if terminal else "\n"
            print(f"{clear}{label} [{elapsed()}] {bar}", end=end, file=sys.stderr, flush=True)

    thread, ending = threading.Thread(target=tick, daemon=True), "failed"
    thread.start()
    try:
        yield
        ending = "done"
    except KeyboardInterrupt as error:
        # The command says it, whatever it was at.
        ending, error.args = "", (f"{label}: stopped after {elapsed()}",)
        raise
    finally:
        done.set()
        thread.join()
        said = f"{label}: {ending} in {elapsed()}\n" if ending else ""
        print(f"{clear}{said}", end="", file=sys.stderr, flush=True)


def adopt(folder: RunFolder) -> None:
    """Copy a run's results and evidence to where the repository keeps them, and its executed notebooks, without the
    paths of what it was given, unless it is a run of a sweep."""
    for path in [*sorted(folder.file("results").glob("*.json")), *folder.path.glob(FILE)]:
        atomic_write(COMMITTED / folder.backbone / folder.path.name / path.name, path.read_bytes())
    if (folder.config.layer, folder.config.seed) != (None, 1):
        return
    executed = ROOT / "notebooks" / "executed" / folder.backbone / folder.path.name
    config = folder.config
    given = [x for x in (config.av, config.released_targets, config.corpus) if x and Path(x).is_absolute()]
    for path in sorted(folder.file("executed").glob("0?_*.ipynb")):
        if not path.name.endswith(".failed.ipynb"):
            text = path.read_text(encoding="utf-8")
            for source in given:
                text = text.replace(source, source_name(source))
            atomic_write(executed / path.name, text.encode())
