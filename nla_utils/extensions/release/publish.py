"""What a release of a run consists of: the AV, its evaluation, the targets, and cards generated from the results."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nla_utils.artefacts import RunFolder, atomic_write, sha256_file
from nla_utils.errors import ArtefactError
from nla_utils.paper import claims, tables
from nla_utils.paper.audit import audit_table
from nla_utils.paper.results import RunResults, load_results

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
    """The model card: the seed's tables with intervals, controls and both protocols."""
    facts, training = results.data["targets"], results.data["training"]
    sizes = facts["sizes"]
    identity = facts["identity"]
    about = [
        ("Backbone (frozen)", f"{identity['backbone']}, {identity['dtype']}, weights {identity['weight_hash']}"),
        ("Layer", f"{identity['layer']} of {facts['num_layers']}, hidden_states[{identity['layer']}]"),
        ("Trainable parameters", f"{training['trainable_params']:,}"),
        ("Training", f"{training['train_pairs']} pairs, {training['steps']} steps, kept step {training['best_step']}"),
        ("Targets", f"N {sizes['N']}, held out {sizes['M']}, pool {sizes['pool']}, seed {identity['seed']}"),
        ("Code", f"commit {results.data['centered_eval']['code']['git_commit']}"),
    ]
    shown = (
        ("Headline", tables.headline_table(results)),
        ("Scorecard", claims.scorecard(results)),
        ("Ceilings, centred", tables.ceilings_table(results, "cen")),
        ("Ceilings, raw", tables.ceilings_table(results, "raw")),
        ("Evaluation, centred", tables.evaluation_table(results, "cen")),
        ("Evaluation, raw", tables.evaluation_table(results, "raw")),
        ("ρ", tables.rho_table(results)),
        ("K-curve", tables.k_curve_table(results)),
        ("Cheap reranks", tables.rerank_table(results)),
        ("What the slips of the published measurement move here", audit_table(results)),
    )
    return (
        "---\nlibrary_name: pytorch\ntags:\n- interpretability\n- activation-verbalizer\n---\n\n"
        f"# Activation verbalizer for {identity['backbone']}, layer {identity['layer']}\n\n"
        "A linear map and a few prefix vectors in front of a frozen language model: given a hidden activation v, the "
        "model writes text. Every number is reported twice from the same rollouts, as published (*paper protocol*) and "
        "*corrected*, with controls; brackets are 95 % bootstrap intervals over targets.\n\n"
        + tables.markdown(pd.DataFrame(about, columns=["", "value"]).set_index(""))
        + "".join(f"\n## {title}\n\n{tables.markdown(frame)}" for title, frame in shown)
    )


def dataset_card(results: RunResults, folder: Path) -> str:
    """The dataset card: what the files hold, how the targets were drawn, their health."""
    facts = results.data["targets"]
    identity, sizes = facts["identity"], facts["sizes"]
    rows = [(p.name, f"{p.stat().st_size:,}", sha256_file(p)) for p in sorted(folder.glob("targets.*"))]
    health = ", ".join(f"{k} {v:.5g}" for k, v in facts["health"].items())
    return (
        "---\ntags:\n- interpretability\n---\n\n"
        f"# Target activations of {identity['backbone']}, layer {identity['layer']}\n\n"
        f"{sizes['N']} sequences of up to {sizes['T']} tokens drawn from a single start token (temperature 1, top_k "
        f"50, seed {identity['seed']}), and the activation hidden_states[{identity['layer']}] at the last token of "
        "each, behind BOS.\n\n"
        "`targets.parquet`: row, part (in_sample, pool, training, held_out), text, length in tokens. "
        "`targets.safetensors`: ids (N, T), lengths (N,), v (N, d) float32, rows in the same order.\n\n"
        + tables.markdown(pd.DataFrame(rows, columns=["file", "bytes", "sha256"]).set_index("file"))
        + f"\nMean length {facts['length_mean']:.1f}, {facts['ended_share']:.1%} end in EOS, "
        f"‖μ‖ {facts['mu_norm']:.1f}; health: {health}.\n"
    )


def push(release: Release, model_repo: str, dataset_repo: str) -> list[str]:
    """Upload both folders with huggingface_hub; returns the commits' addresses. Needs a signed-in token."""
    from huggingface_hub import HfApi

    api, done = HfApi(), []
    for folder, repo, kind in ((release.model, model_repo, "model"), (release.dataset, dataset_repo, "dataset")):
        api.create_repo(repo, repo_type=kind, exist_ok=True)
        commit = api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind, commit_message="Release")
        done.append(f"{repo} @ {commit.oid}")
    return done
