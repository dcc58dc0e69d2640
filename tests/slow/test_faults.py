"""One failing call at a time: whatever the file system or the hub refuses ends in one line, and the next start in the
undisturbed bytes.

The stages of a smoke run are functions in this process, called by the whole ``nla reproduce`` in the place of their
notebooks. A first run counts the calls; 200 of them, drawn with a seed, then fail, each in a run of its own.
``make faults`` lets every call fail in every way.
"""

import builtins
import collections
import errno
import fcntl
import functools
import importlib
import io
import os
import random
import threading
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import golden
import huggingface_hub
import pytest
from click.testing import CliRunner
from conftest import build_backbone, tiny_config
from hub_server import Hub

from nla_extensions.cli import app
from nla_utils import notebooks, training
from nla_utils import store as artefacts
from nla_utils import targets as stage_targets
from nla_utils.baselines import load_ceilings, make_ceilings, make_probe
from nla_utils.evidence import keep, of_ceilings, of_rollouts
from nla_utils.run import open_run
from nla_utils.scores import centered_eval, oracle_ceiling
from nla_utils.store import ChunkStore, atomic_write
from nla_utils.targets import load_targets, make_targets
from nla_utils.verbalizer import make_rollouts, make_source_loss

NLA = app
POINTS = int(os.environ.get("NLA_FAULT_POINTS", 200))
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE)
SIZES = dict(n_targets=40, n_eval=4, pool_size=16, n_rollouts=2)
OPTIONS = [*golden.OPTIONS]
OPTIONS += [word for name, size in SIZES.items() for word in ("--set", f"{name}={size}")]
WAY_ON = ("run the same command again", "rerun", "start again", "wait for it", "check the network")


@dataclass
class Calls:
    """The calls that reach what is under ``root``, in order; number ``failing`` of them is refused with ``error``."""

    root: Path
    seen: list = field(default_factory=list)
    on: bool = False
    failing: int | None = None
    error: int = 0
    transport: types.ModuleType | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def __call__(self, kind: str, where) -> None:
        if not self.on:
            return
        if isinstance(where, int):
            where = os.readlink(f"/proc/self/fd/{where}")
        where = os.fsdecode(where)
        if not where.startswith(str(self.root)) and kind != "hub request":
            return
        with self.lock:
            self.seen.append(kind)
            if len(self.seen) - 1 != self.failing:
                return
        said = os.strerror(self.error)
        raise self.transport.ConnectError(said) if kind == "hub request" else OSError(self.error, said, where)

    def watch(self, monkeypatch, owner, name: str, kind: str) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def watched(where, *rest, **named):
            self(kind, where)
            return original(where, *rest, **named)

        monkeypatch.setattr(owner, name, watched)


def first(run):
    targets = make_targets(run)
    run.write_results("targets", stage_targets.describe(run, targets), {"targets": targets.sha256})


def second(run):
    targets = load_targets(run)
    sidecar = training.train_av(run, targets)
    made_from = {"targets": targets.sha256, "best_av": sidecar["sha256"]}
    run.write_results("training", training.describe(sidecar, targets), made_from)


def third(run):
    targets = load_targets(run)
    ceilings = make_ceilings(run, targets)
    made_from = {name: run.folder.sha256_of(name) for name in ("targets", "ceilings")}
    compared = of_ceilings(targets, ceilings, run.config.sizes.n_rollouts)
    run.write_results("oracle_ceiling", oracle_ceiling(keep(run, "oracle_ceiling", compared, made_from)), made_from)


def fourth(run):
    targets, ceilings = load_targets(run), load_ceilings(run)
    rollouts, probe = make_rollouts(run, targets), make_probe(run, targets)
    loss = make_source_loss(run, targets)
    made_from = {name: run.folder.sha256_of(name) for name in ("rollouts", "probe", "source_loss")}
    compared = of_rollouts(targets, rollouts, ceilings, probe, loss, run.backbone.spec.ceiling)
    run.write_results("centered_eval", centered_eval(keep(run, "centered_eval", compared, made_from)), made_from)


