"""What a release of a run consists of: the AV, its evaluation, the targets, and cards generated from the results."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nla_utils.errors import ArtefactError, SourceError
from nla_utils.lm.weights import REGISTRY, explain, failures, weights_note
from nla_utils.report.pages import render, tables_of_run
from nla_utils.report.results import RunResults, load_results
from nla_utils.store import RunFolder, atomic_write, sha256_file

EVALUATION = ("oracle_ceiling", "centered_eval", "rerank_eval")


@dataclass(frozen=True)
class Release:
    """Two folders ready to upload: a model repository and a dataset repository."""

    model: Path
    dataset: Path

    def files(self, folder: Path) -> list[Path]:
        return sorted(p for p in folder.rglob("*") if p.is_file())


def make_release(folder: RunFolder, texts: list[str], out: Path) -> Release:
    """Write both folders below ``out``; whatever was there is replaced.

    Args:
        folder: a finished run.
        texts: of the targets, in their order.

    Raises ``ArtefactError`` if a stage of the run is missing.
    """
    results = load_results(folder.path)
    if results is None or not folder.file("av/config.json").exists():
        raise ArtefactError(f"{folder.path} is not a finished run; run notebooks 01 to 05 first")
    targets = folder.load("targets")
    release = Release(out / "av", out / "targets")
    shutil.rmtree(out, ignore_errors=True)
    for name in ("best_av.safetensors", "best_av.pt", "config.json"):
        atomic_write(release.model / name, folder.file(f"av/{name}").read_bytes())
    for name in EVALUATION:
        atomic_write(release.model / "eval" / f"{name}.json", (results.folder / f"{name}.json").read_bytes())
    atomic_write(release.model / "README.md", model_card(results).encode())
    atomic_write(release.dataset / "targets.safetensors", targets.path.read_bytes())
    frame = pd.DataFrame({"row": range(len(texts)), "part": parts(results, len(texts)), "text": texts})
    frame["length"] = targets.tensors["lengths"]
    frame.to_parquet(release.dataset / "targets.parquet", index=False)
    atomic_write(release.dataset / "README.md", dataset_card(results, release.dataset).encode())
    return release


def parts(results: RunResults, n: int) -> list[str]:
    """Which part of the run each target belongs to: in-sample, pool, training, held-out."""
    sizes = results.data["targets"]["sizes"]
    m, pool = sizes["M"], sizes["pool"]
    return ["in_sample"] * m + ["pool"] * pool + ["training"] * (n - 2 * m - pool) + ["held_out"] * m


def model_card(results: RunResults) -> str:
    """The model card: the paper's tables with intervals, controls and both protocols."""
    facts, training, commit = (results.data[k] for k in ("targets", "training", "centered_eval"))
    return render(
        Path(__file__).with_name("model_card.md.j2"),
        facts=facts,
        identity=facts["identity"],
        sizes=facts["sizes"],
        training=training,
        commit=commit["code"]["git_commit"],
        tables=tables_of_run(results).values(),
        license=_license(facts),
        weights=weights_note([facts["identity"]["backbone"]]),
    )


def dataset_card(results: RunResults, folder: Path) -> str:
    """The dataset card: what the files hold, how the targets were drawn, their health."""
    facts = results.data["targets"]
    files = [(p.name, f"{p.stat().st_size:,}", sha256_file(p)) for p in sorted(folder.glob("targets.*"))]
    return render(
        Path(__file__).with_name("dataset_card.md.j2"),
        facts=facts,
        identity=facts["identity"],
        sizes=facts["sizes"],
        files=files,
        license=_license(facts),
        weights=weights_note([facts["identity"]["backbone"]]),
    )


def _license(facts: dict) -> str | None:
    """Of the backbone's weights, which holds for what derives from them."""
    spec = REGISTRY.get(facts["identity"]["backbone"])
    return spec and spec.license


def push(release: Release, model_repo: str, dataset_repo: str) -> list[str]:
    """Upload both folders with huggingface_hub; returns the commits' addresses. Needs a signed-in token.

    Raises ``SourceError`` for what the hub refuses, and where it cannot be reached.
    """
    from huggingface_hub import HfApi

    api, done = HfApi(), []
    for folder, repo, kind in ((release.model, model_repo, "model"), (release.dataset, dataset_repo, "dataset")):
        try:
            api.create_repo(repo, repo_type=kind, exist_ok=True)
            commit = api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind, commit_message="Release")
        except failures() as error:
            raise SourceError(explain(repo, "", kind, error)) from None
        done.append(f"{repo} @ {commit.oid}")
    return done
