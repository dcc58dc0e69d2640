"""What the tail reader writes for the evaluation targets, re-encoded: its greedy text and its draws, kept like an AV's
rollouts, so that the same scores and controls apply to both, and a guided search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Sequence

import numpy as np
import torch

from nla_extensions.tail_reader.reader import TOP_K, TailReader, load_reader, read_tails
from nla_utils.config import RunConfig
from nla_utils.encoding import TEXTS_FORMAT, Texts, nats_per_token, read, texts_of, write_in_chunks
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import row_streams
from nla_utils.metrics import fve
from nla_utils.protocol import CORRECTED, PROTOCOLS
from nla_utils.run import Run
from nla_utils.store import SPECS, Artefact, ChunkStore
from nla_utils.targets import Targets

BEAMS = 2
SWAPS = 16
# Score penalty per nat per token: about where it begins to cost the search much of its score (paper/comparison.md).
FLUENCY = 0.02
ARTEFACT = "readings"
# Rows read together: the scores of the whole vocabulary exist once for each.
ROW_BATCH = 512
# Targets searched together: a round encodes 32 short tails of each.
GUIDED_BATCH = 32


def av_forward_tokens(config: RunConfig) -> int:
    """Forward tokens of the AV's best-of-K for one target: K texts written, and read again behind BOS."""
    return config.sizes.n_rollouts * (2 * config.sizes.max_new_tokens + 1)


def tails_spec(config: RunConfig, k: int) -> dict:
    """What the reader's tails depend on beside the run's identity, its targets and its reader."""
    s = config.sizes
    return {
        **TEXTS_FORMAT,
        "n_eval": s.n_eval,
        "pool_size": s.pool_size,
        "k": k,
        "top_k": TOP_K,
        "search": [BEAMS, SWAPS],
        "forward_tokens": av_forward_tokens(config),
    }


SPECS[ARTEFACT] = lambda config: tails_spec(config, config.sizes.n_rollouts)


@dataclass
class GuidedSearch:
    """``ids`` (M, n) and ``h`` (M, d) of the best tail; ``curve`` (M, rounds + 1): its centred score after each round,
    less what it pays for its words; ``spent`` (rounds + 1,): forward tokens a target by then, with the first tails."""

    ids: np.ndarray
    h: np.ndarray
    curve: np.ndarray
    spent: np.ndarray


