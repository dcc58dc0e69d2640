"""What the tail reader writes for the evaluation targets, re-encoded: its greedy text, its draws, and a guided search.

The K draws and the greedy text are kept like an AV's rollouts, so that the same scores and controls apply to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch

from nla_extensions.tail_reader.reader import ARTEFACT as READER_ARTEFACT
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
# What a nat a token is worth in score: about where dearer words begin to cost the search much of it (paper/comparison.md).
FLUENCY = 0.02
ARTEFACT = "readings"
# Rows read together: the scores of the whole vocabulary exist once for each.
ROW_BATCH = 512
# Targets searched together: a round encodes 32 short tails of each.
GUIDED_BATCH = 32


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
    """``ids`` (M, n) and ``h`` (M, d) of the best tail; ``curve`` (M, rounds + 1): its centred score after each
    round, less what it pays for its words; ``spent`` (rounds + 1,): forward tokens per target by then, the K first
    tails included."""

    ids: np.ndarray
    h: np.ndarray
    curve: np.ndarray
    spent: np.ndarray


def guided_search(
    reader: TailReader,
    backbone: Backbone,
    v_Md: np.ndarray,
    mu_d: np.ndarray,
    ids_MKn: np.ndarray,
    h_MKd: np.ndarray,
    budget: int,
    fluency: float = 0.0,
) -> GuidedSearch:
    """Improve the best of K tails until ``budget`` forward tokens per target are spent.

    Each round takes one position, the last first, and tries the 16 tokens there that would best explain what
    the re-encoded tail still leaves of v, for the two best tails of each target. The best is the one whose score is
    highest after ``fluency`` was taken off for every nat a token that its words cost the language model.
    """
    m, k, n = ids_MKn.shape
    worth_MK = _worth(backbone, v_Md, mu_d, ids_MKn, h_MKd, fluency)
    top = np.argsort(-worth_MK, axis=1)[:, :BEAMS]
    at = np.arange(m)[:, None]
    beams = (ids_MKn[at, top], h_MKd[at, top], worth_MK[at, top])
    # A tail is read to the layer, and to the head too where its words are paid for.
    reads = (n + 1) * (2 if fluency else 1)
    spent, curve = [k * reads], [beams[2][:, 0]]
    per_round = BEAMS * SWAPS * reads
    rounds = max(0, (budget - spent[0]) // per_round)
    for r in range(rounds):
        proposed = _propose(reader, v_Md, beams[0], beams[1], r % n)
        h = backbone.encode(proposed.reshape(-1, n).tolist(), start=True).reshape(*proposed.shape[:2], -1)
        worth = _worth(backbone, v_Md, mu_d, proposed, h, fluency)
        # A proposal that is a beam already would push out a different one.
        worth[(proposed[:, :, None] == beams[0][:, None]).all(axis=3).any(axis=2)] = -np.inf
        beams = _best(*(np.concatenate(pair, axis=1) for pair in zip(beams, (proposed, h, worth))))
        spent.append(spent[-1] + per_round)
        curve.append(beams[2][:, 0])
    return GuidedSearch(beams[0][:, 0], beams[1][:, 0], np.stack(curve, axis=1), np.array(spent))


def _worth(
    backbone: Backbone, v_Md: np.ndarray, mu_d: np.ndarray, ids_MKn: np.ndarray, h_MKd: np.ndarray, fluency: float
) -> np.ndarray:
    """Centred score of each tail (M, K), less ``fluency`` times its nats a token."""
    score_MK = fve(h_MKd, v_Md[:, None], mu_d)
    if not fluency:
        return score_MK
    return score_MK - fluency * nats_per_token(backbone, ids_MKn.reshape(score_MK.size, -1).tolist()).reshape(
        score_MK.shape
    )


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
    """The BEAMS best of each target, best first."""
    top = np.argsort(-worth, axis=1, kind="stable")[:, :BEAMS]
    at = np.arange(len(ids))[:, None]
    return ids[at, top], h[at, top], worth[at, top]


@dataclass
class ReaderRollouts:
    """The reader's texts of the in-sample and the held-out targets, and the guided search of the held-out ones."""

    rollouts: Texts
    guided: GuidedSearch

    @classmethod
    def of(cls, artefact: Artefact) -> "ReaderRollouts":
        t = artefact.tensors
        guided = GuidedSearch(*(t[f"guided_{name}"] for name in ("ids", "h", "curve", "spent")))
        return cls(texts_of(artefact)["rollout"], guided)


