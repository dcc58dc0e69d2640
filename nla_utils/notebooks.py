"""The notebooks through papermill: preflight, skip what is cached, one progress line a notebook."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, ClassVar, Iterator, Optional, Sequence

import papermill
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from nla_utils.baselines import ABLATION, CEILINGS, PROBE
from nla_utils.config import DATA, ROOT, RunConfig, cache_dir
from nla_utils.errors import ArtefactError, ConfigError, NotebookError
from nla_utils.evidence import FILE, is_kept
from nla_utils.lm.loading import describe, pick_layer
from nla_utils.lm.weights import (
    bytes_to_fetch,
    config_alone,
    fetch_av,
    fetch_targets,
    read_model_config,
    resolve,
    sources_on_hub,
)
from nla_utils.report.results import COMMITTED, load_results
from nla_utils.rollouts import ROLLOUTS
from nla_utils.rows import CEILING_FILE, EVALUATION_FILE
from nla_utils.run import described_folder
from nla_utils.store import MIRROR_VARIABLE, RunFolder, atomic_write, hold, require_disk
from nla_utils.targets import TARGETS, check_released, corpus_rows, read_texts
from nla_utils.verbalizer import BEST_AV, SOURCE_LOSS, check_av


def run_notebook(config: RunConfig, folder: RunFolder, notebook: str, label: str) -> None:
    """Execute one notebook into ``executed/``; a failed one is kept beside it as ``.failed.ipynb``."""
    name = notebook.split("/")[-1]
    executed = folder.file(f"executed/{name}.ipynb")
    executed.parent.mkdir(parents=True, exist_ok=True)
    failed = executed.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    # A parameter that a notebook does not use is part of the run all the same; what fails is raised too.
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    # Some network file systems keep a file that is open elsewhere: the folder's removal is no part of the run.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp, Ticker(label, Path(tmp) / "progress"):
        out = Path(tmp) / executed.name
        try:
            with own_kernel(Path(tmp)) as kernel:
                _execute(kernel, DATA / "notebooks" / f"{notebook}.ipynb", out, parameters(config))
        except DeadKernelError:
            ended = "its process was ended from outside, as when memory runs out"
            raise NotebookError(f"{name}: {ended}{kernel.last_words()}") from None
        except RuntimeError as error:
            remedy = "where the temporary folder is at fault, set TMPDIR to another"
            raise NotebookError(f"{name}: its kernel did not start: {error}{kernel.last_words()}; {remedy}") from None
        except PapermillExecutionError as e:
            shutil.copy(out, failed)
            raise NotebookError(f"{name}: {e.ename}: {e.evalue}\n(as far as it ran: {failed})") from None
        done = tidy(json.loads(out.read_text(encoding="utf-8")))
        atomic_write(executed, (json.dumps(done, indent=1, ensure_ascii=False) + "\n").encode())


class Kernel(AsyncKernelManager):
    """The kernel of one notebook, of a class of its own: its process writes what it says into a file, and can be ended
    from another thread."""

    said: ClassVar[Path]
    process: ClassVar[Optional[subprocess.Popen]] = None

    async def start_kernel(self, **given) -> None:
        with open(self.said, "wb") as said:
            await super().start_kernel(stderr=said, **given)
        type(self).process = self.provisioner.process

    @classmethod
    def end(cls) -> None:
        """End the process, if it has been started."""
        if cls.process is not None:
            cls.process.kill()

    @classmethod
    def last_words(cls) -> str:
        """The last line that the process wrote, to be added to a message."""
        lines = cls.said.read_text(encoding="utf-8", errors="replace").splitlines() if cls.said.exists() else []
        said = [line.strip() for line in lines if line.strip()]
        return f" ({said[-1]})" if said else ""


def _execute(kernel: type[Kernel], notebook: Path, out: Path, values: dict) -> None:
    """Run a notebook in a thread of its own: Ctrl-C in its event loop would leave tasks that complain at length."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            papermill.execute_notebook,
            _literal(notebook),
            _literal(out),
            parameters=values,
            kernel_name="nla",
            kernel_manager_class=kernel,
            progress_bar=False,
            cwd=ROOT,
            # A kernel that is stopped with its command says so at length, as an error.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )
        try:
            running.result()
        except KeyboardInterrupt:
            while not running.done():
                kernel.end()
                time.sleep(0.1)
            raise


@contextlib.contextmanager
def own_kernel(folder: Path) -> Iterator[type[Kernel]]:
    """A kernel of this environment, with nothing of the user's start-up files or display settings."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "env": {
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "IPYTHONDIR": str(folder / "ipython"),
            "PYTHONSTARTUP": "",
            "NLA_CACHE": str(cache_dir().resolve()),
        },
    }
    atomic_write(folder / "kernels" / "nla" / "kernel.json", json.dumps(spec).encode())
    before = os.environ.get("JUPYTER_PATH")
    os.environ["JUPYTER_PATH"] = str(folder)
    try:
        yield type("OwnKernel", (Kernel,), {"said": folder / "said"})
    finally:
        os.environ.pop("JUPYTER_PATH")
        if before is not None:
            os.environ["JUPYTER_PATH"] = before


def _literal(path: Path) -> str:
    """A path as papermill takes it: it reads braces as fields to fill in."""
    return str(path).replace("{", "{{").replace("}", "}}")


def parameters(config: RunConfig) -> dict:
    """Papermill parameters: only what differs from the notebooks' own defaults."""
    defaults = asdict(RunConfig())
    return {k: v for k, v in asdict(config).items() if v != defaults[k]}


