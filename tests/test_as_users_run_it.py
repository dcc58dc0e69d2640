"""Inputs and surroundings that users have been seen to come with: each works, or is refused by name."""

import json
import os
import resource
import shutil
import subprocess
import sys

import filelock
import nbformat
import numpy as np
import pytest
import torch
from conftest import build_tokenizer, save_tiny, tiny_config
from safetensors.torch import save_file
from transformers import Gemma3Config, LlamaConfig, OPTConfig
from typer.testing import CliRunner

from nla_utils.chunks import ChunkStore
from nla_utils.config import ROOT, RunConfig
from nla_utils.errors import BackboneError, ConfigError, SourceError
from nla_utils.extensions.release.api import NLA, read_vector
from nla_utils.lm.checks import check_backbone
from nla_utils.lm.loading import load_backbone, pick_device
from nla_utils.lm.registry import resolve
from nla_utils.run import open_run
from nla_utils.runner import notebooks
from nla_utils.runner.cli import app
from nla_utils.runner.notebooks import EXTENSIONS, STAGES

OPTIONS = ["--profile", "smoke", "--dtype", "float32"]


# Devices and other options


def test_a_numbered_device_is_the_device(tiny_folders, tmp_path):
    config = tiny_config(tiny_folders["tiny-llama"], tmp_path, device="cpu:0")
    assert open_run(config, weights=False).folder == open_run(config).folder
    assert open_run(config).folder.identity["device"] == "cpu"


@pytest.mark.parametrize("device, message", [
    ("gpu", "is none of auto, cpu"), ("cuda:x", "is none of auto"), ("cpu:1", "this machine has 1 of cpu"),
])  # fmt: skip
def test_a_device_that_is_not_there_is_refused_before_any_notebook_runs(tiny_folders, tmp_path, device, message):
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), "--out", str(tmp_path / "out"), *OPTIONS]
    result = CliRunner().invoke(app, [*command, "--device", device])
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError):
        pick_device(RunConfig(device=device).device)


@pytest.mark.parametrize("values, message", [
    ({"out": 2026}, "out is 2026; it must be text"), ({"layer": 9.0}, "layer is 9.0; it must be a whole number"),
    ({"seed": "abc"}, "seed is 'abc'"), ({"seed": True}, "seed is True"), ({"backbone": None}, "backbone is None"),
    ({"dtype": "int8"}, "dtype 'int8'"), ({"av": 3}, "av is 3"),
])  # fmt: skip
def test_what_papermill_reads_as_another_kind_of_value_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_notebook(values)


# Surroundings: display, start-up files, kernels, locale, odd paths