def guided_search(
    reader: TailReader,
    backbone: Backbone,
    v_Md: np.ndarray,
    mu_d: np.ndarray,
    tails: Texts,
    budget: int,
    fluency: float = 0.0,
) -> GuidedSearch:
    """Improve the best of each target's drawn tails until ``budget`` forward tokens per target are spent.

    Each round takes one position, the last first, and tries the 16 tokens there that would best explain what the
    re-encoded tail leaves of v, for the two best tails of each target. ``fluency``: score penalty per nat per token.
    """

    def worth(ids_MKn: np.ndarray, h_MKd: np.ndarray) -> np.ndarray:
        score_MK = fve(h_MKd, v_Md[:, None], mu_d)
        if not fluency:
            return score_MK
        return score_MK - fluency * nats_per_token(backbone, ids_MKn.reshape(-1, n).tolist()).reshape(score_MK.shape)

    drawn = tails.ids[:, 1:], tails.read_as(CORRECTED)[:, 1:]
    k, n = drawn[0].shape[1:]
    ids, h, best = _best(*drawn, worth(*drawn))
    # A tail is read to the layer, and to the head too where its words are paid for.
    reads = (n + 1) * (2 if fluency else 1)
    spent, curve = [k * reads], [best[:, 0]]
    per_round = BEAMS * SWAPS * reads
    for r in range(max(0, (budget - spent[0]) // per_round)):
        ids_new = _propose(reader, v_Md, ids, h, r % n)
        h_new = backbone.encode(ids_new.reshape(-1, n).tolist(), start=True).reshape(*ids_new.shape[:2], -1)
        new = worth(ids_new, h_new)
        # A proposal that is a beam already would push out a different one.
        new[(ids_new[:, :, None] == ids[:, None]).all(axis=3).any(axis=2)] = -np.inf
        ids, h, best = _best(*(np.concatenate(x, axis=1) for x in ((ids, ids_new), (h, h_new), (best, new))))
        spent.append(spent[-1] + per_round)
        curve.append(best[:, 0])
    return GuidedSearch(ids[:, 0], h[:, 0], np.stack(curve, axis=1), np.array(spent))


@torch.inference_mode()
def _propose(reader: TailReader, v_Md: np.ndarray, ids_MBn: np.ndarray, h_MBd: np.ndarray, j: int) -> np.ndarray:
    """Tails with the token at −(j+1) changed (M, B·SWAPS, n)."""
    m, beams, n = ids_MBn.shape
    device = reader.mean_d.device
    gap = torch.from_numpy(v_Md[:, None] - h_MBd).float().flatten(0, 1).to(device)
    current = torch.from_numpy(ids_MBn[:, :, n - 1 - j].astype(np.int64)).flatten().to(device)
    residual = gap @ reader.whiten_dd.T + reader.explained(j, current)
    swaps, _ = reader.candidates(j, residual, SWAPS)
    proposed = np.repeat(ids_MBn[:, :, None], swaps.shape[1], axis=2)
    proposed[..., n - 1 - j] = swaps.cpu().numpy().reshape(m, beams, -1)
    return proposed.reshape(m, -1, n)


def _best(ids: np.ndarray, h: np.ndarray, worth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The BEAMS best tails of each target, best first."""
    top = np.argsort(-worth, axis=1, kind="stable")[:, :BEAMS]
    at = np.arange(len(ids))[:, None]
    return ids[at, top], h[at, top], worth[at, top]


@dataclass
class ReaderRollouts:
    """The reader's texts of the in-sample and the held-out targets, and the guided search of the held-out ones."""

    rollouts: Texts
    guided: GuidedSearch


def make_reader_rollouts(run: Run, targets: Targets) -> ReaderRollouts:
    """Tails of the in-sample and the held-out targets, or what is on disk."""

    def keep(tails: Texts, guided: GuidedSearch) -> dict[str, np.ndarray]:
        arrays = {f"rollout/{name}": x for name, x in tails.arrays.items()}
        return arrays | {f"guided_{name}": x for name, x in vars(guided).items()}

    rows = np.concatenate([targets.in_sample, targets.held_out])
    artefact = write_tails(run, targets, rows, run.sizes.n_rollouts, ARTEFACT, keep)
    guided = GuidedSearch(*(artefact.tensors[f"guided_{name}"] for name in ("ids", "h", "curve", "spent")))
    return ReaderRollouts(texts_of(artefact)["rollout"], guided)


def write_tails(
    run: Run, targets: Targets, rows: np.ndarray, k: int, name: str, keep: Callable[[Texts, GuidedSearch], dict]
) -> Artefact:
    """The artefact ``name``, or what is on disk: the arrays that ``keep`` makes of the greedy and K drawn tails of each
    row, and of the guided search of the held-out targets, with which ``rows`` end."""
    backbone, folder, held_out = run.backbone, run.folder, targets.held_out
    if folder.has(name):
        return folder.load(name)
    reader, made_from = load_reader(run), {"targets": targets.sha256, "reader": folder.sha256_of("reader")}
    plan = {**folder.conditions, **made_from, **tails_spec(run.config, k), "rows": len(rows)}
    tails, searches = (ChunkStore(folder.file(f"{stage}{k}.chunks"), plan) for stage in ("readings", "guided"))

    def write(chosen: np.ndarray) -> Texts:
        streams_B = row_streams(run.seed, "readings", chosen, k + 1)
        return read_rollouts(reader, backbone, targets.v[chosen], k, streams_B, chosen)

    drawn = write_in_chunks(tails, "rollout", rows, max(1, ROW_BATCH // (k + 1)), write, "reading tails")
    own = drawn.at(held_out)

    def search(m: slice) -> dict[str, np.ndarray]:
        v_Md = targets.v[held_out[m]]
        found = guided_search(reader, backbone, v_Md, targets.mu, own.take(m), av_forward_tokens(run.config))
        # One row a target, as everything in a chunk: what is spent is the same for all of them.
        return {**vars(found), "spent": np.tile(found.spent, (len(v_Md), 1))}

    found = searches.fill(len(held_out), GUIDED_BATCH, search, "guided search", "target")
    guided = GuidedSearch(**found | {"spent": found["spent"][0]})
    artefact = folder.save(name, keep(drawn, guided), made_from=made_from)
    for chunks in (tails, searches):
        chunks.clear()
    return artefact


def read_rollouts(
    reader: TailReader, backbone: Backbone, v_Md: np.ndarray, k: int, streams_B: np.ndarray, rows: Sequence[int] = ()
) -> Texts:
    """The greedy and k drawn tails of each target, re-encoded; each of the M (1 + k) has a random stream. ``rows`` are
    those of the targets, 0 … M − 1 if not given."""
    ids_MKn, logp_MK = read_tails(reader, v_Md, k, streams_B)
    logp_MK = logp_MK.float().numpy()
    logp_MK[:, 0] = np.nan
    logp = {"sampled": logp_MK, "published": np.full_like(logp_MK, np.nan)}
    lengths_MK = np.full(logp_MK.shape, reader.n, dtype=np.int32)
    rows = np.asarray(rows) if len(rows) else np.arange(len(v_Md))
    return read(backbone, Texts("rollout", rows, ids_MKn.int().numpy(), lengths_MK, logp), *PROTOCOLS)
