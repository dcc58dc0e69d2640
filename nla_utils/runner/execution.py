"""One notebook through papermill: a kernel of this environment, one line of progress, the executed copy tidied."""

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
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Iterator, Optional

import papermill
from jupyter_client import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from nla_utils.artefacts import RunFolder, atomic_write
from nla_utils.config import DATA, ROOT, RunConfig, cache_dir
from nla_utils.errors import NotebookError
from nla_utils.progress import MIRROR_VARIABLE


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
            papermill.execute_notebook, _literal(notebook), _literal(out), parameters=values, kernel_name="nla",
            kernel_manager_class=kernel, progress_bar=False, cwd=ROOT,
            # A kernel that is stopped with its command says so at length, as an error.
            extra_arguments=["--IPKernelApp.log_level=CRITICAL"],
        )  # fmt: skip
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
        "display_name": "Python 3", "language": "python",
        "env": {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "IPYTHONDIR": str(folder / "ipython"),
                "PYTHONSTARTUP": "", "NLA_CACHE": str(cache_dir().resolve())},
    }  # fmt: skip
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
