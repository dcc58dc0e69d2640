"""Machines that die, disks that fill up, files that are altered: nothing is lost, and nothing wrong is taken for right."""

import collections
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import golden
import pytest
import torch
import warm
from conftest import tiny_config, with_out

from nla_extensions.release import bundle as bundles
from nla_utils import store as artefacts
from nla_utils.config import ROOT
from nla_utils.errors import ArtefactError, NLAError
from nla_utils.run import open_run
from nla_utils.store import ChunkStore, arrays_hash, json_hash
from nla_utils.targets import make_targets, read_released
from nla_utils.training import train_av
from nla_utils.verbalizer import import_av, make_rollouts

# Kills while each notebook runs that leaves anything but pages.
KILLS = {1: 4, 2: 4, 3: 4, 4: 5, 5: 3}


def left(folder):
    """What a run of §11 leaves, provenance aside."""
    names = ("targets", "best_av", "ceilings", "rollouts", "probe")
    arrays = {name: (folder / f"{name}.safetensors").read_bytes() for name in names}
    results = ("targets", "training", "oracle_ceiling", "centered_eval", "rerank_eval")
    found = golden.results_of(folder)
    return arrays, {name: found[name] for name in results}


def test_a_run_that_is_killed_twenty_times_ends_as_if_it_never_was(reproduced_tiny, tiny_folders, tmp_path):
    undisturbed = left(reproduced_tiny("tiny-llama")[2])
    command = [
        sys.executable,
        "-m",
        "nla_extensions.cli",
        *golden.reproduce_command(tiny_folders["tiny-llama"], tmp_path)[:-2],
    ]
    environment = {**os.environ, **warm.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    folder, rng = tmp_path / "tiny-llama" / "smoke", random.Random(7)
    for number in (n for n, times in KILLS.items() for _ in range(times)):
        run = warm.Popen(
            command,
            env=environment,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        before = f"0{number - 1}_"
        while number > 1 and not any(p.name.startswith(before) for p in folder.glob("executed/*.ipynb")):
            assert run.poll() is None, run.stderr.read().decode()[-2000:]
            time.sleep(0.05)
        # The last one is short, and the run ends with it.
        time.sleep(rng.uniform(0.1, 1.5 if number < 5 else 0.7))
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
    done = warm.run(command, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    arrays, results = left(folder)
    assert arrays == undisturbed[0] and results == undisturbed[1]
    assert not list(folder.glob("*.chunks")) and not list(folder.glob("training.partial*"))


# Disk full


def limited(size, backbone, out):
    """The heavy part of notebooks 01-04 where no file may grow beyond ``size`` bytes."""
    given = ["distribute", "--backbone", str(backbone), "--out", str(out), *golden.OPTIONS]
    program = (
        "import resource, signal, sys; from nla_extensions.cli import app\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
        "app(sys.argv[1:])"
    )
    environment = {**os.environ, **warm.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    return warm.run([sys.executable, "-c", program, *given], env=environment, cwd=ROOT)


def test_a_full_disk_is_said_and_gone_on_from(reproduced_tiny, tiny_folders, tmp_path):
    undisturbed = reproduced_tiny("tiny-llama")[2]
    folder, names = tmp_path / "tiny-llama" / "smoke", ("targets", "ceilings", "rollouts")
    for name in names:
        done = limited((undisturbed / f"{name}.safetensors").stat().st_size - 1, tiny_folders["tiny-llama"], tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
        assert name in done.stderr and "make room" in done.stderr, done.stderr
        assert not list(tmp_path.rglob("*.partial"))
        # The stages before the next one, which may have larger files than its limit allows.
        for done_by_then in ("targets", "best_av", "ceilings")[: 1 + 2 * names.index(name)]:
            for path in undisturbed.glob(f"{done_by_then}.safetensors*"):
                shutil.copy(path, folder)
    assert limited(resource.RLIM_INFINITY, tiny_folders["tiny-llama"], tmp_path).returncode == 0
    for name in names:
        assert (folder / f"{name}.safetensors").read_bytes() == (undisturbed / f"{name}.safetensors").read_bytes()


def test_a_disk_that_fills_up_in_training_loses_no_step_that_was_kept(tiny_folders, tmp_path, monkeypatch):
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path / "full"))
    targets, replace, kept = make_targets(run), os.replace, []

    def full(source, path):
        if "training.partial" in str(path):
            kept.append(path)
            if len(kept) == 2:
                raise OSError(28, "No space left on device")
        replace(source, path)

    monkeypatch.setattr(artefacts.os, "replace", full)
    with pytest.raises(ArtefactError, match="training.partial.safetensors could not be written .No space left"):
        train_av(run, targets)
    monkeypatch.setattr(artefacts.os, "replace", replace)
    sidecar = train_av(run, targets)
    whole = with_out(run, tmp_path / "whole")
    make_targets(whole)
    assert sidecar["loss"] == train_av(whole, targets)["loss"]


# Altered files

BY_KIND = {"truncated": 3, "flipped": 16, "emptied": 1, "swapped": 2, "directory": 1}


def altered(data, kind, rng, other):
    if kind == "truncated":
        return data[: rng.randrange(len(data))]
    if kind == "flipped":
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    return b"" if kind == "emptied" else other


def put(path, content):
    """Bytes, or ``None`` for a directory in the file's place."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


@pytest.fixture(scope="module")
def readers(tiny_folders, tmp_path_factory):
    """(file, another file of its kind, what reads it, kinds of alteration that have to be noticed)."""
    root = tmp_path_factory.mktemp("altered")
    weights = shutil.copytree(tiny_folders["tiny-llama"], root / "tiny-llama")
    run = open_run(tiny_config(weights, root))
    targets = make_targets(run)
    train_av(run, targets)
    make_rollouts(run, targets)
    run.write_results("targets", {"values": {str(k): k / 7 for k in range(40)}}, {"targets": targets.sha256})
    from nla_extensions.tail_reader.reader import fit_reader

    fit_reader(run, targets)
    bundles.write_bundle(run, root / "bundles" / run.backbone.name)
    (root / "released").mkdir()
    states = [run.backbone.hidden_at_layer(input_ids=torch.tensor([[2, *targets.sequence(i)]]))[0] for i in range(6)]
    ids = [torch.tensor([2, *targets.sequence(i)]) for i in range(6)]
    torch.save({"activations": states, "sequences": ids}, root / "released" / "t.pt")
    chunks = ChunkStore(root / "chunks", {"n": 1})
    for i in range(2):
        chunks.put(i, {"x": targets.v[i : i + 20]})

    def same_keys(record, keys):
        # A flip in the name of the hash's own key leaves every other entry as it was.
        return json_hash({key: record.get(key) for key in keys})

    def load(name):
        keys = list(run.folder.load(name).sidecar)

        def read():
            artefact = run.folder.load(name)
            return arrays_hash(artefact.tensors) + same_keys(artefact.sidecar, keys)

        return read

    def bundle():
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(bundles, "BUNDLES", root / "bundles")
            patched.setenv("NLA_CACHE", str(root / "cache"))
            found = bundles.load_bundle(run.backbone, None)
        return (
            arrays_hash({"mu": found.mu, "pool": found.pool_v}) + str(found.av.config) + str(found.av.proj.weight.sum())
        )

    def chunk():
        return arrays_hash(chunks.get(0) or {"x": targets.v[:20]})

    def weights_read():
        again = open_run(run.config)
        return arrays_hash(again.folder.load("targets").tensors)

    def released():
        return arrays_hash(read_released(root / "released" / "t.pt", run.backbone, 6)[0])

    folder, every = run.folder.path, tuple(BY_KIND)
    # Files from outside carry no hash: that a bit was flipped in them cannot be known.
    unhashed = ("truncated", "emptied", "directory")
    rows = [
        (folder / f"{n}.safetensors{end}", folder / f"best_av.safetensors{end}", load(n), every)
        for n in ("targets", "rollouts")
        for end in ("", ".json")
    ]
    rows += [
        (folder / f"best_av.safetensors{end}", folder / f"targets.safetensors{end}", load("best_av"), every)
        for end in ("", ".json")
    ]
    rows += [
        (
            folder / "results" / "targets.json",
            folder / "targets.safetensors.json",
            lambda keys=tuple(run.folder.read_results("targets")): same_keys(run.folder.read_results("targets"), keys),
            every,
        ),
        (chunks._file(0), chunks._file(1), chunk, ("truncated", "flipped", "emptied", "directory")),
        (weights / "model.safetensors", folder / "targets.safetensors", weights_read, every),
        (root / "released" / "t.pt", folder / "targets.safetensors", released, (*unhashed, "swapped")),
        (
            folder / "av" / "best_av.safetensors",
            folder / "targets.safetensors",
            lambda: str(import_av(folder / "av", run.backbone).proj.weight.sum()),
            (*unhashed, "swapped"),
        ),
        (
            folder / "av" / "config.json",
            folder / "av" / "best_av.pt",
            lambda: str(import_av(folder / "av", run.backbone).config),
            (*unhashed, "swapped"),
        ),
    ]
    return rows + [
        (root / "bundles" / run.backbone.name / name, folder / "best_av.safetensors", bundle, every)
        for name in (*bundles.FILES, "bundle.json")
    ]


def test_altered_files_are_refused_by_name_or_read_as_they_were(readers):
    rng, tried = random.Random(11), collections.Counter()
    for path, other, read, kinds in readers:
        expected, data = read(), path.read_bytes()
        rounds = 1 if "model.safetensors" in path.name or "bundles" in str(path) else 2
        for kind in kinds:
            for _ in range(rounds * BY_KIND[kind]):
                put(path, None if kind == "directory" else altered(data, kind, rng, other.read_bytes()))
                try:
                    assert read() == expected, f"{path.name}, {kind}: another result, and not a word about it"
                except NLAError as error:
                    said = str(error)
                    assert path.name in said or path.parent.name in said or "weight_hash" in said, (
                        path.name,
                        kind,
                        said,
                    )
                    tried["refused"] += 1
                tried[kind] += 1
                put(path, data)
        assert read() == expected
    assert sum(tried[k] for k in BY_KIND) >= 500, tried


def test_a_partial_state_of_training_that_was_altered_is_refused(tiny_folders, tmp_path, monkeypatch):
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path))
    targets = make_targets(run)
    monkeypatch.setattr("nla_utils.training.export_av", lambda *_: pytest.fail("not to be reached"))
    with pytest.raises(pytest.fail.Exception):
        train_av(run, targets)
    path = run.folder.file("training.partial.safetensors")
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArtefactError, match="training.partial.safetensors is truncated or altered"):
        train_av(run, targets)


def test_records_of_committed_runs_are_read_as_before():
    for path in (ROOT / "paper" / "results").rglob("*.json"):
        record = artefacts.read_record(path)
        assert record | {"record_sha256": ""} == json.loads(path.read_text(encoding="utf-8")) | {"record_sha256": ""}
