"""The six notebooks: kept clean, readable in shape, and run through papermill on tiny backbones."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
from typer.testing import CliRunner

from nla_utils.cli import app
from nla_utils.config import ROOT
from nla_utils.publish import make_release
from nla_utils.reproduce import STAGES
from nla_utils.store import RunFolder

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OPTIONS = ["--profile", "smoke", "--dtype", "float32", "--device", "cpu"]


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


def test_there_are_six():
    assert [n.stem for n in NOTEBOOKS] == [s.notebook for s in STAGES]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_kept_without_outputs_and_short(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in code(notebook))
    lengths = [c.source.count("\n") + 1 for c in code(notebook)]
    assert max(lengths) <= 30 and statistics.median(lengths) <= 8
    assert "def " not in "".join(c.source for c in code(notebook))
    assert sum(c.cell_type == "markdown" for c in notebook.cells) >= len(lengths) / 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_are_one_cell_with_help(path):
    tagged = [c for c in code(nbformat.read(path, 4)) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    inspected = papermill.inspect_notebook(str(path))
    assert {"backbone", "profile", "seed", "out", "layer", "n_rollouts"} <= set(inspected)
    assert all(p["help"] for p in inspected.values())


@pytest.fixture(scope="module", params=["tiny-gemma2", "tiny-qwen2"])
def reproduced(request, tiny_folders, tmp_path_factory):
    out = tmp_path_factory.mktemp(f"out-{request.param}")
    command = ["reproduce", "--backbone", str(tiny_folders[request.param]), "--out", str(out), *OPTIONS]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    return command, result, out / request.param / "smoke"


def test_all_six_run(reproduced):
    _, result, folder = reproduced
    for stage in STAGES:
        notebook = nbformat.read(folder / "executed" / f"{stage.notebook}.ipynb", 4)
        assert all(c.execution_count for c in code(notebook) if c.source.strip())
        assert not any(o.output_type == "error" for c in code(notebook) for o in c.outputs)
        assert str(ROOT) not in json.dumps(notebook)
    for word in ("executed notebooks", "tables and figures", "paper section"):
        assert word in result.output
    assert (folder / "report" / "section11.md").exists()
    assert (folder / "report" / "figures" / "fig1_k_curves.pdf").stat().st_size > 1000


def test_a_second_run_skips_what_is_whole(reproduced):
    command, _, folder = reproduced
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    result = CliRunner().invoke(app, [*command, "--until", "05"])
    assert result.exit_code == 0, result.output
    assert result.output.count("whole, skipped") == 5
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


def test_the_last_notebook_needs_results_alone(reproduced, tmp_path):
    command, _, folder = reproduced
    shutil.copytree(folder / "results", tmp_path / folder.parent.name / folder.name / "results")
    again = [str(tmp_path) if word == str(folder.parent.parent) else word for word in command]
    result = CliRunner().invoke(app, [*again, "--from", "6"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / folder.parent.name / folder.name / "report" / "section11.md").exists()


def test_results_hold_both_protocols_in_the_authors_names(reproduced):
    folder = reproduced[2] / "results"
    keys = {
        "oracle_ceiling": ("replay_cen_fve_mean", "paraphrase_bestof8_raw_fve_mean"),
        "centered_eval": ("adapter_cen_greedy_mean", "unrelated_text_cen_bestofK_mean"),
        "rerank_eval": ("kcurve_oracle_top1_cen", "spearman_logp_vs_oracle_cen_p95"),
    }
    for name, wanted in keys.items():
        protocols = json.loads((folder / f"{name}.json").read_text())["protocols"]
        for protocol in ("paper", "corrected"):
            column = protocols[protocol]
            assert column["protocol"] == protocol and column["n"] == 8
            assert set(wanted) <= set(column) and wanted[0] in column["ci95"]


def test_a_release_of_the_run_is_whole(reproduced, tmp_path):
    folder = RunFolder(reproduced[2])
    n = len(folder.load("targets").tensors["v"])
    release = make_release(folder, [f"text {i}" for i in range(n)], tmp_path)
    assert {p.name for p in release.files(release.model)} == {
        "README.md", "best_av.pt", "best_av.safetensors", "config.json", "centered_eval.json", "oracle_ceiling.json",
        "rerank_eval.json",
    }  # fmt: skip
    frame = pd.read_parquet(release.dataset / "targets.parquet")
    assert list(frame["part"].value_counts()[["in_sample", "held_out", "pool"]]) == [8, 8, 48] and len(frame) == n
    card = (release.model / "README.md").read_text()
    for word in ("paper protocol", "corrected", "control: unrelated text", "left_pad", "Trainable parameters"):
        assert word in card
    assert "sha256" in (release.dataset / "README.md").read_text()


def test_a_broken_artefact_is_refused_before_any_notebook_runs(reproduced, monkeypatch):
    command, _, folder = reproduced
    path = folder / "targets.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    monkeypatch.setattr("nla_utils.reproduce.run_notebook", lambda *_: pytest.fail("work began"))
    result = CliRunner().invoke(app, command)
    path.write_bytes(whole)
    assert result.exit_code == 2 and "truncated or altered" in result.output


@pytest.mark.parametrize("end, status, says", [
    (lambda command: command.send_signal(signal.SIGINT), 130, "01_extract_targets: stopped after"),
    (lambda command: psutil.Process(command.pid).children()[0].kill(), 2, "01_extract_targets: its process was ended"),
], ids=["Ctrl-C", "kernel killed"])  # fmt: skip
def test_a_run_that_is_ended_says_so_without_a_traceback(tiny_folders, tmp_path, end, status, says):
    chosen = ["--backbone", str(tiny_folders["tiny-llama"]), "--out", str(tmp_path), *OPTIONS]
    command = subprocess.Popen(
        [sys.executable, "-m", "nla_utils", "reproduce", *chosen], env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A shell's background jobs ignore Ctrl-C and hand that on to what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not (tmp_path / "tiny-llama" / "smoke" / "targets.safetensors").exists():
        assert command.poll() is None, command.communicate()[0]
        time.sleep(0.1)
    end(command)
    said = command.communicate(timeout=60)[0]
    assert command.returncode == status and says in said and "Traceback" not in said, said


def test_several_backbones_in_one_call(tiny_folders, tmp_path):
    names = ("tiny-llama", "tiny-gemma3")
    chosen = [x for n in names for x in ("--backbone", str(tiny_folders[n]))]
    command = ["reproduce", *chosen, "--out", str(tmp_path), "--until", "1", "--seed", "3", *OPTIONS]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    for name in names:
        record = json.loads((tmp_path / name / "smoke-seed3" / "results" / "targets.json").read_text())
        assert record["identity"]["seed"] == 3 and record["identity"]["backbone"] == name


@pytest.mark.parametrize("extra", [["--set", "n_rollouts=0"], ["--layer", "9"], ["--from", "5", "--until", "2"]])
def test_refusals_leave_earlier_artefacts_as_they_were(reproduced, extra):
    command, _, folder = reproduced
    before = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if p.is_file()}
    assert CliRunner().invoke(app, [*command, *extra]).exit_code == 2
    assert before == {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if p.is_file()}


@pytest.mark.parametrize("extra, message", [
    (["--backbone", "gema3-270m"], "did you mean 'gemma3-270m'"),
    (["--profile", "quik"], "did you mean 'quick'"),
    (["--set", "n_rollouts=0"], "n_rollouts is 0"),
    (["--set", "rollouts=3"], "did you mean 'n_rollouts'"),
    (["--set", "pool_size=5000"], "too few"),
    (["--from", "5", "--until", "2"], "choose 1 to 6"),
    (["--from", "3"], "lacks what 01_extract_targets makes"),
    (["--from", "6"], "has all results of this run; start with --from 01"),
    (["--layer", "9"], "out of range"),
])  # fmt: skip
def test_bad_input_is_refused_and_writes_nothing(tiny_folders, tmp_path, extra, message):
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), "--out", str(tmp_path), *OPTIONS, *extra]
    if extra[0] == "--backbone":
        command = ["reproduce", *extra, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not list(tmp_path.rglob("*.*"))


def test_plain_papermill_works_and_refuses_unknown_parameters(tiny_folders, tmp_path):
    values = {"backbone": str(tiny_folders["tiny-llama"]), "profile": "smoke", "dtype": "float32", "out": str(tmp_path)}
    first = str(ROOT / "notebooks" / "01_extract_targets.ipynb")
    papermill.execute_notebook(first, str(tmp_path / "01.ipynb"), values, progress_bar=False, kernel_name="python3")
    assert (tmp_path / "tiny-llama" / "smoke" / "results" / "targets.json").exists()
    with pytest.raises(papermill.PapermillExecutionError, match="unknown parameter 'proflie'"):
        papermill.execute_notebook(
            first, str(tmp_path / "bad.ipynb"), {"proflie": "smoke"}, progress_bar=False, kernel_name="python3"
        )


def test_committed_executed_notebooks_have_no_errors_and_no_machine_paths():
    for path in Path(ROOT / "notebooks" / "executed").glob("*/*/*.ipynb"):
        notebook = nbformat.read(path, 4)
        assert not any(o.output_type == "error" for c in code(notebook) for o in c.outputs), path
        assert not re.search("/(home|root|tmp|work|Users)/", path.read_text()), path
