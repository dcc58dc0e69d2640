"""Target activations: draw sequences from the start token, extract v, check the pool (PROTOCOL.md §1)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from nla_utils.artefacts import SPECS, Artefact, require_disk
from nla_utils.chunks import ChunkStore
from nla_utils.config import FLOOR_ROWS, ROOT, RunConfig
from nla_utils.errors import CollapsedTargetsError
from nla_utils.lm.backbone import Backbone, check_finite
from nla_utils.lm.registry import resolve
from nla_utils.lm.releases import fetch_targets, targets_content
from nla_utils.lm.sampling import Samples, SamplingSettings, row_streams, sample
from nla_utils.metrics import fve_matrix
from nla_utils.protocol import Protocol
from nla_utils.run import Run
from nla_utils.stages.corpus import LEAST_TOKENS, corpus_hash, corpus_targets, read_texts
from nla_utils.stages.released import read_released

ARTEFACT = "targets"


@dataclass
class Targets:
    """N sequences and the activation at the last token of each.

    ``ids`` (N, T) int32 right-padded, generated tokens only; ``lengths`` (N,), 0 where a released target's text is not
    known, so that it can't be replayed or trained on; ``v`` (N, d) float32.
    Rows are used in four parts: the first M as the paper evaluates them (``in_sample``), the next
    ``pool``, then training only, and the last M, which training never sees (``held_out``).
    """

    ids: np.ndarray
    lengths: np.ndarray
    v: np.ndarray
    n_eval: int
    pool_size: int
    sha256: str

    @property
    def in_sample(self) -> np.ndarray:
        return np.arange(self.n_eval)

    @property
    def pool(self) -> np.ndarray:
        return np.arange(self.n_eval, self.n_eval + self.pool_size)

    @property
    def unevaluated(self) -> np.ndarray:
        """All rows that no protocol evaluates: the pool, and what is for training only."""
        return np.arange(self.n_eval, len(self.v) - self.n_eval)

    @property
    def held_out(self) -> np.ndarray:
        return np.arange(len(self.v) - self.n_eval, len(self.v))

    def eval_rows(self, protocol: Protocol) -> np.ndarray:
        """Rows of the targets that a protocol evaluates: held-out ones, or the first of the training set."""
        return self.held_out if protocol.held_out else self.in_sample

    @property
    def mu(self) -> np.ndarray:
        """μ (d,): mean of the pool."""
        return self.v[self.pool].mean(axis=0)

    def sequence(self, i: int) -> list[int]:
        """Generated token ids of target i, EOS included where it has one, no start token."""
        return self.ids[i, : self.lengths[i]].tolist()

    def sequences(self, rows: np.ndarray) -> list[list[int]]:
        return [self.sequence(i) for i in rows]

    @property
    def texts(self) -> dict[str, np.ndarray]:
        """``ids`` and ``lengths``: what is the same for every layer that is read from them."""
        return {"ids": self.ids, "lengths": self.lengths}

    @classmethod
    def of(cls, artefact: Artefact, config: RunConfig) -> "Targets":
        t, sizes = artefact.tensors, config.sizes
        return cls(t["ids"], t["lengths"], t["v"], sizes.n_eval, sizes.pool_size, artefact.sha256)


def sequences_hash(ids: np.ndarray, lengths: np.ndarray) -> str:
    """Hex sha256 over ids (N, T) and lengths (N,) as int32."""
    return hashlib.sha256(ids.astype("<i4").tobytes() + lengths.astype("<i4").tobytes()).hexdigest()


def target_settings(config: RunConfig) -> SamplingSettings:
    """How a run's sequences are sampled."""
    return SamplingSettings(max_new_tokens=config.sizes.max_new_tokens)


def spec(config: RunConfig) -> dict:
    """What targets depend on beside the run's identity: how many, and how they are drawn or whose they are."""
    sizes, released, corpus = config.sizes, config.released_targets, config.corpus
    return {
        "n_targets": sizes.n_targets,
        "released_targets": released and targets_content(released, resolve(config.backbone)),
        "corpus_sha256": corpus and corpus_hash(read_texts(ROOT / corpus)),
        "corpus_tokens": corpus and [LEAST_TOKENS, sizes.max_new_tokens],
        "target_sampling": None if released or corpus else target_settings(config).record(),
    }