FUNCTIONS = {"01": first, "02": second, "03": third, "04": fourth}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    calls = Calls(tmp_path)
    for owner in (builtins, io, os):
        calls.watch(monkeypatch, owner, "open", "open")
    monkeypatch.setattr(os, "fsync", lambda _: None)
    calls.watch(monkeypatch, os, "fsync", "write")
    calls.watch(monkeypatch, os, "replace", "rename")
    calls.watch(monkeypatch, os, "mkdir", "mkdir")
    flock = fcntl.flock

    def locked(file, how):
        # Of this process, which goes on, a lock that is not let go of would stay.
        if not how & fcntl.LOCK_UN:
            calls("flock", file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", locked)
    client = type(huggingface_hub.utils.get_session())
    calls.transport = importlib.import_module(client.__module__.partition(".")[0])
    send = client.send

    def asked(session, request, **named):
        calls("hub request", str(request.url))
        return send(session, request, **named)

    monkeypatch.setattr(client, "send", asked)
    # The same chunk is computed once, and the same second is written.
    monkeypatch.setattr(artefacts.time, "strftime", lambda *_: "then")
    fill, made = ChunkStore.fill, {}

    def remembered(store, total, per_chunk, make, *shown):
        def once(rows):
            key = store.folder.name, rows.start
            if key not in made:
                made[key] = make(rows)
            return made[key]

        return fill(store, total, per_chunk, once, *shown)

    monkeypatch.setattr(ChunkStore, "fill", remembered)
    return calls


def files(root):
    """Bytes by path, without locks, and without the hub client's own records."""
    kept = (
        p for p in root.rglob("*") if p.is_file() and ".lock" not in p.name and p.parent.name not in ("trees", "refs")
    )
    return {p.relative_to(root): p.read_bytes() for p in kept}


def start(command, calls, failing=None, error=0):
    """The outcome of a command of which one call fails, and the kinds of its calls."""
    calls.seen, calls.failing, calls.error, calls.on = [], failing, error, True
    try:
        return CliRunner().invoke(NLA, command), calls.seen
    finally:
        calls.on = False


def complaints(outcome, root):
    """What is wrong with the end of a command, if anything."""
    if not isinstance(outcome.exception, SystemExit) or outcome.exit_code != 2:
        return [f"a traceback: {outcome.exception!r}"]
    said = outcome.stderr[outcome.stderr.index("error: ") :].rstrip("\n")
    wrong = {
        "more than one line": "\n" in said,
        "no path": str(root) not in said and "org/tiny" not in said,
        "no way on": not any(words in said for words in WAY_ON),
    }
    return [f"{name}: {said}" for name, found in wrong.items() if found]


@pytest.fixture
def stages(tmp_path, monkeypatch, calls):
    """By name: the command, the folder that it fills, and a copy of that folder as it was before."""
    backbone = build_backbone(tmp_path / "tiny", "llama", "right", False, True)
    run = open_run(tiny_config(backbone, tmp_path / "out", **SIZES))
    folder = tmp_path / "out" / "tiny"

    def in_process(config, _, notebook, label):
        if notebook[:2] in FUNCTIONS and config.backbone == str(backbone):
            FUNCTIONS[notebook[:2]](run)
        atomic_write(run.folder.file(f"executed/{notebook}.ipynb"), b"{}")

    monkeypatch.setattr(notebooks, "run_notebook", in_process)
    hub, cache = Hub(), tmp_path / "cache"
    hub.files["org/tiny"] = {p.name: p.read_bytes() for p in backbone.iterdir()}
    endpoint = hub.start()
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    # Its client asks again before it gives up, after seconds.
    monkeypatch.setattr("huggingface_hub.utils._http.time", types.SimpleNamespace(sleep=lambda _: None, time=time.time))
    monkeypatch.setenv("NLA_CACHE", str(cache))
    commit = hub.commit("org/tiny")
    out = ["--out", str(tmp_path / "out"), *OPTIONS]
    from_hub = ["reproduce", "--backbone", f"org/tiny@{commit}", *out, "--until", "1"]
    own = ["reproduce", "--backbone", str(backbone), *out]
    yield {"hub": (from_hub, cache)} | {n: ([*own, "--from", n, "--until", n], folder) for n in FUNCTIONS}
    hub.server.shutdown()


def test_any_call_may_fail(stages, calls, tmp_path):
    points, before, after = [], {}, {}
    for name, (command, folder) in stages.items():
        folder.mkdir(parents=True, exist_ok=True)
        before[name] = set(folder.rglob("*"))
        outcome, seen = start(command, calls)
        assert outcome.exit_code == 0, outcome.output
        after[name] = files(folder)
        points += [(name, i, kind) for i, kind in enumerate(seen)]
    every = [(*point, error) for point in points for error in ERRORS]
    drawn = random.Random(39).sample(every, min(POINTS, len(every)))
    ended, kinds, wrong = collections.Counter(), collections.Counter(), []
    # Stage by stage: each begins where the one before it ended.
    for name, i, kind, error in sorted(drawn, key=lambda point: list(stages).index(point[0])):
        command, folder = stages[name]
        for path in sorted(set(folder.rglob("*")) - before[name], reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        outcome, _ = start(command, calls, i, error)
        found = complaints(outcome, tmp_path) if outcome.exit_code else []
        again, _ = start(command, calls)
        found += [f"the next start fails: {again.stderr} {again.exception!r}"] if again.exit_code else []
        left = files(folder)
        other = sorted(
            str(path) for path in left.keys() | after[name].keys() if left.get(path) != after[name].get(path)
        )
        found += [f"other bytes in the end: {other}"] if other else []
        wrong += [f"{name}, call {i} ({kind}), {errno.errorcode[error]}: {w}" for w in found]
        ended[outcome.exit_code] += 1
        kinds[kind] += 1
    print(f"\n{len(points)} calls; {len(drawn)} refused: {dict(ended)} by status, {dict(kinds)} by kind")
    assert not wrong, "\n".join(wrong)
    assert set(kinds) == {"open", "write", "rename", "mkdir", "flock", "hub request"}
