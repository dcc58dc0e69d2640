"""The hub code against a hub on loopback: pins, resumes, checks hashes, and says what went wrong."""

import json
import shutil
import sys

import pytest
import warm
from hub_server import Hub

WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def hub():
    hub = Hub()
    hub.files["org/model"] = {"config.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "notes.md": b"x"}
    hub.endpoint = hub.start()
    yield hub
    hub.server.shutdown()


def ask(hub, cache, source, **environment):
    """(exit code, answer or message) of ``HubFiles.fetch`` in a process of its own, as the endpoint is read at import."""
    program = (
        "import sys, json; from nla_utils.lm.weights import HubFiles; from nla_utils.errors import SourceError\n"
        "try:\n    folder = HubFiles(sys.argv[1], ['*.json', '*.safetensors']).fetch()\n"
        "    print(json.dumps({p.name: p.stat().st_size for p in folder.iterdir()} | {'at': folder.name}))\n"
        "except SourceError as e:\n    print(e); sys.exit(3)"
    )
    done = in_a_process(hub, cache, program, source, **environment)
    assert done.returncode in (0, 3), done.stderr[-3000:]
    return done.returncode, done.stdout.strip().splitlines()


def in_a_process(hub, cache, program, *arguments, **environment):
    env = hub.environment(cache, **environment)
    command = [sys.executable, "-c", program, *arguments]
    return warm.run(command, env=env)


def test_download_pins_the_commit_and_takes_only_what_is_needed(hub, tmp_path):
    code, lines = ask(hub, tmp_path, "org/model")
    commit = hub.commit("org/model")
    assert code == 0 and f"pin it with org/model@{commit}" in lines[0]
    got = json.loads(lines[-1])
    assert got["at"] == commit and got["model.safetensors"] == len(WEIGHTS) and "notes.md" not in got


def test_a_pinned_commit_in_the_cache_needs_no_network(hub, tmp_path):
    commit = hub.commit("org/model")
    assert ask(hub, tmp_path, f"org/model@{commit}")[0] == 0
    served = len(hub.served)
    assert ask(hub, tmp_path, f"org/model@{commit}", HF_HUB_OFFLINE="1")[0] == 0
    hub.server.shutdown()
    hub.server.server_close()
    assert ask(hub, tmp_path, f"org/model@{commit}")[0] == 0
    assert len(hub.served) == served


def test_a_cut_transfer_is_resumed(hub, tmp_path):
    # Larger than the pieces that the client writes to disk, so that there is something to go on from.
    whole = WEIGHTS * 30
    hub.files["org/model"]["model.safetensors"] = whole
    hub.cut.add("model.safetensors")
    code, lines = ask(hub, tmp_path, "org/model")
    if code == 3:
        code, lines = ask(hub, tmp_path, "org/model")
    assert code == 0 and json.loads(lines[-1])["model.safetensors"] == len(whole)
    assert any(path == "model.safetensors" and first > 0 for path, first in hub.ranges)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("how", ["lie", "short"])
def test_wrong_bytes_and_wrong_lengths_are_refused_and_not_kept(hub, tmp_path, how, path):
    getattr(hub, how).add(path)
    code, lines = ask(hub, tmp_path, "org/model")
    assert code == 3 and path in lines[-1], lines
    getattr(hub, how).clear()
    code, lines = ask(hub, tmp_path, "org/model")
    assert code == 0 and json.loads(lines[-1])[path] == len(hub.files["org/model"][path])


@pytest.mark.parametrize(
    "refusal, message",
    [
        ((403, "GatedRepo"), "accept its terms"),
        ((401, "GatedRepo"), "hf auth login"),
        ((401, "RepoNotFound"), "does not exist, or is private"),
        ((404, "RepoNotFound"), "does not exist, or is private"),
        ((429, "TooMany"), "answered 429"),
        ((500, "Broken"), "answered 500"),
        ((503, "Broken"), "answered 503"),
    ],
)
def test_refusals_say_what_to_do(hub, tmp_path, refusal, message):
    hub.refuse["org/model"] = refusal
    code, lines = ask(hub, tmp_path, "org/model")
    assert code == 3 and message in " ".join(lines)
    hub.refuse.clear()
    assert ask(hub, tmp_path, "org/model")[0] == 0


def test_what_the_user_already_has_is_not_fetched_again(hub, tmp_path):
    program = "from huggingface_hub import snapshot_download; snapshot_download('org/model')"
    assert in_a_process(hub, tmp_path, program).returncode == 0
    served = hub.served.count("model.safetensors")
    code, lines = ask(hub, tmp_path, "org/model")
    assert code == 0 and json.loads(lines[-1])["model.safetensors"] == len(WEIGHTS)
    assert hub.served.count("model.safetensors") == served and not (tmp_path / "hub").exists()
    # A copy of other bytes is not taken.
    (path,) = (tmp_path / "home").rglob("snapshots/*/model.safetensors")
    path.resolve().write_bytes(WEIGHTS[::-1])
    assert ask(hub, tmp_path, "org/model")[0] == 0 and (tmp_path / "hub").exists()


def test_a_model_that_cannot_be_used_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    hub.files["org/model"] |= {"config.json": b'{"model_type": "gemma3"}', "tokenizer.json": b"{}"}
    program = "from nla_utils.lm.weights import fetch, resolve; fetch(resolve('org/model'))"
    hub.lie.add("config.json")
    assert "config.json does not have the hash" in in_a_process(hub, tmp_path, program).stderr
    hub.lie.clear()
    done = in_a_process(hub, tmp_path, program)
    assert "org--model is multimodal (Gemma3Config)" in done.stderr
    assert "config.json" in hub.served and "model.safetensors" not in hub.served
    del hub.files["org/model"]["tokenizer.json"]
    assert "holds no tokenizer (tokenizer.json, " in in_a_process(hub, tmp_path, program).stderr
    assert "model.safetensors" not in hub.served
    hub.files["org/model"]["tokenizer.json"] = b"{}"
    del hub.files["org/model"]["config.json"]
    assert "has no file config.json" in in_a_process(hub, tmp_path, program).stderr


def test_weights_that_a_repository_holds_twice_are_fetched_once(hub, tmp_path):
    hub.files["org/model"] |= {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "consolidated.safetensors": WEIGHTS,
        "original/model.safetensors": WEIGHTS,
    }
    program = (
        "import sys; from nla_utils.lm.weights import fetch, resolve\n"
        "print(*sorted(p.name for p in fetch(resolve('org/model')).rglob('*.safetensors')))"
    )
    done = in_a_process(hub, tmp_path, program)
    assert done.returncode == 0 and done.stdout.split()[-1] == "model.safetensors", done.stderr[-2000:]
    assert "consolidated" not in done.stdout and not any("original" in path for path, _ in hub.ranges)


def test_the_first_complete_download_pins_the_commit_for_later_runs(hub, tmp_path):
    hub.lie.add("model.safetensors")
    assert ask(hub, tmp_path, "org/model")[0] == 3 and not (tmp_path / "pins").exists()
    hub.lie.clear()
    assert ask(hub, tmp_path, "org/model")[0] == 0
    first = hub.commit("org/model")
    hub.files["org/model"]["config.json"] = b'{"pushed": "since"}'
    # Offline too: nothing has to be asked.
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        _, lines = ask(hub, tmp_path, "org/model", **environment)
        assert json.loads(lines[-1])["at"] == first
    _, lines = ask(hub, tmp_path, "org/model@main")
    assert json.loads(lines[-1])["at"] == hub.commit("org/model") != first


def test_a_pinned_commit_that_is_gone_is_named_with_the_file_that_pins_it(hub, tmp_path):
    assert ask(hub, tmp_path, "org/model")[0] == 0
    hub.files["org/model"]["config.json"] = b"{}"
    shutil.rmtree(tmp_path / "hub")
    code, lines = ask(hub, tmp_path, "org/model")
    assert code == 3 and "an earlier run pinned" in lines[-1] and "models--org--model" in lines[-1]


def test_files_that_an_earlier_run_did_not_ask_for_are_fetched_at_the_same_commit(hub, tmp_path):
    program = (
        "import sys; from nla_utils.lm.weights import HubFiles; print(HubFiles('org/model', sys.argv[1:]).fetch())"
    )
    assert in_a_process(hub, tmp_path, program, "config.json").returncode == 0
    assert "model.safetensors" not in hub.served
    assert in_a_process(hub, tmp_path, program, "*.safetensors").returncode == 0 and "model.safetensors" in hub.served
    done = in_a_process(hub, tmp_path, program, "*.bin")
    assert "has no file *.bin; it holds" in done.stderr


def test_what_is_still_to_be_fetched_is_known_before(hub, tmp_path):
    program = (
        "from nla_utils.lm.weights import HubFiles\n"
        "print(HubFiles('org/model', ['*.json', '*.safetensors']).bytes_to_fetch())"
    )
    wanted = sum(len(data) for name, data in hub.files["org/model"].items() if name != "notes.md")
    assert int(in_a_process(hub, tmp_path, program).stdout) == wanted and not hub.served
    assert ask(hub, tmp_path, "org/model")[0] == 0
    assert int(in_a_process(hub, tmp_path, program).stdout) == 0


def test_an_unknown_revision_is_named(hub, tmp_path):
    code, lines = ask(hub, tmp_path, "org/model@v9")
    assert code == 3 and "no revision 'v9'" in lines[-1]


def test_no_network_is_said_plainly(hub, tmp_path):
    hub.server.shutdown()
    hub.server.server_close()
    code, lines = ask(hub, tmp_path, "org/model")
    assert code == 3 and "could not be reached" in " ".join(lines)
    code, lines = ask(hub, tmp_path, "org/model", HF_HUB_OFFLINE="1")
    assert code == 3 and "HF_HUB_OFFLINE" in " ".join(lines)


def test_what_is_pushed_is_what_a_download_gives(hub, tmp_path):
    release = tmp_path / "release"
    contents = {
        "av/best_av.safetensors": WEIGHTS,
        "av/config.json": b"{}",
        "av/eval/centered_eval.json": b"[1]",
        "targets/targets.safetensors": WEIGHTS[::-1],
        "targets/README.md": b"---\ntags: []\n---",
    }
    for name, data in contents.items():
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_bytes(data)
    program = (
        "import sys, pathlib; from nla_extensions.release.publish import push\n"
        "out = pathlib.Path(sys.argv[1])\n"
        "print(*push(out, 'org/av'), sep='\\n')\n"
        "from nla_utils.lm.weights import HubFiles\n"
        "folder = HubFiles('org/av', ['*']).fetch(); assert (folder / 'eval' / 'centered_eval.json').read_bytes() == b'[1]'"
    )
    done = in_a_process(hub, tmp_path / "cache", program, str(release), HF_TOKEN="hf_test")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("org/av @ ")
    for name, data in contents.items():
        part, path = name.split("/", 1)
        assert hub.files["org/av" if part == "av" else "org/av-targets"][path] == data