def test_notebooks_need_nothing_of_the_shell_and_bring_their_own_kernel(tiny_folders, tmp_path):
    home = tmp_path / "home {of} a user"
    (home / "ipython" / "profile_default" / "startup").mkdir(parents=True)
    (home / "ipython" / "profile_default" / "startup" / "00.py").write_text("raise SystemExit('user start-up file ran')")
    (home / "jupyter" / "kernels" / "python3").mkdir(parents=True)
    foreign = {"argv": ["false"], "display_name": "x", "language": "python"}
    (home / "jupyter" / "kernels" / "python3" / "kernel.json").write_text(json.dumps(foreign))
    backbone = shutil.copytree(tiny_folders["tiny-llama"], home / "a backbone")
    environment = {
        **os.environ, "MPLBACKEND": "agg", "IPYTHONDIR": str(home / "ipython"), "JUPYTER_PATH": str(home / "jupyter"),
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT), "TMPDIR": str(home),
    }  # fmt: skip
    command = ["reproduce", "--backbone", str(backbone), "--out", str(home / "runs"), *OPTIONS, "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "nla_utils", *command, "--until", "1"], env=environment, cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    executed = nbformat.read(home / "runs" / "a backbone" / "smoke" / "executed" / "01_extract_targets.ipynb", 4)
    pictures = [o for c in executed.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 2


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"}])
def test_pages_are_the_same_bytes_under_every_locale(tmp_path, locale):
    program = (
        "import sys, pathlib; from nla_utils.paper.section import section_page; "
        "section_page().write(pathlib.Path(sys.argv[1]) / 's.md', pathlib.Path(sys.argv[1]) / 'f')"
    )
    environment = {**os.environ, **locale, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=environment, check=True)
    assert "‖μ‖" in (tmp_path / "s.md").read_text(encoding="utf-8")


# Runs that would share a folder


def test_two_revisions_of_a_repository_are_two_backbones():
    names = {resolve(f"org/model{revision}").name for revision in ("", "@step1000", "@step143000", "@refs/pr/2", "@v1.0")}
    assert len(names) == 5 and all("/" not in name for name in names)
    assert resolve("google/gemma-2-2b@abc").name != resolve("google/gemma-2-2b").name == "gemma2-2b"


def test_two_folders_of_one_name_are_refused(tiny_folders, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(tiny_folders["tiny-llama"], tmp_path / place / "model")
    chosen = [x for place in ("a", "b") for x in ("--backbone", str(tmp_path / place / "model"))]
    result = CliRunner().invoke(app, ["reproduce", *chosen, "--out", str(tmp_path / "out"), *OPTIONS, "--device", "cpu"])
    assert result.exit_code == 2 and "would both write into" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_two_at_once_in_one_folder_are_refused_and_a_crash_leaves_no_lock(tiny_folders, tmp_path, monkeypatch):
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), "--out", str(tmp_path), *OPTIONS]
    command += ["--device", "cpu", "--until", "1"]
    folder = tmp_path / "tiny-llama" / "smoke"
    folder.mkdir(parents=True)
    monkeypatch.setattr(notebooks, "run_notebook", lambda *_: None)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); "
         "print(1, flush=True); time.sleep(60)", str(folder / "run.lock")], stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2 and "another process is at work in" in " ".join(refused.output.split())
    holder.kill()
    holder.wait()
    assert CliRunner().invoke(app, command).exit_code == 0
    with filelock.FileLock(folder / "run.lock", timeout=0):
        pass


# Models


def saved(folder, config, **tokenizer):
    return save_tiny(folder, config, build_tokenizer("right", False, True, **tokenizer))


def test_every_id_that_the_generation_configuration_calls_eos_ends_a_sequence(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["tiny-llama"], tmp_path / "model")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, 50]}))
    assert load_backbone(tiny_config(folder, tmp_path)).eos_ids == (1, 50)


def test_a_multimodal_model_is_refused_by_name_before_weights_load(tmp_path):
    (tmp_path / "model").mkdir()
    Gemma3Config().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="is multimodal .Gemma3Config.*kind gemma3_text"):
        load_backbone(tiny_config(tmp_path / "model", tmp_path))


@pytest.mark.parametrize("text", ['{"model_type": "nosuch"}', "{}", '{"a": ', '{"model_type": "llama", "hidden_size": "x"}'])
def test_a_file_that_is_no_configuration_is_named(tmp_path, text):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(text)
    with pytest.raises(SourceError, match="config.json is no configuration of a model known here"):
        load_backbone(tiny_config(tmp_path / "model", tmp_path))


def test_embeddings_of_another_width_are_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    OPTConfig(hidden_size=32, word_embed_proj_dim=16).save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="embeddings have width 16, its layers 32"):
        load_backbone(tiny_config(tmp_path / "model", tmp_path))


def test_an_id_without_an_embedding_is_refused_by_name(tmp_path):
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    folder = saved(tmp_path / "model", lambda ids: LlamaConfig(**shape, **(ids | {"vocab_size": 300})))
    backbone = load_backbone(tiny_config(folder, tmp_path))
    with pytest.raises(BackboneError, match="token id 350 has no embedding, there are 300"):
        backbone.encode([[5, 350]], start=True)


def test_a_model_that_sees_one_token_a_step_is_refused(gemma_run, monkeypatch):
    backbone = gemma_run[0].backbone
    forward = type(backbone.model.base_model).forward

    def forgetful(self, *args, past_key_values=None, use_cache=None, **inputs):
        return forward(self, *args, use_cache=False, **inputs)

    monkeypatch.setattr(type(backbone.model.base_model), "forward", forgetful)
    with pytest.raises(BackboneError, match="key-value cache and one forward pass disagree"):
        check_backbone(backbone)


