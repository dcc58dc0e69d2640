"""Pools: unrelated texts and their activations, which μ is the mean of and which every score stands beside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import numpy as np

from nla_extensions.release.bundle import config_of
from nla_utils.config import PROFILES
from nla_utils.encoding import nats_per_token
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import SamplingSettings, row_streams
from nla_utils.store import ChunkStore, RunFolder, json_hash, made_once
from nla_utils.targets import Targets, corpus_rows, draw_chunk, read_texts

ARTEFACT = "pool"
# Unrelated texts of a pool that nobody asked for another size of: bits at K 64 can be told up to 4.
SIZE = 1024
LENGTH = PROFILES["full"].max_new_tokens
# Texts of a corpus that are encoded together, between two places to resume at.
CHUNK = 256


@dataclass(frozen=True)
class Pool:
    """P texts (token ids), their activations (P, d), and, where they were taken, their nats a token (P,).

    μ, the floor and retrieval are of the first ``size``; the null is of all. ``about`` says what it is.
    """

    ids: list[list[int]]
    v: np.ndarray
    size: int
    nats: Optional[np.ndarray]
    about: dict

    @property
    def mu(self) -> np.ndarray:
        """μ (d,)."""
        return self.v[: self.size].mean(axis=0)

    def without(self, left_out_P: np.ndarray) -> "Pool":
        """The pool without some of its texts (P,) bool."""
        kept, size = np.flatnonzero(~left_out_P), int((~left_out_P[: self.size]).sum())
        nats = None if self.nats is None else self.nats[kept]
        return replace(self, ids=[self.ids[i] for i in kept], v=self.v[kept], size=size, nats=nats)


def make_pool(backbone: Backbone, n: int = SIZE, corpus: Optional[Path] = None, seed: int = 1) -> tuple[Pool, Path]:
    """n texts drawn from the start token as the targets of §11 are, or the first n of a corpus, and their folder in the
    cache, where they are found the next time.

    Raises ``ConfigError`` for fewer than two, ``ArtefactError`` for a corpus that has fewer or cannot be read.
    """
    if n < 2:
        raise ConfigError(f"n is {n}; a pool has at least 2 texts")
    settings = SamplingSettings(LENGTH)
    rows = corpus and corpus_rows(read_texts(corpus), corpus, backbone.tokenizer, n, LENGTH)
    of = {"corpus": json_hash(rows)} if rows else {"sampling": settings.record(), "seed": seed}
    identity = {**backbone.identity(), "n": n, **of}

    def draw(part: slice) -> dict[str, np.ndarray]:
        if rows:
            lengths = np.array([len(ids) for ids in rows[part]], dtype=np.int32)
            made = {"ids": np.zeros((len(lengths), LENGTH), dtype=np.int32), "lengths": lengths}
            for row, ids in zip(made["ids"], rows[part]):
                row[: len(ids)] = ids
            made["v"] = backbone.encode(rows[part], start=True)
        else:
            made = draw_chunk(backbone, settings, row_streams(seed, ARTEFACT, range(part.start, part.stop)))
        return made | {"nats": nats_per_token(backbone, _sequences(made["ids"], made["lengths"]))}

    def make(folder: RunFolder) -> None:
        chunks = ChunkStore(folder.file("pool.chunks"), folder.conditions)
        tensors = chunks.fill(n, min(backbone.sample_batch, CHUNK), draw, "drawing the pool", "text")
        folder.save(ARTEFACT, tensors, corpus=corpus and corpus.name)
        chunks.clear()

    name = f"{backbone.name}-layer{backbone.layer}"
    folder = made_once("pools", name, identity, backbone.device.type, ARTEFACT, make)
    return load_pool(folder.path, backbone), folder.path


def pool_of(given: Optional[str | Path | Pool], backbone: Backbone) -> Pool:
    """A pool as it is, that of a folder, or where none is given the one that is drawn and kept in the cache."""
    if given is None:
        return make_pool(backbone)[0]
    return given if isinstance(given, Pool) else load_pool(Path(given), backbone)


def load_pool(path: Path, backbone: Backbone) -> Pool:
    """The pool of a folder that :func:`make_pool` filled, or of a finished run: its pool, and as the null all targets
    that no protocol evaluates. Raises ``ArtefactError`` where there is none, or of another backbone or layer."""
    folder = RunFolder(path.resolve(), backbone.identity())
    if folder.has(ARTEFACT):
        held, sidecar = folder.load(ARTEFACT).tensors, folder.sidecar(ARTEFACT)
        ids = _sequences(held["ids"], held["lengths"])
        first = {tuple(row): i for i, row in reversed(list(enumerate(ids)))}
        again_P = np.array([first[tuple(row)] != i for i, row in enumerate(ids)])
        about = {"pool": sidecar["corpus"] or "drawn from the start token", "duplicates left out": int(again_P.sum())}
        return Pool(ids, held["v"], len(ids), held["nats"], about).without(again_P)
    if not folder.has("targets"):
        raise ArtefactError(f"{path} holds no pool; give the folder that `nla pool` names, or that of a finished run")
    targets = Targets.of(folder.load("targets"), config_of(folder, backbone))
    rows = targets.unevaluated[targets.lengths[targets.unevaluated] > 0]
    size = int(np.isin(rows, targets.pool).sum())
    return Pool(targets.sequences(rows), targets.v[rows], size, None, {"pool": f"targets of {path.name}"})


def _sequences(ids_PT: np.ndarray, lengths_P: np.ndarray) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(ids_PT, lengths_P)]
