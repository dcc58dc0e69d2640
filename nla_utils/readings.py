"""Readings: what the tail reader and the probe write for the evaluation targets, re-encoded.

The reader's K draws and its greedy text are kept like an AV's rollouts (:mod:`nla_utils.rollouts`), so that the
same scores, controls and curves apply to both.
"""

from __future__ import annotations

import numpy as np
import torch

from nla_utils.backbone import Backbone
from nla_utils.config import RunConfig
from nla_utils.guided import guided_search
from nla_utils.parallel import fill_chunks
from nla_utils.probe import probe_decode
from nla_utils.reader import ARTEFACT as READER_ARTEFACT
from nla_utils.reader import TailReader, load_reader, read_tails
from nla_utils.store import Artefact, ChunkStore, RunFolder, derive_seed
from nla_utils.targets import Targets

ARTEFACT = "readings"
PROBE_LENGTHS = (1, 2, 4, 8)
# Rows read together: the scores of the whole vocabulary exist once for each.
ROW_BATCH = 512
# Targets searched together: a round encodes 32 short tails of each.
GUIDED_BATCH = 32


def make_readings(run: RunConfig, backbone: Backbone, targets: Targets, folder: RunFolder) -> Artefact:
    """Tails of the in-sample and the held-out targets, or what is whole on disk.

    Arrays as in :class:`~nla_utils.rollouts.RolloutSet`; ``probe_ids`` (R, n), ``probe_h_bos`` and
    ``probe_h_nobos`` (R, lengths, d), the probe's last 1, 2, 4, 8 tokens; ``guided_ids`` (M, n), ``guided_h``
    (M, d), ``guided_curve`` (M, rounds + 1) and ``guided_spent`` of the held-out targets, at the forward tokens
    that the AV's best-of-K takes.
    """
    if folder.has(ARTEFACT):
        return folder.load(ARTEFACT)
    reader = load_reader(backbone, folder)
    rows = np.concatenate([targets.in_sample, targets.held_out])
    parents = {"targets": targets.sha256, READER_ARTEFACT: folder.load(READER_ARTEFACT).sha256}
    tensors, stages = write_tails(run, backbone, reader, targets, rows, run.sizes.n_rollouts, folder)
    probe, probe_fit = _probe(run, backbone, targets, rows)
    facts = {"seed": run.seed, "k": run.sizes.n_rollouts, "probe": probe_fit}
    artefact = folder.save(ARTEFACT, {"rows": rows, **tensors, **probe}, made_from=parents, **facts)
    for chunks in stages:
        chunks.clear()
    return artefact


def av_forward_tokens(run: RunConfig) -> int:
    """Forward tokens of the AV's best-of-K for one target: K texts written, and read again behind BOS."""
    return run.sizes.n_rollouts * (2 * run.text_length + 1)


def write_tails(
    run: RunConfig, backbone: Backbone, reader: TailReader, targets: Targets, rows: np.ndarray, k: int,
    folder: RunFolder,
) -> tuple[dict[str, np.ndarray], list[ChunkStore]]:  # fmt: skip
    """Greedy and K drawn tails of each row, and what guided search makes of those of the held-out targets.

    ``rows`` end with the held-out targets. Returns the arrays of :func:`read_rollouts` and ``guided_*``, and the
    chunks that they came from: the caller clears them once it has saved what it makes, so that nothing is done twice.
    """
    made_from = {"targets": targets.sha256, READER_ARTEFACT: folder.load(READER_ARTEFACT).sha256}
    plan = {**folder.identity, **made_from, "k": k, "rows": len(rows)}
    tails, searches = (ChunkStore(folder.file(f"{name}{k}.chunks"), plan) for name in ("readings", "guided"))

    def draw(c: int, part_of: slice) -> dict[str, np.ndarray]:
        v_Md = torch.from_numpy(targets.v[rows[part_of]]).to(backbone.device)
        return read_rollouts(reader, backbone, v_Md, k, derive_seed(run.seed, "readings", c))

    drawn = fill_chunks(tails, len(rows), max(1, ROW_BATCH // (k + 1)), draw, "reading tails", "target")
    held_out = targets.held_out
    ids_MKn, h_MKd = (drawn[name][-len(held_out) :, 1:] for name in ("ids", "h_bos"))

    def search(c: int, m: slice) -> dict[str, np.ndarray]:
        v_Md = targets.v[held_out[m]]
        found = guided_search(reader, backbone, v_Md, targets.mu, ids_MKn[m], h_MKd[m], av_forward_tokens(run))
        # One row a target, as everything in a chunk: what is spent is the same for all of them.
        return {**vars(found), "spent": np.tile(found.spent, (len(v_Md), 1))}

    found = fill_chunks(searches, len(held_out), GUIDED_BATCH, search, "guided search", "target")
    found["spent"] = found["spent"][0]
    return {**drawn, **{f"guided_{name}": x for name, x in found.items()}}, [tails, searches]


def read_rollouts(
    reader: TailReader, backbone: Backbone, v_Md: torch.Tensor, k: int, seed: int
) -> dict[str, np.ndarray]:
    """The greedy and k drawn tails of each target as rollouts."""
    m = len(v_Md)
    greedy = torch.arange(m * (k + 1)) % (k + 1) == 0
    ids_Bn, logp_B = read_tails(reader, v_Md.repeat_interleave(k + 1, dim=0), seed, greedy)
    flat = ids_Bn.tolist()
    return {
        "ids": ids_Bn.int().numpy().reshape(m, k + 1, -1),
        "lengths": np.full((m, k + 1), reader.n, dtype=np.int32),
        "h_bos": backbone.encode(flat, start=True).reshape(m, k + 1, -1),
        "h_nobos": backbone.encode(flat, start=False).reshape(m, k + 1, -1),
        "logp": logp_B.float().numpy().reshape(m, k + 1)[:, 1:],
        "logp_paper": np.full((m, k), np.nan, dtype=np.float32),
    }


def probe_lengths(n: int) -> list[int]:
    """The lengths of the probe's text that are scored: 1, 2, 4, 8 as far as there are tokens."""
    return [x for x in PROBE_LENGTHS if x <= n]


def _probe(
    run: RunConfig, backbone: Backbone, targets: Targets, rows: np.ndarray
) -> tuple[dict[str, np.ndarray], dict]:
    """(its texts, re-encoded; how it was fitted)."""
    ids_Rn, fit = probe_decode(run, backbone, targets, rows)
    lengths = probe_lengths(ids_Rn.shape[1])
    texts = [row[-n:].tolist() for row in ids_Rn for n in lengths]
    shape = (len(rows), len(lengths), -1)
    tensors = {
        "probe_ids": ids_Rn.astype(np.int32),
        "probe_h_bos": backbone.encode(texts, start=True).reshape(shape),
        "probe_h_nobos": backbone.encode(texts, start=False).reshape(shape),
    }
    return tensors, fit
