"""The notebooks: kept clean, readable in shape, and run through papermill on tiny backbones."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time

import golden
import nbformat
import pandas as pd
import papermill
import psutil
import pytest
from click.testing import CliRunner

from nla_extensions.cli import BESIDE, app
from nla_extensions.release.publish import dataset_card, make_release, model_card
from nla_utils.config import ROOT
from nla_utils.notebooks import STAGES
from nla_utils.report.results import COMMITTED, load_results
from nla_utils.store import RunFolder

ALL_STAGES = [*STAGES, *(stage() for stage in BESIDE.values())]
NOTEBOOKS = [ROOT / "notebooks" / f"{stage.notebook}.ipynb" for stage in ALL_STAGES]


def code(notebook):
    return [c for c in notebook.cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_kept_valid_and_without_outputs(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert all(not c.outputs and c.execution_count is None for c in code(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS[:6], ids=lambda p: p.stem)
def test_section_11_needs_no_extension(path):
    assert "extensions" not in "".join(c.source for c in code(nbformat.read(path, 4)))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_parameters_are_one_cell_with_help(path):
    tagged = [c for c in code(nbformat.read(path, 4)) if "parameters" in c.metadata.get("tags", [])]
    assert len(tagged) == 1
    inspected = papermill.inspect_notebook(str(path))
    assert {"backbone", "profile", "seed", "out", "n_eval"} <= set(inspected)
    assert all(p["help"] for p in inspected.values())


@pytest.fixture(params=["tiny-gemma2", "tiny-qwen2"])
def reproduced(request, reproduced_tiny):
    return reproduced_tiny(request.param)


def test_all_run(reproduced):
    _, said, folder = reproduced
    for stage in ALL_STAGES:
        notebook = nbformat.read(folder / "executed" / f"{stage.name}.ipynb", 4)
        assert all(c.execution_count for c in code(notebook) if c.source.strip())
        assert not any(o.output_type == "error" for c in code(notebook) for o in c.outputs)
        assert str(ROOT) not in json.dumps(notebook)
    for word in ("executed notebooks", "tables and figures", "paper section"):
        assert word in said
    assert (folder / "report" / "section11.md").exists()
    assert (folder / "report" / "figures" / "fig1_k_curves.pdf").stat().st_size > 1000


def test_what_is_shown_by_hand_is_what_the_helpers_give(reproduced):
    """The score, ρ and the K-curve that notebooks 04 and 05 take apart, against the results files."""
    folder = reproduced[2]

    def shown(notebook, word):
        cells = code(nbformat.read(folder / "executed" / f"{notebook}.ipynb", 4))
        (cell,) = (c for c in cells if word in c.source)
        text = cell.outputs[-1]["data"]["text/plain"]
        if text.startswith("{"):
            return ast.literal_eval(re.sub(r"np\.float64\(([^)]*)\)", r"\1", text))
        return {label: float(x) for label, x in (line.rsplit(None, 1) for line in text.split("\n")[:-1])}

    by_hand, helper = shown("04_centred_eval", "a @ b"), shown("04_centred_eval", "fve(h, v).item()")
    assert by_hand["½(1 + cos)"] == pytest.approx(helper["centred"], abs=1e-6)
    assert shown("04_centred_eval", "raw = h @ v")["½(1 + cos)"] == pytest.approx(helper["raw"], abs=1e-6)
    results = json.loads((folder / "results" / "centered_eval.json").read_text())["protocols"]["corrected"]
    assert shown("04_centred_eval", '"over one"')["over one"] == pytest.approx(
        results["rho_cen_greedy"], rel=1e-5, abs=1e-5
    )
    pair = shown("05_k_curve", "combinations(")
    assert pair["mean over all pairs"] == pytest.approx(pair["closed form"], abs=1e-6)
    curve = json.loads((folder / "results" / "rerank_eval.json").read_text())["protocols"]["corrected"]
    slopes = shown("05_k_curve", "slope_per_doubling(ks")
    assert slopes["rollouts"]["slope"] == pytest.approx(curve["slope_per_doubling_cen"], abs=1e-4)
    assert slopes["unrelated"]["slope"] == pytest.approx(curve["slope_per_doubling_unrelated_text_cen"], abs=1e-4)


def test_a_second_run_skips_what_is_cached(reproduced):
    command, _, folder = reproduced
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}
    result = CliRunner().invoke(app, [*command[:-2], "--until", "05"])
    assert result.exit_code == 0, result.output
    assert result.output.count("cached, skipped") == 5
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*.safetensors")}


def test_an_extension_runs_by_name_or_number(reproduced_tiny):
    command, _, folder = reproduced_tiny("tiny-qwen2")
    (folder / "executed" / "07_tail_reader.ipynb").unlink()
    result = CliRunner().invoke(app, [*command[:-2], "--from", "7", "--until", "7"])
    assert result.exit_code == 0, result.output
    assert (folder / "executed" / "07_tail_reader.ipynb").exists() and "01_" not in result.output


def test_the_last_notebook_needs_results_alone(reproduced_tiny, tmp_path):
    command, _, folder = reproduced_tiny("tiny-qwen2")
    shutil.copytree(folder / "results", tmp_path / folder.parent.name / folder.name / "results")
    again = [str(tmp_path) if word == str(folder.parent.parent) else word for word in command[:-2]]
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
        for protocol in ("published", "corrected"):
            column = protocols[protocol]
            assert column["protocol"] == protocol and column["n"] == 8
            assert set(wanted) <= set(column) and wanted[0] in column["ci95"]


def test_a_release_of_the_run_is_whole(reproduced, tmp_path):
    folder = RunFolder(reproduced[2])
    n = len(folder.load("targets").tensors["v"])
    make_release(folder, [f"text {i}" for i in range(n)], tmp_path)
    model, dataset = tmp_path / "av", tmp_path / "targets"
    assert {p.name for p in model.rglob("*") if p.is_file()} == {
        "README.md",
        "best_av.pt",
        "best_av.safetensors",
        "config.json",
        "centered_eval.json",
        "oracle_ceiling.json",
        "rerank_eval.json",
        "evidence.parquet",
    }
    frame = pd.read_parquet(dataset / "targets.parquet")
    assert list(frame["part"].value_counts()[["in_sample", "held_out", "pool"]]) == [8, 8, 48] and len(frame) == n
    card = (model / "README.md").read_text()
    for word in ("as published", "corrected", "control: unrelated text", "left_pad", "Trainable parameters"):
        assert word in card
    assert "sha256" in (dataset / "README.md").read_text()
    assert "license:" not in card
    # The card's own lines, where the release lies: the numbers of the tables.
    (recipe,) = re.findall(r"```python\n(.*?)```", card, re.S)
    said = subprocess.run([sys.executable, "-c", recipe], cwd=model, capture_output=True, text=True, check=True).stdout
    column = json.loads((model / "eval" / "centered_eval.json").read_text())["protocols"]["corrected"]
    expected = [column["adapter_cen_bestofK_mean"], column["adapter_cen_greedy_mean"]]
    assert list(map(float, said.split())) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backbone, license", [("gemma3-270m", "gemma"), ("smollm2-135m", "apache-2.0")])
def test_cards_carry_the_licence_of_the_weights_that_they_derive_from(backbone, license, tmp_path):
    results = load_results(COMMITTED / backbone / "quick")
    for card in (model_card(results), dataset_card(results, tmp_path)):
        assert card.startswith(f"---\nlicense: {license}\n")


def test_a_broken_artefact_is_refused_before_any_notebook_runs(reproduced, monkeypatch):
    command, _, folder = reproduced
    path = folder / "targets.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    monkeypatch.setattr("nla_utils.notebooks.run_notebook", lambda *_: pytest.fail("work began"))
    result = CliRunner().invoke(app, command)
    path.write_bytes(whole)
    assert result.exit_code == 2 and "truncated or altered" in result.output


def test_a_kernel_that_is_killed_is_one_error(tiny_folders, tmp_path):
    chosen = ["--backbone", str(tiny_folders["tiny-llama"]), "--out", str(tmp_path), *golden.OPTIONS]
    command = subprocess.Popen(
        [sys.executable, "-m", "nla_extensions.cli", "reproduce", *chosen],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (tmp_path / "tiny-llama" / "smoke" / "targets.safetensors").exists():
        assert command.poll() is None, command.communicate()[0]
        time.sleep(0.1)
    psutil.Process(command.pid).children()[0].kill()
    said = command.communicate(timeout=60)[0]
    assert command.returncode == 2 and "Traceback" not in said, said
    assert "error: 01_extract_targets: its process was ended" in said, said


def test_the_least_sizes_that_are_taken_run_through(tiny_folders, tmp_path):
    sizes = {"n_targets": 14, "n_eval": 2, "n_rollouts": 2, "pool_size": 2}
    options = [word for name, size in sizes.items() for word in ("--set", f"{name}={size}")]
    command = golden.reproduce_command(tiny_folders["tiny-gemma2"], tmp_path)[:-1]
    golden.command(*command, "tail-reader", "--until", "5", *options)
    (folder,) = (tmp_path / "tiny-gemma2").glob("smoke-*")
    assert {stage.name for stage in ALL_STAGES[:5]} < {path.stem for path in folder.glob("executed/*.ipynb")}


def test_several_backbones_in_one_call(tiny_folders, tmp_path):
    names = ("tiny-llama", "tiny-gemma3")
    chosen = [x for n in names for x in ("--backbone", str(tiny_folders[n]))]
    command = ["reproduce", *chosen, "--out", str(tmp_path), "--until", "1", "--seed", "3", *golden.OPTIONS]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    for name in names:
        record = json.loads((tmp_path / name / "smoke-seed3" / "results" / "targets.json").read_text())
        assert record["identity"]["seed"] == 3 and record["identity"]["backbone"] == name


@pytest.mark.parametrize("extra", [["--set", "n_rollouts=0"], ["--layer", "9"], ["--from", "5", "--until", "2"]])
def test_refusals_leave_earlier_artefacts_as_they_were(reproduced, extra):
    command, _, folder = reproduced
    before = {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if p.is_file()}
    assert CliRunner().invoke(app, [*command[:-2], *extra]).exit_code == 2
    assert before == {p: p.stat().st_mtime_ns for p in folder.parent.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--backbone", "gema3-270m"], "did you mean 'gemma3-270m'"),
        (["--profile", "quik"], "did you mean 'quick'"),
        (["--set", "n_rollouts=0"], "n_rollouts is 0"),
        (["--set", "n_rollouts=1"], "there must be at least 2 rollouts of a target to choose from"),
        (["--set", "rollouts=3"], "did you mean 'n_rollouts'"),
        (["--set", "pool_size=5000"], "too few"),
        (["--from", "5", "--until", "2"], "choose 1 to 8"),
        (["--from", "3"], "lacks what 01_extract_targets makes"),
        (["--with", "tail_reader"], "did you mean 'tail-reader'"),
        (["--from", "6"], "has all results of this run; start with --from 01"),
        (["--layer", "9"], "out of range"),
    ],
)
def test_bad_input_is_refused_and_writes_nothing(tiny_folders, tmp_path, extra, message):
    command = [
        "reproduce",
        "--backbone",
        str(tiny_folders["tiny-llama"]),
        "--out",
        str(tmp_path),
        *golden.OPTIONS,
        *extra,
    ]
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


# What reads with the shipped verbalizers is no stage of a run.
ALONE = [ROOT / "notebooks" / "00_demo.ipynb", ROOT / "notebooks" / "extensions" / "09_comparison.ipynb"]


@pytest.mark.parametrize("path", ALONE, ids=lambda p: p.stem)
def test_what_is_no_stage_is_committed_executed(path):
    cells = code(nbformat.read(path, 4))
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1))
    assert all(c.outputs for c in cells if "parameters" not in c.metadata.get("tags", []))


def test_committed_executed_notebooks_have_no_errors_and_no_machine_paths():
    for path in [*(ROOT / "notebooks" / "executed").glob("*/*/*.ipynb"), *ALONE]:
        notebook = nbformat.read(path, 4)
        assert not any(o.output_type == "error" for c in code(notebook) for o in c.outputs), path
        assert not re.search("/(home|root|tmp|work|Users)/", path.read_text()), path