def tidy(notebook: NotebookNode | dict) -> dict:
    """An executed notebook without progress-bar frames, machine paths or widget state."""
    notebook["metadata"].get("papermill", {}).pop("input_path", None)
    notebook["metadata"].get("papermill", {}).pop("output_path", None)
    notebook["metadata"].get("papermill", {}).pop("environment_variables", None)
    for cell in notebook["cells"]:
        kept = []
        for output in cell.get("outputs", []):
            if output["output_type"] == "stream":
                if output["name"] == "stderr":
                    continue
                output["text"] = "".join(output["text"]).replace(str(ROOT) + os.sep, "")
            kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    return dict(notebook)


class Ticker:
    """One line for a running notebook: the stage's own progress bar where there is one, and the time."""

    def __init__(self, label: str, mirror: Path):
        self.label, self.mirror = label, mirror
        self.terminal = sys.stderr.isatty()
        self.done = threading.Event()

    def __enter__(self) -> "Ticker":
        os.environ[MIRROR_VARIABLE] = str(self.mirror)
        self.started = time.monotonic()
        self.thread = threading.Thread(target=self._tick, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, error, _) -> None:
        self.done.set()
        self.thread.join()
        del os.environ[MIRROR_VARIABLE]
        if kind is KeyboardInterrupt:
            # The command says it, whatever it was at.
            error.args = (f"{self.label}: stopped after {self._elapsed()}",)
            print(end=self._clear(), file=sys.stderr)
        else:
            ending = "done" if kind is None else "failed"
            print(f"{self._clear()}{self.label}: {ending} in {self._elapsed()}", file=sys.stderr, flush=True)

    def _tick(self) -> None:
        while not self.done.wait(0.5 if self.terminal else 30):
            try:
                bar = self.mirror.read_text(encoding="utf-8", errors="replace")
            except OSError:
                bar = "starting"
            end = "" if self.terminal else "\n"
            print(f"{self._clear()}{self.label} [{self._elapsed()}] {bar}", end=end, file=sys.stderr, flush=True)

    def _elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}:{seconds:02d}"

    def _clear(self) -> str:
        return "\r\033[K" if self.terminal else ""


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
    Stage("01_extract_targets", (TARGETS,), "targets"),
    Stage("02_train_av", (BEST_AV,), "training", (1,)),
    Stage("03_ceilings", (CEILINGS, ABLATION), "oracle_ceiling", (1,)),
    Stage("04_centred_eval", (ROLLOUTS, PROBE, SOURCE_LOSS), "centered_eval", (1, 2, 3)),
    Stage("05_k_curve", (), "rerank_eval", (1, 2, 3, 4)),
    Stage("06_cross_backbone", (), None),
)
# Results whose notebooks add to the run's evidence.
EVIDENCED = (CEILING_FILE, EVALUATION_FILE)


def select_stages(first: int, last: int, beside: Sequence[Stage] = ()) -> list[Stage]:
    """The notebooks of §11 from one number to another, and those beside them; raises ``ConfigError``."""
    if not 1 <= first <= last <= len(STAGES):
        raise ConfigError(f"--from {first} --until {last}: choose 1 to {len(STAGES)}, from not after until")
    return [s for s in STAGES if first <= s.number <= last] + list(beside)


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
        print(
            f"the run writes up to {disk_of_run(config, d) / 1e9:.2f} GB; memory, weights included: {memory / 1e9:.1f} GB "
            f"and what torch takes for a batch"
        )


def _require_results(folder: RunFolder) -> None:
    """The run's own, or those that the repository keeps of a run of the same name."""
    kept = COMMITTED / folder.backbone / folder.path.name
    if not any(load_results(place) for place in (folder.path, kept)):
        raise ArtefactError(
            f"neither {folder.path} nor paper/results has all results of this run; start with --from 01"
        )


def _require_artefacts(folder: RunFolder, stages: Sequence[Stage]) -> None:
    """What there is loads, and what the chosen stages need and do not make themselves is there."""
    made = {stage.number for stage in stages}
    needed = {number for stage in stages for number in stage.needs} - made
    for stage in [*STAGES, *(s for s in stages if s not in STAGES)]:
        present = [name for name in stage.artefacts if folder.has(name)]
        for name in present:
            folder.load(name)
        if len(present) < len(stage.artefacts) and stage.number in needed:
            raise ArtefactError(f"{folder.path} lacks what {stage.name} makes; start with --from {stage.number:02d}")


def reproduce(
    configs: Sequence[RunConfig], finish: Callable[[RunFolder], None], stages: Sequence[Stage] = STAGES
) -> None:
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
    its own: of the runs of a sweep no notebooks are kept."""
    for path in [*sorted(folder.file("results").glob("*.json")), *folder.path.glob(FILE)]:
        atomic_write(COMMITTED / folder.backbone / folder.path.name / path.name, path.read_bytes())
    if (folder.config.layer, folder.config.seed) != (None, 1):
        return
    executed = ROOT / "notebooks" / "executed" / folder.backbone / folder.path.name
    for path in sorted(folder.file("executed").glob("0?_*.ipynb")):
        if not path.name.endswith(".failed.ipynb"):
            atomic_write(executed / path.name, path.read_bytes())