SPECS[ARTEFACT] = spec


def make_targets(run: Run) -> Targets:
    """The run's targets: from disk, from a release or a corpus if the run names one, or drawn and extracted.

    Raises ``ArtefactError`` if what is on disk is another run's or there is no room, ``CollapsedTargetsError`` or
    ``BackboneError`` if the activations are not healthy.
    """
    if run.folder.has(ARTEFACT):
        return load_targets(run)
    if run.config.released_targets is not None:
        return take_released(run)
    if run.config.corpus is not None:
        return take_corpus(run)
    n, d, settings = run.sizes.n_targets, run.backbone.d, target_settings(run.config)
    require_disk(run.folder.path, 3 * n * (d + run.sizes.max_new_tokens) * 4)
    plan = {**run.folder.conditions, **spec(run.config), "batch": run.backbone.sample_batch}
    chunks = ChunkStore(run.folder.file("targets.chunks"), plan)

    def draw(c: int, rows: slice) -> dict[str, np.ndarray]:
        return draw_chunk(run.backbone, settings, target_streams(run, rows))

    targets = save_targets(run, chunks.fill(n, run.backbone.sample_batch, draw, "drawing targets", "seq"))
    chunks.clear()
    return targets


def target_streams(run: Run, rows: slice) -> np.ndarray:
    """Keys of the random streams that some of the run's sequences are drawn from."""
    return row_streams(run.seed, "targets", range(rows.start, rows.stop))


def save_targets(run: Run, tensors: dict[str, np.ndarray]) -> Targets:
    """Keep drawn targets, if they are healthy (see :func:`check_health`)."""
    facts = {"sampling": target_settings(run.config).record(), "health": check_health(tensors["v"])}
    return Targets.of(run.folder.save(ARTEFACT, tensors, seed=run.seed, **facts), run.config)


def take_released(run: Run) -> Targets:
    """The first N released targets as this run's; raises ``SourceError`` or ``ArtefactError`` if they do not fit."""
    released = run.config.released_targets
    path = fetch_targets(released, run.backbone.spec)
    tensors, found = read_released(path, run.backbone, run.sizes.n_targets)
    facts = {"released": released, "released_from": path.parent.name, "file": path.name, **found}
    facts["health"] = check_health(tensors["v"])
    return Targets.of(run.folder.save(ARTEFACT, tensors, seed=run.seed, **facts), run.config)


def take_corpus(run: Run) -> Targets:
    """The first N texts of the run's corpus as its targets; raises ``ArtefactError`` if they do not do."""
    path = ROOT / run.config.corpus
    texts = read_texts(path)
    tensors = corpus_targets(texts, path, run.backbone, run.sizes.n_targets, run.sizes.max_new_tokens)
    facts = {"corpus": path.name, "health": check_health(tensors["v"])}
    return Targets.of(run.folder.save(ARTEFACT, tensors, seed=run.seed, **facts), run.config)


def load_targets(run: Run) -> Targets:
    """Targets made by notebook 01; raises ``ArtefactError`` if they are missing, of another run or corpus, or broken."""
    return Targets.of(run.folder.load(ARTEFACT), run.config)


def draw_chunk(backbone: Backbone, settings: SamplingSettings, streams_B: np.ndarray) -> dict[str, np.ndarray]:
    """A sequence a stream from the start token and the activation at the end of each: ids, lengths, v."""
    samples = draw_sequences(backbone, settings, streams_B)
    v = backbone.encode([samples.sequence(i) for i in range(len(streams_B))], start=True)
    return {"ids": samples.ids, "lengths": samples.lengths, "v": v}


