"""Processes that need not import torch and transformers again: forked from one that has.

``Popen`` and ``run`` take what their namesakes of ``subprocess`` take and start a real process, with its own id,
session, environment, folder and exit status, that can be killed; notebooks' kernels are started so too
(``conftest.py``). The two packages themselves are imported anew in each. What a new interpreter alone can show
(start-up, locales, other libraries) is run by ``subprocess`` in ``test_as_users_run_it.py``, ``test_notebooks.py`` and
``test_batch.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Read by libraries when they are loaded, so alike for all: one thread, sums in one order on every x86 with AVX2.
ENVIRONMENT = {
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Haswell",
}
SOCKET = "NLA_WARM_SOCKET"
# A folder of committed results that runs are set beside, instead of all: drawing those is most of a tiny run's time.
FEW = "NLA_TESTS_COMMITTED"
OWN = ("nla_utils", "nla_extensions")
# Whatever a stage of a tiny backbone loads, and what runs notebooks.
LOADED = """
nla_extensions.cli nla_extensions.training_study nla_extensions.release.api nla_extensions.tail_reader.page
nla_extensions.depth.page nla_extensions.comparison.page nla_utils.notebooks nla_utils.report.pages accelerate
ipykernel.kernelapp ipykernel.ipkernel ipykernel.zmqshell
transformers.models.gemma2.modeling_gemma2 transformers.models.gemma3.modeling_gemma3
transformers.models.llama.modeling_llama transformers.models.qwen2.modeling_qwen2
""".split()


class Popen(subprocess.Popen):
    """A process of this interpreter; its arguments begin with ``sys.executable``."""

    def _execute_child(self, args, *given) -> None:
        names = "executable preexec_fn close_fds pass_fds cwd env startupinfo creationflags shell p2cread p2cwrite "
        names += "c2pread c2pwrite errread errwrite restore_signals gid gids uid umask start_new_session"
        how = dict(zip(names.split(), given))
        assert args[0] == sys.executable and not any(how[name] for name in ("preexec_fn", "pass_fds", "shell"))
        asked = {
            "words": [str(word) for word in args[1:]],
            "folder": str(how["cwd"] or os.getcwd()),
            "environment": {name: str(value) for name, value in (how["env"] or os.environ).items()},
            "session": how["start_new_session"],
        }
        self.line = socket.socket(socket.AF_UNIX)
        self.line.connect(_server())
        ends = [how[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        socket.send_fds(self.line, [b"\n"], [own if end == -1 else end for own, end in enumerate(ends)])
        self.line.sendall(json.dumps(asked).encode() + b"\n")
        self.heard = self.line.makefile("r")
        self.pid = int(self.heard.readline())
        self._child_created = True
        self._close_pipe_fds(*(how[f"{pipe}{end}"] for pipe in ("p2c", "c2p", "err") for end in ("read", "write")))

    def _try_wait(self, wait_flags):
        if wait_flags & os.WNOHANG and not select.select([self.line], [], [], 0)[0]:
            return 0, 0
        return self.pid, int(self.heard.readline())

    def _internal_poll(self, _deadstate=None, **_):
        with self._waitpid_lock:
            if self.returncode is None:
                pid, status = self._try_wait(os.WNOHANG)
                if pid == self.pid:
                    self._handle_exitstatus(status)
        return self.returncode


def run(args, **named) -> subprocess.CompletedProcess:
    """``subprocess.run`` with what is written captured as text."""
    with Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **named) as p:
        said = p.communicate()
    return subprocess.CompletedProcess(args, p.returncode, *said)


def start_kernels() -> None:
    """Notebooks' kernels of this process begin warm, where they are of this interpreter."""
    from jupyter_client import launcher

    own = sys.executable
    launcher.Popen = lambda args, **named: (Popen if args[0] == own else subprocess.Popen)(args, **named)


@functools.cache
def _server() -> str:
    """The socket of the process that starts others; it ends with the one that first asked for it."""
    if SOCKET not in os.environ:
        path = Path(tempfile.mkdtemp(prefix="warm-")) / "socket"
        environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, str(path)]
        process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, start_new_session=True)
        atexit.register(process.communicate)
        while not path.exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.environ[SOCKET] = str(path)
    return os.environ[SOCKET]


def _serve(path: Path) -> dict:
    """Fork for every request; returns in the process that was asked for, with what it is to run."""
    for name in LOADED:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.partition(".")[0] in OWN]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    door = socket.socket(socket.AF_UNIX)
    door.bind(f"{path}.new")
    door.listen(64)
    signal.signal(signal.SIGCHLD, _reap)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.rename(f"{path}.new", path)
    while sys.stdin not in select.select([door, sys.stdin], [], [])[0]:
        line, _ = door.accept()
        if not os.fork():
            door.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return _keep(line)
        line.close()
    path.unlink()
    path.parent.rmdir()
    sys.exit()


def _reap(*_) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _keep(line: socket.socket) -> dict:
    """Fork once more; this one tells the asker id and status of that, and ends when the asker does."""
    ends = socket.recv_fds(line, 1, 3)[1]
    with line.makefile("r") as heard:
        asked = json.loads(heard.readline())
    ready, begun = os.pipe()
    pid = os.fork()
    if not pid:
        line.close()
        # Its asker may ask for its group at once.
        if asked.pop("session"):
            os.setsid()
        os.write(begun, b"1")
        for own, end in enumerate(ends):
            os.dup2(end, own)
        os.closerange(3, max(begun, *ends) + 1)
        return asked
    os.read(ready, 1)
    for end in (0, 1, 2, *ends):
        os.close(end)
    line.sendall(f"{pid}\n".encode())
    if line in select.select([os.pidfd_open(pid), line], [], [])[0]:
        os._exit(0)
    line.sendall(f"{os.waitpid(pid, 0)[1]}\n".encode())
    os._exit(0)


def _become(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """Make this process what a new interpreter of these arguments would be."""
    os.chdir(folder)
    if "JPY_PARENT_PID" in environment:
        environment["JPY_PARENT_PID"] = str(os.getppid())
    different = [n for n in ENVIRONMENT if n != "MPLBACKEND" and environment.get(n, ENVIRONMENT[n]) != ENVIRONMENT[n]]
    assert not different, f"{different} are read when libraries are loaded: start this with subprocess"
    os.environ.clear()
    os.environ.update(environment, **{SOCKET: sys.argv[1]})
    importlib.reload(sys.modules["huggingface_hub.constants"])
    sys.modules["matplotlib"].rcParams["backend"] = environment.get("MPLBACKEND", "agg")
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    sys.path[:] = [*paths, *(p for p in sys.path if p not in (str(ROOT), str(ROOT / "tests")))]
    sys.path.insert(0, folder if words[0] in ("-m", "-c") else str(Path(words[0]).parent))
    for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}.items():
        signal.signal(number, handler)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    if FEW in environment:
        importlib.import_module("nla_utils.report.results").COMMITTED = Path(environment[FEW])
    start_kernels()


def _run(words: list[str]) -> None:
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _end(status: int) -> None:
    """As an interpreter ends, without taking everything apart."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    asked = _serve(Path(sys.argv[1]))
    status = 0
    try:
        _become(**asked)
        _run(asked["words"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if status and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    _end(status)
