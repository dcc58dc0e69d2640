"""Target activations: draw sequences from the start token, extract v, check the pool (PROTOCOL.md §1)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from nla_utils.backbone import Backbone, check_finite
from nla_utils.config import FLOOR_ROWS, RunConfig
from nla_utils.metrics import fve_matrix
from nla_utils.packs import read_released
from nla_utils.parallel import fill_chunks
from nla_utils.sampling import SAMPLE_BATCH, Samples, SamplingSettings, sample
from nla_utils.sources import fetch_targets
from nla_utils.store import Artefact, ChunkStore, RunFolder, derive_seed, require_disk

ARTEFACT = "targets"


class CollapsedTargetsError(RuntimeError):
    """The targets do not differ from each other (on Qwen: EOS found at the prompt position)."""


@dataclass
class Targets:
    """N sequences and the activation at the last token of each.

    ``ids`` (N, T) int32 right-padded, generated tokens only; ``lengths`` (N,); ``v`` (N, d) float32.
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
    def held_out(self) -> np.ndarray:
        return np.arange(len(self.v) - self.n_eval, len(self.v))

    def eval_rows(self, protocol: str) -> np.ndarray:
        """Targets that a protocol evaluates: ``paper`` its training data, ``corrected`` held-out ones."""
        return self.in_sample if protocol == "paper" else self.held_out

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
    def of(cls, artefact: Artefact, run: RunConfig) -> "Targets":
        t = artefact.tensors
        return cls(t["ids"], t["lengths"], t["v"], run.sizes.n_eval, run.sizes.pool_size, artefact.sha256)


def sequences_hash(ids: np.ndarray, lengths: np.ndarray) -> str:
    """Hex sha256 over ids (N, T) and lengths (N,) as int32."""
    return hashlib.sha256(ids.astype("<i4").tobytes() + lengths.astype("<i4").tobytes()).hexdigest()


def target_settings(run: RunConfig) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=run.sizes.max_new_tokens)


def make_targets(run: RunConfig, backbone: Backbone, folder: RunFolder) -> Targets:
    """Draw and extract the run's targets, take released ones if it names them, or load what is whole.

    Raises ``ArtefactError`` if what is on disk is another run's or there is no room,
    ``CollapsedTargetsError`` or ``BackboneError`` if the activations are not healthy.
    """
    if folder.has(ARTEFACT):
        return Targets.of(folder.load(ARTEFACT), run)
    if run.released_targets is not None:
        return take_released(run, backbone, folder)
    n = run.sizes.n_targets
    require_disk(folder.path, 3 * n * (backbone.d + run.sizes.max_new_tokens) * 4)
    settings = target_settings(run)
    plan = {**folder.identity, "n": n, "sampling": settings.record(), "batch": SAMPLE_BATCH}
    chunks = ChunkStore(folder.file("targets.chunks"), plan)

    def draw(c: int, rows: slice) -> dict[str, np.ndarray]:
        return draw_chunk(backbone, settings, rows.stop - rows.start, derive_seed(run.seed, "targets", c))

    tensors = fill_chunks(chunks, n, SAMPLE_BATCH, draw, "drawing targets", "seq")
    artefact = save_targets(run, folder, tensors)
    chunks.clear()
    return Targets.of(artefact, run)


def save_targets(run: RunConfig, folder: RunFolder, tensors: dict[str, np.ndarray]) -> Artefact:
    """Keep drawn targets, if they are healthy (see :func:`check_health`)."""
    health = check_health(tensors["v"])
    return folder.save(ARTEFACT, tensors, sampling=target_settings(run).record(), seed=run.seed, health=health)


def take_released(run: RunConfig, backbone: Backbone, folder: RunFolder) -> Targets:
    """The first N released targets as this run's; raises ``SourceError`` or ``ArtefactError`` if they do not fit."""
    source = fetch_targets(run.released_targets)
    tensors = read_released(source, backbone, run.sizes.n_targets)
    facts = {"released": run.released_targets, "released_from": source.name, "health": check_health(tensors["v"])}
    return Targets.of(folder.save(ARTEFACT, tensors, seed=run.seed, **facts), run)


def load_targets(run: RunConfig, folder: RunFolder) -> Targets:
    """Targets made by notebook 01; raises ``ArtefactError`` if they are missing, foreign or broken."""
    return Targets.of(folder.load(ARTEFACT), run)


def draw_chunk(backbone: Backbone, settings: SamplingSettings, size: int, seed: int) -> dict[str, np.ndarray]:
    """``size`` sequences from the start token and the activation at the end of each: ids, lengths, v."""
    samples = draw_sequences(backbone, settings, size, seed)
    v = backbone.encode([samples.sequence(i) for i in range(size)], start=True)
    return {"ids": samples.ids, "lengths": samples.lengths, "v": v}


