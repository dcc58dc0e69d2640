"""Batches: what runs they consist of, and the workflow itself, on local cores, cut off and gone on with."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from nla_utils.config import ROOT
from nla_utils.errors import ConfigError
from nla_utils.lm.weights import canonical_name

sys.path.insert(0, str(ROOT / "workflow"))
from batch import failures, runs_of, seconds  # noqa: E402

BATCH = {
    "out": "x",
    "profiles": ["smoke"],
    "seeds": [1],
    "backbones": {"gemma3-270m": None},
    "until": 6,
    "options": "",
    "threads": 1,
    "gpus": 0,
}


def test_a_batch_is_every_combination_once(tmp_path):
    batch = BATCH | {"backbones": {"gemma3-270m": [9, 13], "smollm2-135m": None}, "seeds": [1, 2]}
    runs = runs_of(batch, tmp_path)
    assert sorted(runs) == [
        "gemma3-270m/smoke",
        "gemma3-270m/smoke-layer9",
        "gemma3-270m/smoke-layer9-seed2",
        "gemma3-270m/smoke-seed2",
        "smollm2-135m/smoke",
        "smollm2-135m/smoke-seed2",
    ]
    assert "--layer" not in runs["gemma3-270m/smoke"].options, "13 is this backbone's own layer"
    assert "--layer 9" in runs["gemma3-270m/smoke-layer9-seed2"].options


def test_two_checkpoints_are_two_runs_and_two_folders_of_one_name_are_refused(tmp_path):
    names = {"org/model@step1000": None, "org/model@step143000": None}
    assert sorted(runs_of(BATCH | {"backbones": names}, tmp_path)) == [
        "org--model@step1000/smoke",
        "org--model@step143000/smoke",
    ]
    for place in ("a", "b"):
        (tmp_path / place / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match="would both be model"):
        runs_of(BATCH | {"backbones": {str(tmp_path / place / "model"): None for place in ("a", "b")}}, tmp_path)


def test_a_relative_folder_is_taken_from_the_repositorys_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run,) = runs_of(BATCH | {"backbones": {"paper/published": None}}, tmp_path).values()
    assert run.config.backbone == str(ROOT / "paper" / "published")


def test_a_registry_name_is_no_folder_of_the_output(tmp_path, monkeypatch):
    """The workflow runs where the runs lie, each below a folder named after its backbone."""
    (tmp_path / "gemma3-270m").mkdir()
    (tmp_path / "own").mkdir()
    monkeypatch.chdir(tmp_path)
    assert canonical_name("gemma3-270m") == "gemma3-270m" and canonical_name("own") == str(tmp_path / "own")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"layers": [1]}, "unknown key 'layers'"),
        ({"profiles": ["quik"]}, "did you mean 'quick'"),
        ({"backbones": {"gemma3": None}}, "did you mean .*'gemma3-270m'"),
    ],
)
def test_an_impossible_batch_is_refused(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        runs_of(BATCH | change, tmp_path)
    with pytest.raises(ConfigError, match="lacks threads"):
        runs_of({k: v for k, v in BATCH.items() if k != "threads"}, tmp_path)


def test_a_failed_run_is_named_with_its_last_words(tmp_path):
    runs = runs_of(BATCH, tmp_path)
    log = tmp_path / "gemma3-270m/smoke/logs/01_extract_targets.log"
    assert failures(runs, tmp_path, ["01_extract_targets"]) == {"gemma3-270m/smoke": "01_extract_targets was not begun"}
    log.parent.mkdir(parents=True)
    log.write_text("loading\nerror: no disk\n\n")
    (why,) = failures(runs, tmp_path, ["01_extract_targets"]).values()
    assert why.startswith("01_extract_targets: error: no disk")


def snakemake(config, *more):
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(ROOT / "workflow" / "Snakefile"),
        "--configfile",
        str(config),
        "--keep-going",
        "--rerun-incomplete",
        "--nolock",
        *more,
    ]
    where = {"env": {**os.environ, "PYTHONPATH": str(ROOT)}, "cwd": config.parent}
    return subprocess.Popen(command, **where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_cut_batch_goes_on_and_names_the_run_that_failed(tiny_folders, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_folders["tiny-llama"].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes(b"cut short")
    out, config = tmp_path / "out", tmp_path / "batch.yaml"
    backbones = {str(tiny_folders["tiny-gemma2"]): [2], str(broken): None}
    options = {"options": "--dtype float32 --device cpu", "until": 2}
    batch = BATCH | {"out": str(out), "backbones": backbones, **options}
    config.write_text(yaml.safe_dump(batch))
    first = snakemake(config, "--cores", "2")
    # The second notebook begins once the first one's is known to be whole.
    while not list(out.glob("tiny-gemma2/*/logs/02_*.log")):
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.2)
    first.send_signal(signal.SIGINT)
    said = first.communicate(timeout=120)[0]
    assert first.returncode != 0, said
    (begun, *_) = out.glob("tiny-gemma2/*/logs/02_*.log")
    (kept,) = begun.parent.parent.glob("executed/01_*.ipynb")
    written = kept.stat().st_mtime_ns
    again = snakemake(config, "--cores", "2")
    said = again.communicate(timeout=600)[0]
    assert again.returncode == 1
    assert kept.stat().st_mtime_ns == written, "a notebook that was whole was run again"
    assert len(list(out.glob("tiny-gemma2/*/executed/02_*.ipynb"))) == 1
    assert "failed: broken/smoke: 01_extract_targets: " in said and "1 of 2 runs are complete" in said
    assert (out / "comparison" / "section11.md").exists()
    took = [seconds(run, ["01_extract_targets", "02_train_av"]) for run in (out / "tiny-gemma2").iterdir()]
    assert f"all runs: {sum(took):.0f} s" in said and sum(t > 1 for t in took) == 1
    assert seconds(out / "broken" / "smoke", ["01_extract_targets"]) == 0


def test_the_cluster_command_is_understood(tmp_path):
    """As the README has it; jobs ask for the memory that the backbone's weights need, and for a card."""
    config, out = tmp_path / "small.yaml", tmp_path / "out"
    config.write_text((ROOT / "workflow" / "small.yaml").read_text())
    (out / "gemma3-270m").mkdir(parents=True)
    (out / "gemma3-270m" / "weights.fetched").write_text("540000000")
    cluster = [
        "--executor",
        "slurm",
        "--jobs",
        "20",
        "--default-resources",
        "slurm_partition=gpu",
        "--dry-run",
        "--config",
        "gpus=1",
        f"out={out}",
    ]
    done = snakemake(config, *cluster)
    said = done.communicate(timeout=120)[0]
    assert done.returncode == 0, said
    assert "notebook_04_centred_eval           4" in said
    jobs = [block for block in said.split("rule ")[1:] if block.startswith("notebook_")]
    assert len(jobs) == 24 and all("gpu=1" in job and "slurm_partition=gpu" in job for job in jobs)
    assert all(("mem_mb=8625" if "backbone=gemma3-270m" in job else "mem_mb=<TBD>") in job for job in jobs)
