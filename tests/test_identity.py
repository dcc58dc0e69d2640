"""A result can't be mistaken for another: what a stage depends on is compared before anything finished is reused."""

import ast
import copy
import dataclasses
import json
import shutil
import subprocess

import pytest
from conftest import CORPUS, tiny_config, with_out
from safetensors.torch import load_file, save_file

from nla_extensions.cli import BESIDE
from nla_utils import config, notebooks, protocol, targets, training, verbalizer
from nla_utils import store as artefacts
from nla_utils.config import PROFILES, RunConfig
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.sampling import SamplingSettings
from nla_utils.lm.weights import settings_hash
from nla_utils.notebooks import STAGES, is_cached, preflight
from nla_utils.report.results import find_results, without_variants
from nla_utils.run import open_run
from nla_utils.store import code_version, read_json, read_record, write_record
from nla_utils.targets import load_targets, make_targets
from nla_utils.verbalizer import ActivationVerbalizer, av_hash, export_av

WORDS = CORPUS.read_text(encoding="ascii").split()
NEXT = "choose another --out, or delete"
ALL_STAGES = [*STAGES, *(stage() for stage in BESIDE.values())]


def refused(key, theirs=".*", own=".*"):
    return pytest.raises(ArtefactError, match=f"made with {key} = {theirs}, this run has {key} = {own}; {NEXT}")


def texts(path, first):
    path.parent.mkdir()
    path.write_text("\n".join(json.dumps({"text": " ".join(WORDS[i : i + 20])}) for i in range(first, first + 120)))
    return path


# Inputs of one name


@pytest.mark.parametrize("how", ["another file of the name", "the file edited"])
def test_another_corpus_of_the_name_is_refused_before_work(tiny_folders, tmp_path, how, monkeypatch):
    given = tiny_config(
        tiny_folders["tiny-llama"], tmp_path / "runs", corpus=str(texts(tmp_path / "a" / "train.jsonl", 0))
    )
    make_targets(open_run(given))
    preflight(given, STAGES)
    other = texts(tmp_path / "b" / "train.jsonl", 7)
    if how == "the file edited":
        shutil.copy(other, tmp_path / "a")
    else:
        given = dataclasses.replace(given, corpus=str(other))
    monkeypatch.setattr(notebooks, "run_notebook", lambda *_: pytest.fail("work began"))
    with refused("corpus_sha256", "'[0-9a-f]{64}'", "'[0-9a-f]{64}'"):
        notebooks.reproduce([given], lambda _: None, STAGES[:1])


@pytest.fixture
def given_av(gemma_run, tmp_path):
    """A run that was given the AV in ``one/av``."""
    run, made = gemma_run
    export_av(ActivationVerbalizer.fresh(run.backbone), tmp_path / "one" / "av", 0.5, 1)
    taken = with_out(run, tmp_path / "runs", av=str(tmp_path / "one" / "av"))
    training.train_av(taken, make_targets(taken))
    return taken


@pytest.mark.parametrize("what", ["tensors", "temperature"])
def test_another_av_of_the_name_is_refused(given_av, tmp_path, what):
    run, other = given_av, tmp_path / "two" / "av"
    shutil.copytree(tmp_path / "one" / "av", other)
    if what == "tensors":
        save_file(
            {k: x + 1 for k, x in load_file(other / "best_av.safetensors").items()}, other / "best_av.safetensors"
        )
    else:
        record = read_json(other / "config.json")
        (other / "config.json").write_text(json.dumps(record | {"temperature": 0.5}))
    changed = with_out(run, tmp_path / "runs", av=str(other))
    assert changed.folder.path == run.folder.path
    with refused("av_sha256"):
        verbalizer.load_av(changed)
    with refused("av_sha256"):
        preflight(changed.config, STAGES)


def test_the_same_av_elsewhere_and_in_the_other_format_is_the_same(given_av, tmp_path):
    shutil.copytree(tmp_path / "one" / "av", tmp_path / "two" / "av")
    (tmp_path / "two" / "av" / "best_av.safetensors").unlink()
    assert av_hash(tmp_path / "one" / "av") == av_hash(tmp_path / "two" / "av")
    assert verbalizer.load_av(with_out(given_av, tmp_path / "runs", av=str(tmp_path / "two" / "av")))


# What is edited in the code


@pytest.mark.parametrize("key, size", [("n_targets", "n_targets"), ("target_sampling", "max_new_tokens")])
def test_a_profile_that_was_edited_is_refused(gemma_run, monkeypatch, key, size):
    run, _ = gemma_run
    edited = dataclasses.replace(PROFILES["smoke"], **{size: getattr(PROFILES["smoke"], size) + 1})
    monkeypatch.setitem(PROFILES, "smoke", edited)
    with refused(key):
        load_targets(run)


