"""A bundle: everything that reading an activation needs, small enough to ship with the repository.

``bundles/<backbone>/``: ``av.safetensors`` (float32, the paper's AV), ``reader.safetensors`` (A_j in half
precision, prior), ``reference.safetensors`` (means, whitening, some of the pool's texts), ``bundle.json``
(identity, what the weights are, AV config, hashes).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from safetensors.numpy import load_file, save

from nla_extensions.tail_reader.reader import TailReader, half_norms, load_reader, reader_from
from nla_utils.config import DATA, AVConfig, RunConfig
from nla_utils.errors import ArtefactError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.weights import resolve, weights_note
from nla_utils.run import Run
from nla_utils.store import (
    RunFolder,
    atomic_write,
    code_version,
    made_once,
    read_record,
    require_same,
    sha256_file,
    write_record,
)
from nla_utils.targets import load_targets
from nla_utils.verbalizer import ActivationVerbalizer, import_av, load_av

BUNDLES = DATA / "bundles"
# Tokens that a shipped reader writes, and texts that it retrieves from: what keeps each file under 5 MB.
SHIPPED_TAIL = 4
SHIPPED_TEXTS = 512
FILES = ("av.safetensors", "reader.safetensors", "reference.safetensors")
IDENTITY = ("backbone", "weight_hash", "layer", "start_id")
FROM_MODEL = "from_model"
# Artefacts of a run that a bundle is made from.
PARENTS = ("targets", "best_av", "reader")


@dataclass
class Bundle:
    """``mu`` (d,); ``pool_v`` (P, d) and ``pool_texts``, the stored activations and the ids they came from;
    ``made_from``: hashes of the files or artefacts that all this was read from."""

    reader: TailReader
    av: ActivationVerbalizer
    mu: np.ndarray
    pool_v: np.ndarray
    pool_texts: list[list[int]]
    made_from: dict[str, str]

    @staticmethod
    def layer_of(backbone: str, run: Optional[Path]) -> Optional[int]:
        """The layer that a run's or a shipped bundle's verbalizers read; ``None`` if there are none to ask."""
        if run is not None:
            return RunFolder(run).sidecar("targets")["spec"]["layer"]
        record = BUNDLES / resolve(backbone).name / "bundle.json"
        return read_record(record)["identity"]["layer"] if record.exists() else None


def load_bundle(backbone: Backbone, run: Optional[Path]) -> Bundle:
    """The bundle of a run folder, or the shipped one; raises ``ArtefactError`` if it does not fit."""
    return _of_run(backbone, run) if run is not None else _shipped(backbone)


def config_of(folder: RunFolder, backbone: Backbone) -> RunConfig:
    """The configuration of a finished run as far as its targets depend on it; raises ``ArtefactError`` where notebook
    01 has not been run."""
    sizes = read_record(folder.file("results/targets.json"))["sizes"]
    return RunConfig(
        backbone=backbone.name, n_targets=sizes["N"], n_eval=sizes["M"], pool_size=sizes["pool"], n_rollouts=sizes["K"]
    )


def _of_run(backbone: Backbone, path: Path) -> Bundle:
    folder = RunFolder(path.resolve(), {k: v for k, v in backbone.identity().items() if k in IDENTITY})
    run = Run(config_of(folder, backbone), folder, backbone)
    targets, av = load_targets(run), import_av(path / "av", backbone).eval()
    made_from = {name: folder.sha256_of(name) for name in PARENTS}
    return Bundle(load_reader(run), av, targets.mu, targets.v[targets.pool], targets.sequences(targets.pool), made_from)


def _shipped(backbone: Backbone) -> Bundle:
    folder = BUNDLES / backbone.name
    record, own = read_record(folder / "bundle.json"), {key: backbone.identity()[key] for key in IDENTITY}
    require_same(folder, record["identity"], own, "give the folder of a run of this backbone (run=, --run)")
    for name, digest in record["sha256"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise ArtefactError(f"{folder / name} is not the file that bundle.json names; restore it from git")
    own_av, packed, reference = (load_file(folder / name) for name in FILES)
    av = ActivationVerbalizer.of(AVConfig(**record["av_config"]), backbone)
    av.load_trainable({k: torch.from_numpy(x) for k, x in own_av.items()}, str(folder))
    # Half precision back to float32.
    names = ("weights", "whiten", "mean", "embedding_mean", "log_prior")
    tensors = {k: (packed | reference)[k].astype(np.float32) for k in names}
    texts = [row[:n].tolist() for row, n in zip(reference["ids"], reference["lengths"])]
    made = _made_with(backbone, tensors, texts, record["sha256"])
    reader = reader_from(tensors | {"half_norm": made["half_norm"]}, backbone)
    return Bundle(reader, av.eval(), reference["mu"], made["pool_v"], texts, record["sha256"])


def _made_with(backbone: Backbone, tensors: dict, texts: list[list[int]], hashes: dict) -> dict[str, np.ndarray]:
    """What a bundle leaves for the model to make: the stored texts' activations, and what follows from the embedding
    table. Made once and kept in the cache."""

    def make(folder: RunFolder) -> None:
        weights_nad, mean_d = (torch.from_numpy(tensors[k]) for k in ("weights", "embedding_mean"))
        half_norm = half_norms(backbone.embedding_table(), weights_nad, mean_d.to(backbone.device)).cpu().numpy()
        folder.save(FROM_MODEL, {"pool_v": backbone.encode(texts, start=True), "half_norm": half_norm})

    identity = {**backbone.identity(), "bundle": hashes}
    folder = made_once("bundles", backbone.name, identity, backbone.device.type, FROM_MODEL, make)
    return folder.load(FROM_MODEL).tensors


def write_bundle(run: Run, out: Path) -> list[Path]:
    """Pack a run's verbalizers into ``out``; returns the files."""
    folder, targets, av = run.folder, load_targets(run), load_av(run)
    reader, shown = folder.load("reader").tensors, targets.pool[:SHIPPED_TEXTS]
    # A reader of n tokens holds the ones of fewer tokens: positions farther back only explain more of v.
    packed = {
        "weights": reader["weights"][:SHIPPED_TAIL].astype(np.float16),
        "log_prior": np.maximum(reader["log_prior"], -1e4).astype(np.float16),
    }
    reference = {"ids": targets.ids[shown], "lengths": targets.lengths[shown], "mu": targets.mu}
    reference |= {k: reader[k] for k in ("whiten", "mean", "embedding_mean")}
    for name, tensors in zip(FILES, ({k: v.numpy() for k, v in av.trainable().items()}, packed, reference)):
        atomic_write(out / name, save({k: np.ascontiguousarray(v) for k, v in tensors.items()}))
    record = {
        "identity": {k: v for k, v in folder.identity.items() if k in IDENTITY},
        "weights": weights_note([folder.identity["backbone"]]),
        "av_config": asdict(av.config),
        "sha256": {name: sha256_file(out / name) for name in FILES},
        "made_from": {name: folder.sha256_of(name) for name in PARENTS},
        "profile": run.config.folder_name,
        "code": code_version(),
    }
    write_record(out / "bundle.json", record)
    return [out / name for name in (*FILES, "bundle.json")]