def make_reader_rollouts(run: Run, targets: Targets) -> ReaderRollouts:
    """Tails of the in-sample and the held-out targets, or what is on disk.

    The guided search spends the forward tokens that the AV's best-of-K takes.
    """
    if run.folder.has(ARTEFACT):
        return ReaderRollouts.of(run.folder.load(ARTEFACT))
    rows = np.concatenate([targets.in_sample, targets.held_out])
    rollouts, guided, stages = write_tails(run, targets, rows, run.sizes.n_rollouts)
    parents = {"targets": targets.sha256, READER_ARTEFACT: run.folder.sha256_of(READER_ARTEFACT)}
    tensors = {f"rollout/{name}": x for name, x in rollouts.arrays.items()}
    tensors |= {f"guided_{name}": x for name, x in vars(guided).items()}
    run.folder.save(ARTEFACT, tensors, made_from=parents)
    for chunks in stages:
        chunks.clear()
    return ReaderRollouts(rollouts, guided)


def av_forward_tokens(config: RunConfig) -> int:
    """Forward tokens of the AV's best-of-K for one target: K texts written, and read again behind BOS."""
    return config.sizes.n_rollouts * (2 * config.sizes.max_new_tokens + 1)


def write_tails(run: Run, targets: Targets, rows: np.ndarray, k: int) -> tuple[Texts, GuidedSearch, list[ChunkStore]]:
    """Greedy and K drawn tails of each row, and what guided search makes of those of the held-out targets.

    ``rows`` end with the held-out targets. The chunks that both came from are returned too: the caller clears them once
    it has saved what it makes, so that nothing is done twice.
    """
    backbone, folder, reader, held_out = run.backbone, run.folder, load_reader(run), targets.held_out
    made_from = {"targets": targets.sha256, READER_ARTEFACT: folder.sha256_of(READER_ARTEFACT)}
    plan = {**folder.conditions, **made_from, **tails_spec(run.config, k), "rows": len(rows)}
    tails, searches = (ChunkStore(folder.file(f"{name}{k}.chunks"), plan) for name in ("readings", "guided"))

    def write(chosen: np.ndarray) -> Texts:
        streams_B = row_streams(run.seed, "readings", chosen, k + 1)
        return read_rollouts(reader, backbone, targets.v[chosen], k, streams_B, chosen)

    drawn = write_in_chunks(tails, "rollout", rows, max(1, ROW_BATCH // (k + 1)), write, "reading tails")
    own = drawn.at(held_out)
    ids_MKn, h_MKd = own.ids[:, 1:], own.read_as(CORRECTED)[:, 1:]

    def search(c: int, m: slice) -> dict[str, np.ndarray]:
        v_Md = targets.v[held_out[m]]
        found = guided_search(reader, backbone, v_Md, targets.mu, ids_MKn[m], h_MKd[m], av_forward_tokens(run.config))
        # One row a target, as everything in a chunk: what is spent is the same for all of them.
        return {**vars(found), "spent": np.tile(found.spent, (len(v_Md), 1))}

    found = searches.fill(len(held_out), GUIDED_BATCH, search, "guided search", "target")
    return drawn, GuidedSearch(**found | {"spent": found["spent"][0]}), [tails, searches]


def read_rollouts(
    reader: TailReader, backbone: Backbone, v_Md: np.ndarray, k: int, streams_B: np.ndarray, rows: Sequence[int] = ()
) -> Texts:
    """The greedy and k drawn tails of each target, re-encoded; each of the M (1 + k) has a random stream. ``rows`` are
    those of the targets, 0 … M − 1 if not given."""
    shape = len(v_Md), k + 1
    v_Bd = torch.from_numpy(v_Md).to(backbone.device).repeat_interleave(k + 1, dim=0)
    ids_Bn, logp_B = read_tails(reader, v_Bd, streams_B, torch.arange(len(v_Bd)) % (k + 1) == 0)
    logp_Mn = logp_B.float().numpy().reshape(shape)
    logp_Mn[:, 0] = np.nan
    logp = {"sampled": logp_Mn, "published": np.full(shape, np.nan, dtype=np.float32)}
    lengths_Mn = np.full(shape, reader.n, dtype=np.int32)
    rows = np.asarray(rows) if len(rows) else np.arange(len(v_Md))
    texts = Texts("rollout", rows, ids_Bn.int().numpy().reshape(*shape, -1), lengths_Mn, logp)
    return read(backbone, texts, *PROTOCOLS)