def draw_sequences(backbone: Backbone, settings: SamplingSettings, size: int, seed: int) -> Samples:
    """``size`` sequences sampled freely from the start token."""
    return sample(backbone, backbone.embed(torch.full((size, 1), backbone.start_id)), settings, seed)


def check_health(v_Nd: np.ndarray) -> dict:
    """Finite, and not collapsed into one vector (PROTOCOL.md §1, the BOS = EOS trap).

    Returns the figures it judged by; raises ``BackboneError`` or ``CollapsedTargetsError``.
    """
    check_finite(v_Nd, "target activations")
    spread = float(np.sqrt(v_Nd.var(axis=0).mean()))
    size = float(np.sqrt((v_Nd**2).mean()))
    distinct = len(np.unique(v_Nd, axis=0))
    if spread < 1e-4 * size or distinct < 0.5 * len(v_Nd):
        raise CollapsedTargetsError(
            f"{distinct} distinct vectors among {len(v_Nd)} targets, spread {spread:.3g} at size "
            f"{size:.3g}: were sequences cut at the start token because it is also an EOS?"
        )
    return {"rms": size, "std": spread, "distinct": distinct}


def describe(targets: Targets, backbone: Backbone) -> dict:
    """The figures of notebook 01: lengths, ‖v‖, ‖μ‖, the share of the mean square along μ, cosines."""
    v, mu = targets.v.astype(np.float64), targets.mu.astype(np.float64)
    along = v @ (mu / np.linalg.norm(mu))
    cosine = {kind: unrelated_cosines(targets, kind == "cen") for kind in ("raw", "cen")}
    return {
        "sequences": sequences_hash(**targets.texts),
        "num_layers": backbone.n_layers,
        "hidden_size": backbone.d,
        "length_mean": float(targets.lengths.mean()),
        "ended_share": float(np.isin(_last_ids(targets), backbone.eos_ids).mean()),
        "embedding_norm_mean": _embedding_norm(targets, backbone),
        "v_norm_mean": float(np.linalg.norm(v, axis=1).mean()),
        "mu_norm": float(np.linalg.norm(mu)),
        "mean_square_share_along_mu": float((along**2).sum() / (v**2).sum()),
        "variance_share_along_mu": float(along.var() / v.var(axis=0).sum()),
        **{f"unrelated_cosine_{k}_mean": float(c.mean()) for k, c in cosine.items()},
        **{f"unrelated_cosine_{k}_std": float(c.std()) for k, c in cosine.items()},
        "health": check_health(targets.v),
    }


def _embedding_norm(targets: Targets, backbone: Backbone) -> float:
    """Mean norm of the token embeddings of one target's text after another, through the module."""
    ids = torch.tensor([i for s in targets.sequences(targets.in_sample) for i in s])
    with torch.inference_mode():
        return float(backbone.embed(ids).float().norm(dim=-1).mean())


def _last_ids(targets: Targets) -> np.ndarray:
    return targets.ids[np.arange(len(targets.ids)), targets.lengths - 1]


def unrelated_cosines(targets: Targets, centred: bool) -> np.ndarray:
    """Cosines of all unordered pairs of the pool's first 512 targets, raw or centred by μ."""
    pool = targets.v[targets.pool][:FLOOR_ROWS]
    scores = fve_matrix(pool, pool, targets.mu if centred else None)
    return 2 * scores[np.triu_indices(len(pool), 1)] - 1


@dataclass
class TextPairs:
    """Training pairs (row of the target, token ids of its text), how many were skipped for their length,
    and how many came back from the text as other ids than were sampled (special tokens aside)."""

    rows: list[int]
    ids: list[list[int]]
    skipped: int
    changed: int


def paper_pairs(backbone: Backbone, targets: Targets, rows: np.ndarray, limit: int) -> TextPairs:
    """The paper's training texts: decoded without special tokens, tokenized again, long ones skipped."""
    kept_rows, kept_ids, changed = [], [], 0
    special = set(backbone.tokenizer.all_special_ids)
    for i in rows:
        sampled = targets.sequence(i)
        ids = backbone.tokenize_text(backbone.decode_text(sampled))
        changed += ids != [t for t in sampled if t not in special]
        if 0 < len(ids) <= limit:
            kept_rows.append(int(i))
            kept_ids.append(ids)
    return TextPairs(kept_rows, kept_ids, len(rows) - len(kept_rows), changed)


def tail_pairs(targets: Targets, rows: np.ndarray, n: int) -> TextPairs:
    """The last n sampled tokens of each source, EOS included where it has one: nothing is tokenized again."""
    return TextPairs([int(i) for i in rows], [targets.sequence(i)[-n:] for i in rows], skipped=0, changed=0)
