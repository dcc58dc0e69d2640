"""Inputs and surroundings that users have been seen to come with: each works, or is refused by name."""

import json
import os
import shutil
import subprocess
import sys

import filelock
import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import tiny_config

from nla_extensions.cli import BESIDE, app
from nla_utils import notebooks
from nla_utils.config import ROOT, RunConfig
from nla_utils.errors import ConfigError
from nla_utils.lm.loading import pick_device
from nla_utils.lm.weights import resolve
from nla_utils.notebooks import STAGES
from nla_utils.run import open_run
from nla_utils.store import ChunkStore

OPTIONS = ["--profile", "smoke", "--dtype", "float32"]


# Devices and other options


def test_a_numbered_device_is_the_device(tiny_folders, tmp_path):
    config = tiny_config(tiny_folders["tiny-llama"], tmp_path, device="cpu:0")
    assert open_run(config, weights=False).folder == open_run(config).folder
    assert open_run(config).folder.device == "cpu"


@pytest.mark.parametrize(
    "device, message",
    [("gpu", "is none of auto, cpu"), ("cuda:x", "is none of auto"), ("cpu:1", "this machine has 1 of cpu")],
)
def test_a_device_that_is_not_there_is_refused_before_any_notebook_runs(tiny_folders, tmp_path, device, message):
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), "--out", str(tmp_path / "out"), *OPTIONS]
    result = CliRunner().invoke(app, [*command, "--device", device])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError):
        pick_device(RunConfig(device=device).device)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"out": 2026}, "out is 2026; it must be text"),
        ({"layer": 9.0}, "layer is 9.0; it must be a whole number"),
        ({"seed": "abc"}, "seed is 'abc'"),
        ({"seed": True}, "seed is True"),
        ({"backbone": None}, "backbone is None"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"av": 3}, "av is 3"),
    ],
)
def test_what_papermill_reads_as_another_kind_of_value_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_notebook(values)


# Surroundings: display, start-up files, kernels, locale, odd paths


def test_notebooks_need_nothing_of_the_shell_and_bring_their_own_kernel(tiny_folders, tmp_path):
    home = tmp_path / "home {of} a user"
    (home / "ipython" / "profile_default" / "startup").mkdir(parents=True)
    (home / "ipython" / "profile_default" / "startup" / "00.py").write_text(
        "raise SystemExit('user start-up file ran')"
    )
    (home / "jupyter" / "kernels" / "python3").mkdir(parents=True)
    foreign = {"argv": ["false"], "display_name": "x", "language": "python"}
    (home / "jupyter" / "kernels" / "python3" / "kernel.json").write_text(json.dumps(foreign))
    backbone = shutil.copytree(tiny_folders["tiny-llama"], home / "a backbone")
    environment = {
        **os.environ,
        "MPLBACKEND": "agg",
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_PATH": str(home / "jupyter"),
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(home),
    }
    command = ["reproduce", "--backbone", str(backbone), "--out", str(home / "runs"), *OPTIONS, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "nla_extensions.cli", *command, "--until", "1"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    executed = nbformat.read(home / "runs" / "a backbone" / "smoke" / "executed" / "01_extract_targets.ipynb", 4)
    pictures = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}]
)
def test_pages_are_the_same_bytes_under_every_locale(tmp_path, locale):
    program = (
        "import sys, pathlib; from nla_utils.report.pages import section_page; "
        "section_page().write(pathlib.Path(sys.argv[1]) / 's.md', pathlib.Path(sys.argv[1]) / 'f')"
    )
    environment = {**os.environ, **locale, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    assert "‖μ‖" in (tmp_path / "s.md").read_text(encoding="utf-8")


# Runs that would share a folder


def test_two_revisions_of_a_repository_are_two_backbones():
    names = {
        resolve(f"org/model{revision}").name for revision in ("", "@step1000", "@step143000", "@refs/pr/2", "@v1.0")
    }
    assert len(names) == 5 and all("/" not in name for name in names)
    assert resolve("google/gemma-2-2b@abc").name != resolve("google/gemma-2-2b").name == "gemma2-2b"


def test_two_folders_of_one_name_are_refused(tiny_folders, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(tiny_folders["tiny-llama"], tmp_path / place / "model")
    chosen = [x for place in ("a", "b") for x in ("--backbone", str(tmp_path / place / "model"))]
    result = CliRunner().invoke(
        app, ["reproduce", *chosen, "--out", str(tmp_path / "out"), *OPTIONS, "--device", "cpu"]
    )
    assert result.exit_code == 2 and "would both write into" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_two_at_once_in_one_folder_are_refused_and_a_crash_leaves_no_lock(tiny_folders, tmp_path, monkeypatch):
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), "--out", str(tmp_path), *OPTIONS]
    command += ["--device", "cpu", "--until", "1"]
    folder = tmp_path / "tiny-llama" / "smoke"
    folder.mkdir(parents=True)
    monkeypatch.setattr(notebooks, "run_notebook", lambda *_: None)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
            "print(1, flush=True); time.sleep(60)",
            str(folder / "run.lock"),
        ],
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "another process is at work in" in " ".join(refused.output.split())
    holder.kill()
    holder.wait()
    assert CliRunner().invoke(app, command).exit_code == 0
    with filelock.FileLock(folder / "run.lock", timeout=0):
        pass