def draw_sequences(backbone: Backbone, settings: SamplingSettings, streams_B: np.ndarray) -> Samples:
    """One sequence a stream, sampled freely from the start token."""
    return sample(backbone, backbone.embed(torch.full((len(streams_B), 1), backbone.start_id)), settings, streams_B)


def check_health(v_Nd: np.ndarray) -> dict:
    """Check that activations are finite and not collapsed into one vector; returns the figures judged by.

    The BOS = EOS trap of PROTOCOL.md §1. Raises ``BackboneError`` or ``CollapsedTargetsError``.
    """
    check_finite(v_Nd, "target activations")
    # A release may hold float16, whose squares end at 256.
    v_Nd = v_Nd.astype(np.float32, copy=False)
    spread = float(np.sqrt(v_Nd.var(axis=0).mean()))
    size = float(np.sqrt((v_Nd**2).mean()))
    distinct = len(np.unique(v_Nd, axis=0))
    if spread < 1e-4 * size or distinct < 0.5 * len(v_Nd):
        raise CollapsedTargetsError(
            f"{distinct} distinct vectors among {len(v_Nd)} targets, spread {spread:.3g} at size {size:.3g}: either many "
            f"texts are the same (or end in the same few tokens), or sequences were cut at the start token because it is "
            f"also an EOS"
        )
    return {"rms": size, "std": spread, "distinct": distinct}


def describe(run: Run, targets: Targets) -> dict:
    """The figures of notebook 01: lengths, ‖v‖, ‖μ‖, the share of the mean square along μ, cosines; of which corpus."""
    backbone, v, mu = run.backbone, targets.v.astype(np.float64), targets.mu.astype(np.float64)
    along = v @ (mu / np.linalg.norm(mu))
    cosine = {kind: unrelated_cosines(targets, kind == "cen") for kind in ("raw", "cen")}
    given, corpus = spec(run.config), run.config.corpus
    return {
        **({"corpus": Path(corpus).name.removesuffix(".jsonl")} if corpus else {}),
        **{k: given[k] for k in ("released_targets", "corpus_sha256") if given[k]},
        "sequences": sequences_hash(**targets.texts),
        "num_layers": backbone.n_layers,
        "hidden_size": backbone.d,
        "length_mean": _mean(targets.lengths[targets.lengths > 0]),
        "ended_share": _mean(np.isin(_last_ids(targets), backbone.eos_ids)),
        "embedding_norm_mean": embedding_norm(targets, backbone),
        "v_norm_mean": float(np.linalg.norm(v, axis=1).mean()),
        "mu_norm": float(np.linalg.norm(mu)),
        "mean_square_share_along_mu": float((along**2).sum() / (v**2).sum()),
        "variance_share_along_mu": float(along.var() / v.var(axis=0).sum()),
        **{f"unrelated_cosine_{k}_mean": float(c.mean()) for k, c in cosine.items()},
        **{f"unrelated_cosine_{k}_std": float(c.std()) for k, c in cosine.items()},
        "health": check_health(targets.v),
    }


def embedding_norm(targets: Targets, backbone: Backbone) -> Optional[float]:
    """Mean norm of the token embeddings of one target's text after another, through the module."""
    ids = torch.tensor([i for s in targets.sequences(targets.in_sample) for i in s], dtype=torch.long)
    with torch.inference_mode():
        return _mean(backbone.embed(ids).float().norm(dim=-1))


def _last_ids(targets: Targets) -> np.ndarray:
    known = np.flatnonzero(targets.lengths)
    return targets.ids[known, targets.lengths[known] - 1]


def _mean(values: np.ndarray | torch.Tensor) -> Optional[float]:
    """The mean, ``None`` of nothing: no text is known."""
    return float(values.mean()) if len(values) else None


def unrelated_cosines(targets: Targets, centred: bool) -> np.ndarray:
    """Cosines of all unordered pairs of the pool's first 512 targets, raw or centred by μ."""
    pool = targets.v[targets.pool][:FLOOR_ROWS]
    scores = fve_matrix(pool, pool, targets.mu if centred else None)
    return 2 * scores[np.triu_indices(len(pool), 1)] - 1
