"""What a release of a run consists of: the AV, its evaluation, the targets, and cards generated from the results."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

from nla_utils import rows
from nla_utils.errors import ArtefactError
from nla_utils.evidence import FILE
from nla_utils.lm.weights import REGISTRY, HubFiles, weights_note
from nla_utils.report.pages import render, tables_of_run
from nla_utils.report.results import RunResults, load_results
from nla_utils.store import RunFolder, atomic_write, sha256_file

# Folders of a release: a model repository and a dataset repository.
MODEL, DATASET = "av", "targets"


def make_release(folder: RunFolder, texts: list[str], out: Path) -> None:
    """Write both folders of a finished run below ``out``, whatever was there; ``texts`` are the targets', in order.

    Raises ``ArtefactError`` if a stage of the run is missing.
    """
    results = load_results(folder.path)
    if results is None or not folder.file("av/config.json").exists():
        raise ArtefactError(f"{folder.path} is not a finished run; run notebooks 01 to 05 first")
    targets, model, dataset = folder.load("targets"), out / MODEL, out / DATASET
    shutil.rmtree(out, ignore_errors=True)
    for name in ("best_av.safetensors", "best_av.pt", "config.json"):
        atomic_write(model / name, folder.file(f"av/{name}").read_bytes())
    for name in (rows.CEILING_FILE, rows.EVALUATION_FILE, rows.RERANK_FILE):
        atomic_write(model / "eval" / f"{name}.json", (results.folder / f"{name}.json").read_bytes())
    # Results of older versions have none.
    if (evidence := folder.file(FILE)).exists():
        atomic_write(model / "eval" / evidence.name, evidence.read_bytes())
    atomic_write(model / "README.md", model_card(results).encode())
    atomic_write(dataset / "targets.safetensors", targets.path.read_bytes())
    n, m, pool = (results.data["targets"]["sizes"][key] for key in ("N", "M", "pool"))
    parts = ["in_sample"] * m + ["pool"] * pool + ["training"] * (n - 2 * m - pool) + ["held_out"] * m
    frame = pd.DataFrame({"row": range(n), "part": parts, "text": texts, "length": targets.tensors["lengths"]})
    frame.to_parquet(dataset / "targets.parquet", index=False)
    atomic_write(dataset / "README.md", dataset_card(results, dataset).encode())


def model_card(results: RunResults) -> str:
    """The model card: the paper's tables with intervals, controls and both protocols."""
    commit = results.data["centered_eval"]["code"]["git_commit"]
    values = {"training": results.data["training"], "commit": commit, "tables": tables_of_run(results).values()}
    return _card(
        "model_card.md.j2", results, **values, kept=(results.folder / Path(FILE).name).exists(), best=rows.BEST
    )


def dataset_card(results: RunResults, folder: Path) -> str:
    """The dataset card: what the files hold, how the targets were drawn, their health."""
    files = [(p.name, f"{p.stat().st_size:,}", sha256_file(p)) for p in sorted(folder.glob("targets.*"))]
    return _card("dataset_card.md.j2", results, files=files)


def _card(template: str, results: RunResults, **values: object) -> str:
    facts = results.data["targets"]
    backbone = facts["identity"]["backbone"]
    values |= {"facts": facts, "identity": facts["identity"], "sizes": facts["sizes"]}
    # The licence of the backbone's weights holds for what derives from them.
    values |= {"license": backbone in REGISTRY and REGISTRY[backbone].license, "weights": weights_note([backbone])}
    return render(Path(__file__).with_name(template), **values)


def push(out: Path, repo: str) -> list[str]:
    """Upload both folders below ``out`` to ``repo`` and ``repo``-targets with huggingface_hub; returns the commits'
    addresses. Needs a signed-in token.

    Raises ``SourceError`` for what the hub refuses, and where it cannot be reached.
    """
    from huggingface_hub import HfApi

    api, done = HfApi(), []
    for folder, name, kind in ((MODEL, repo, "model"), (DATASET, f"{repo}-targets", "dataset")):
        with HubFiles(name, (), kind).explained():
            api.create_repo(name, repo_type=kind, exist_ok=True)
            commit = api.upload_folder(repo_id=name, folder_path=out / folder, repo_type=kind, commit_message="Release")
        done.append(f"{name} @ {commit.oid}")
    return done