# Files that were altered


def test_a_flipped_bit_in_a_chunk_counts_as_unfinished(tmp_path):
    chunks = ChunkStore(tmp_path / "c", {})
    chunks.put(0, {"x": np.arange(100.0), "y": np.zeros(3)})
    path = tmp_path / "c" / "000000.safetensors"
    complete = path.read_bytes()
    assert chunks.get(0) is not None
    for position in range(len(complete) - 824, len(complete), 97):
        path.write_bytes(complete[:position] + bytes([complete[position] ^ 4]) + complete[position + 1 :])
        assert chunks.get(0) is None
    path.write_bytes(complete)
    assert (chunks.get(0)["x"] == np.arange(100.0)).all()


# Makefile, and a copy that is installed


def test_make_notices_that_the_checkout_was_moved(tmp_path):
    (tmp_path / ".venv").mkdir()
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text("")
    (tmp_path / ".venv" / ".installed").write_text("/elsewhere\n")
    done = subprocess.run(["make", "env"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "was made in /elsewhere" in done.stdout + done.stderr


def test_an_installed_copy_brings_notebooks_and_bundles_and_works_where_it_is_used(tiny_folders, tmp_path):
    source, there = tmp_path / "source", tmp_path / "site"
    kept = ("nla_utils", "nla_extensions", "notebooks/extensions", "bundles", "paper/published")
    for name in kept:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (
        *(ROOT / "notebooks").glob("0*.ipynb"),
        ROOT / "pyproject.toml",
        ROOT / "setup.py",
        ROOT / "README.md",
    ):
        shutil.copy(path, source / path.relative_to(ROOT))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        str(there),
    ]
    subprocess.run([*pip, str(source)], check=True)
    work = tmp_path / "work"
    work.mkdir()

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(there)}
        return subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True)

    program = "from nla_extensions.release.bundle import Bundle; print(Bundle.layer_of('gemma3-270m', None))"
    assert run(sys.executable, "-c", program).stdout.strip() == "13"
    nla = [sys.executable, "-m", "nla_extensions.cli"]
    assert run(*nla, "--version").returncode == 0
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), *OPTIONS, "--device", "cpu", "--until", "1"]
    done = run(*nla, *command)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert (work / "runs" / "tiny-llama" / "smoke" / "executed" / "01_extract_targets.ipynb").exists()


def test_every_notebook_is_a_stage():
    assert {s.number for s in (*STAGES, *(stage() for stage in BESIDE.values()))} == set(range(1, 9))