def test_another_sampling_temperature_is_refused(gemma_run, monkeypatch):
    monkeypatch.setattr(targets, "SamplingSettings", lambda **how: SamplingSettings(**how, temperature=0.7))
    with refused("target_sampling", ".*'temperature': 1.0.*", ".*'temperature': 0.7.*"):
        load_targets(gemma_run[0])


@pytest.mark.parametrize(
    "artefact, key, module, name, value",
    [
        ("best_av", "batch_size", "nla_utils.verbalizer", "BATCH_SIZE", 8),
        ("best_av", "validation", "nla_utils.verbalizer", "VALIDATION_SHARE", 0.1),
        ("ceilings", "prompt", "nla_utils.baselines", "PROMPT", "Say: {text}"),
        ("ceilings", "tail_lengths", "nla_utils.baselines", "TAIL_LENGTHS", (1, 2)),
        ("ceilings", "readings", "nla_utils.baselines", "READINGS", {"source": {"corrected": protocol.CORRECTED}}),
        ("rollouts", "rollout_sampling", "nla_utils.config.AVConfig", "temperature", 0.7),
        ("probe", "ridges", "nla_utils.baselines", "PROBE_RIDGES", (1.0,)),
        ("source_loss", "n_others", "nla_utils.verbalizer", "N_OTHERS", 4),
        ("reader", "ridges", "nla_extensions.tail_reader.reader", "RIDGES", (1.0,)),
        ("readings", "search", "nla_extensions.tail_reader.rollouts", "SWAPS", 4),
    ],
)
def test_a_constant_that_was_edited_is_refused(gemma_run, tmp_path, monkeypatch, artefact, key, module, name, value):
    folder = with_out(gemma_run[0], tmp_path).folder
    folder.save(artefact, {})
    folder.load(artefact)
    monkeypatch.setattr(f"{module}.{name}", value)
    with refused(key):
        folder.load(artefact)


def test_a_child_is_refused_with_its_parent(gemma_run, tmp_path, monkeypatch):
    folder = with_out(gemma_run[0], tmp_path).folder
    parent = folder.save("targets", {})
    folder.save("probe", {}, made_from={"targets": parent.sha256})
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(PROFILES["smoke"], n_targets=97))
    with refused("n_targets", "96", "97"):
        folder.load("probe")


def test_every_stage_of_the_runner_says_what_it_depends_on():
    assert {name for stage in ALL_STAGES for name in stage.artefacts} <= set(artefacts.SPECS)


def test_an_artefact_is_not_read_where_what_it_depends_on_is_unknown(gemma_run, tmp_path, monkeypatch):
    folder = with_out(gemma_run[0], tmp_path).folder
    folder.save("targets", {})
    monkeypatch.delitem(artefacts.SPECS, "targets")
    with pytest.raises(ArtefactError, match="what targets depends on is not known here"):
        folder.load("targets")


def test_the_runner_compares_results_too(gemma_run, tmp_path, monkeypatch):
    run = with_out(gemma_run[0], tmp_path)
    made = make_targets(run)
    run.write_results("targets", {}, {"targets": made.sha256})
    run.folder.file("executed").mkdir()
    run.folder.file("executed/01_extract_targets.ipynb").write_text("{}")
    assert is_cached(run.folder, STAGES[0])
    monkeypatch.setitem(PROFILES, "smoke", dataclasses.replace(PROFILES["smoke"], pool_size=40))
    with refused("pool", "48", "40"):
        is_cached(run.folder, STAGES[0])


def test_the_settings_of_a_model_count_and_what_the_library_notes_does_not(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["tiny-llama"], tmp_path / "model")
    before, path = settings_hash(folder), folder / "config.json"
    path.write_text(json.dumps(read_json(path) | {"transformers_version": "0"}))
    assert settings_hash(folder) == before
    path.write_text(json.dumps(read_json(path) | {"rms_norm_eps": 0.5}))
    assert settings_hash(folder) != before
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert len({before, settings_hash(folder), settings_hash(tiny_folders["tiny-gemma2"])}) == 3


# Where it was made


def test_a_run_of_a_gpu_opens_without_one(gemma_run, tmp_path):
    run = with_out(gemma_run[0], tmp_path)
    gpu = dataclasses.replace(run, folder=dataclasses.replace(run.folder, device="cuda"))
    made = gpu.folder.save("targets", {})
    assert made.sidecar["device"] == "cuda" and "device" not in gpu.folder.identity
    here = open_run(run.config, weights=False)
    assert here.folder.load("targets").sha256 == made.sha256
    record = here.provenance | {"name": "targets", "device": "cuda", "hardware": "a GPU"}
    write_record(here.folder.file("results/targets.json"), record)
    assert here.folder.read_results("targets")["device"] == "cuda"


