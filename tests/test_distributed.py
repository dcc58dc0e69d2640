"""Two processes on one run leave the artefacts that one process leaves."""

import os
import socket
import subprocess
import sys

import golden
import numpy as np
import pytest
import warm
from safetensors.numpy import load_file

from nla_utils.config import ROOT
from nla_utils.store import read_json

LAUNCHER = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
    "--main_process_port",
    "0",
]


def command(backbone, out):
    given = ["--backbone", str(backbone), "--out", str(out), *golden.OPTIONS]
    return ["-m", "nla_extensions.cli", "distribute", *given]


# One thread on either side: sums are then made in one order.
ENVIRONMENT = {**os.environ, **warm.ENVIRONMENT, "PYTHONPATH": str(ROOT)}


def launched(backbone, out):
    """By two processes that accelerate's launcher starts."""
    words = [sys.executable, *LAUNCHER, *command(backbone, out)]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return out / "tiny-llama" / "smoke"


def side_by_side(n, backbone, out):
    """By n processes, with what a launcher tells each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n}
    group = {name: str(value) for name, value in group.items()}
    started = [
        warm.Popen(
            [sys.executable, *command(backbone, out)],
            env=ENVIRONMENT | (group | {"RANK": str(i), "LOCAL_RANK": str(i)} if n > 1 else {}),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(n)
    ]
    for process in started:
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said[-4000:]
    return out / "tiny-llama" / "smoke"


@pytest.fixture(scope="module")
def folders(tiny_folders, tmp_path_factory):
    """(one process, two processes, two processes from the first one's AV on)."""
    root, backbone = tmp_path_factory.mktemp("parallel"), tiny_folders["tiny-llama"]
    one = side_by_side(1, backbone, root / "one")
    two = launched(backbone, root / "two")
    given = root / "given" / one.relative_to(root / "one")
    given.mkdir(parents=True)
    for name in ("targets", "best_av"):
        for end in (".safetensors", ".safetensors.json"):
            (given / (name + end)).write_bytes((one / (name + end)).read_bytes())
    return one, two, side_by_side(2, backbone, root / "given")


@pytest.mark.parametrize("name", ["targets", "ceilings"])
def test_targets_and_ceilings_are_the_same_bytes(folders, name):
    one, two, _ = folders
    assert (one / f"{name}.safetensors").read_bytes() == (two / f"{name}.safetensors").read_bytes()


def test_training_agrees_within_float_tolerance(folders):
    one, two, _ = folders
    a, b = (read_json(f / "best_av.safetensors.json") for f in (one, two))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    assert a["best_step"] == b["best_step"]
    theirs, ours = (load_file(f / "best_av.safetensors") for f in (one, two))
    for name in theirs:
        np.testing.assert_allclose(theirs[name], ours[name], atol=2e-5)


def test_rollouts_of_one_verbalizer_are_the_same_bytes(folders):
    one, _, given = folders
    assert (one / "rollouts.safetensors").read_bytes() == (given / "rollouts.safetensors").read_bytes()


def test_nothing_unfinished_is_left(folders):
    for folder in folders:
        assert not list(folder.glob("*.chunks")) and not list(folder.glob("*.partial*"))