def test_a_model_without_such_a_cache_is_refused(gemma_run, monkeypatch):
    backbone = gemma_run[0].backbone
    forward = type(backbone.model.base_model).forward

    def picky(self, *args, past_key_values=None, **inputs):
        if past_key_values is not None:
            raise AttributeError("no conv_states")
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(backbone.model.base_model), "forward", picky)
    with pytest.raises(BackboneError, match="key-value cache fails .no conv_states"):
        check_backbone(backbone)


# Vectors and texts


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("end", ["safetensors", "pt", "npy"])
def test_a_users_own_hidden_state_is_read(tmp_path, shape, dtype, end):
    v, path = torch.randn(shape).to(dtype), tmp_path / f"v.{end}"
    if end == "npy":
        if dtype == torch.bfloat16:
            pytest.skip("numpy has no such type")
        np.save(path, v.numpy())
    else:
        save_file({"v": v}, path) if end == "safetensors" else torch.save(v, path)
    nla = object.__new__(NLA)
    nla.backbone = type("b", (), {"d": 32, "name": "b"})
    np.testing.assert_array_equal(nla._checked(read_vector(path)), v.float().numpy().reshape(-1))


@pytest.mark.parametrize("name, content, message", [
    ("v.npy", b"", "was not read"), ("v.safetensors", b"", "was not read"), ("v.pt", b"", "was not read"),
    ("v.npy", b"\x93NUMPY\x01\x00", "was not read"), ("v.txt", b"1 2 3", "is read from"),
    ("v.safetensors", (10**12).to_bytes(8, "little") + b"{}", "was not read"),
])  # fmt: skip
def test_what_is_no_vector_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_vector(tmp_path / name)
    assert name in str(refused.value)


@pytest.mark.parametrize("name", ["v.safetensors", "v.npy"])
def test_a_header_that_claims_a_trillion_rows_costs_no_memory(tmp_path, name):
    rows = 10**12
    header = json.dumps({"v": {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, 128 * rows]}}).encode()
    if name == "v.npy":
        with open(tmp_path / name, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (rows, 32)})
            f.write(bytes(128))
    else:
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(128))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=f"{name} was not read"):
        read_vector(tmp_path / name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert peak * (1 if sys.platform == "darwin" else 1024) < 50_000_000


@pytest.mark.parametrize("tensors, message", [
    ({"a": torch.zeros(3), "b": torch.zeros(3)}, r"holds \['a', 'b'\]"),
    ({"a": torch.zeros(3, dtype=torch.int64)}, "floats"),
])  # fmt: skip
def test_files_of_other_tensors_are_named(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match=message):
        read_vector(tmp_path / "v.safetensors")


def test_a_literal_start_token_in_a_text_is_refused(gemma_run):
    nla = NLA(gemma_run[0].backbone, None)
    for call in (nla.activation, nla.trace):
        with pytest.raises(ConfigError, match="begins with '<bos>'"):
            call("<bos>a text")
    nla.activation("a text")


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
    kept = ("nla_utils", "notebooks/extensions", "bundles", "paper/published")
    for name in kept:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*(ROOT / "notebooks").glob("0*.ipynb"), ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "README.md"):
        shutil.copy(path, source / path.relative_to(ROOT))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(there)]
    subprocess.run([*pip, str(source)], check=True)
    work = tmp_path / "work"
    work.mkdir()

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(there)}
        return subprocess.run(words, cwd=work, env=environment, capture_output=True, text=True)

    program = "from nla_utils.extensions.release.bundle import Bundle; print(Bundle.layer_of('gemma3-270m', None))"
    assert run(sys.executable, "-c", program).stdout.strip() == "13"
    nla = [sys.executable, "-m", "nla_utils"]
    assert run(*nla, "--version").returncode == 0
    command = ["reproduce", "--backbone", str(tiny_folders["tiny-llama"]), *OPTIONS, "--device", "cpu", "--until", "1"]
    done = run(*nla, *command)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert (work / "runs" / "tiny-llama" / "smoke" / "executed" / "01_extract_targets.ipynb").exists()


def test_every_notebook_is_a_stage():
    assert {s.number for s in (*STAGES, *EXTENSIONS.values())} == set(range(1, 9))