@pytest.mark.parametrize("key", ["device", "torch", "code"])
def test_an_unfinished_stage_resumes_where_it_was_begun_alone(gemma_run, tmp_path, monkeypatch, key):
    run = with_out(gemma_run[0], tmp_path)
    monkeypatch.setattr(targets, "check_health", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_targets(run)
    path = run.folder.file("targets.chunks/chunks.json")
    begun = read_json(path)
    path.write_text(json.dumps(begun | {key: "another"}))
    with pytest.raises(ArtefactError, match=f"made with {key} = 'another', this run has .*to begin this stage anew"):
        make_targets(run)
    path.write_text(json.dumps(begun))
    with pytest.raises(KeyboardInterrupt):
        make_targets(run)


def test_an_older_folder_is_refused_and_says_what_to_do(gemma_run, tmp_path):
    folder = with_out(gemma_run[0], tmp_path).folder
    folder.save("targets", {})
    path = folder.file("targets.safetensors.json")
    record = read_record(path)
    spec = record.pop("spec")
    write_record(path, {**record, "identity": spec})
    with pytest.raises(ArtefactError, match=f"of an older version, .*{NEXT}"):
        folder.load("targets")


# What is shown


@pytest.mark.parametrize("name", ["av-some-layer13", "corpus-x-seed1", "layer13"])
def test_a_run_is_shown_whatever_its_name(name):
    base = next(r for r in find_results() if (r.backbone, r.profile) == ("gemma3-270m", "quick"))
    assert without_variants([dataclasses.replace(base, profile=f"quick-{name}")])


def test_what_varies_is_in_the_records():
    base = next(r for r in find_results() if (r.backbone, r.profile) == ("gemma3-270m", "quick"))

    def other(name="targets", **facts):
        data = copy.deepcopy(base.data)
        data[name] |= facts
        return dataclasses.replace(base, data=data)

    identity = base.data["targets"]["identity"]
    swept = [other(identity=identity | {"layer": 9}), other(identity=identity | {"seed": 2})]
    assert all(r.is_variant and r.family == base.family for r in swept) and not base.is_variant
    sizes = base.data["targets"]["sizes"]
    others = [
        other(sizes=sizes | {"K": 3}),
        other(corpus_sha256="a", corpus="x-seed1"),
        other(corpus_sha256="b"),
        other(released_targets="a"),
        other("training", av_sha256="a"),
        other("training", av_sha256="b"),
    ]
    assert len({r.family for r in [base, *others]}) == 7 and not any(r.is_variant for r in others)
    assert others[1].size == "640 targets of x-seed1"


# The code


def test_a_repository_further_up_is_not_this_one(tmp_path, monkeypatch):
    inside = tmp_path / "vendor" / "copy"
    inside.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(tmp_path), *author, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(artefacts, "ROOT", inside)
    assert code_version.__wrapped__() == {"git_commit": None, "dirty": None}
    monkeypatch.setattr(artefacts, "ROOT", tmp_path)
    assert len(code_version.__wrapped__()["git_commit"]) == 40


def test_a_stray_project_beside_an_installed_package_makes_no_checkout(tmp_path):
    package = tmp_path / "nla_utils"
    package.mkdir()
    for name in ("config.py", "errors.py"):
        shutil.copy(config.PACKAGE / name, package)
    (package / "__init__.py").write_text("")
    (tmp_path / "pyproject.toml").write_text("")

    def is_checkout():
        program = "from nla_utils import config; print(config.CHECKOUT, config.PACKAGE)"
        done = subprocess.run(["python3", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert is_checkout() == ["True", str(package)]
    (package / "data").mkdir()
    assert is_checkout()[0] == "False"


# Notebooks


def test_a_configuration_cell_can_be_run_again():
    namespace = {"profile": "smoke", "seed": 3}
    assert RunConfig.from_notebook(namespace).seed == 3
    namespace |= {"name": "tiny", "floor": 0.5, "seed": 4}
    assert RunConfig.from_notebook(namespace).seed == 4
    namespace["seed"] = "abc"
    with pytest.raises(ConfigError, match="seed is 'abc'"):
        RunConfig.from_notebook(namespace)
    with pytest.raises(ConfigError, match="unknown parameter 'proflie': did you mean 'profile'"):
        RunConfig.from_notebook({"proflie": "smoke"})


def test_no_notebook_gives_a_parameter_another_value():
    """The configuration cell, run again, reads what the parameters cell said."""
    for path in sorted((config.DATA / "notebooks").glob("**/0[1-8]_*.ipynb")):
        if "executed" in path.parts:
            continue
        cells = [c for c in read_json(path)["cells"] if c["cell_type"] == "code"]
        for cell in cells:
            source = "".join(line for line in cell["source"] if not line.startswith("%"))
            if "parameters" in cell["metadata"].get("tags", []):
                continue
            stored = {n.id for s in ast.parse(source).body for n in names_stored(s)}
            assert not stored & {f.name for f in dataclasses.fields(RunConfig)}, (path.name, stored)


def names_stored(statement):
    """Names that a statement binds in the notebook: not those of comprehensions."""
    inner = {n for c in ast.walk(statement) if isinstance(c, ast.comprehension) for n in ast.walk(c.target)}
    found = (n for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return [n for n in found if n not in inner]
