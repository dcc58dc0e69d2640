"""What text can reach at all: replay, last tokens, paraphrase, probe, and the texts of the null (PROTOCOL.md §5, §8).

Each is a way to write texts for targets; the slip-by-slip ablation is a loop over the ways to read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.config import (
    N_PARAPHRASES,
    POOL_TEXTS,
    PROBE_LENGTHS,
    TAIL_LENGTHS,
    TAIL_TOKENS,
    VALIDATION_SHARE,
    RunConfig,
)
from nla_utils.encoding import PUBLISHED_BATCH, TEXTS_FORMAT, Texts, nats_per_token, read, save_texts, texts_of
from nla_utils.lm.backbone import Backbone, pad
from nla_utils.lm.sampling import Samples, SamplingSettings, row_streams, sample
from nla_utils.protocol import PROTOCOLS, PUBLISHED, READINGS, Protocol
from nla_utils.run import Run
from nla_utils.store import SPECS, ChunkStore, Progress, derive_seed, json_hash, require_disk
from nla_utils.targets import Targets

CEILINGS = "ceilings"
PROMPT = "Paraphrase the following text using different words but the same meaning.\n\nText: {text}\n\nParaphrase:"

SPECS[CEILINGS] = lambda config: {
    **TEXTS_FORMAT,
    "n_eval": config.sizes.n_eval,
    "pool": [config.sizes.pool_size, POOL_TEXTS],
    "text_batch": PUBLISHED_BATCH,
    "paraphrases": N_PARAPHRASES,
    "paraphrase_sampling": _paraphrase_settings(config).record(),
    "prompt": PROMPT,
    "tail_lengths": TAIL_LENGTHS,
    "readings": {kind: [[name, *sorted(p.slips)] for name, p in of.items()] for kind, of in READINGS.items()},
}


def make_ceilings(run: Run, targets: Targets) -> dict[str, Texts]:
    """All that notebook 03 scores, or what is on disk: texts by :meth:`~nla_utils.protocol.Protocol.texts`, each as
    every protocol of :data:`~nla_utils.protocol.READINGS` reads it, and the ``pool``'s.

    Of the pool there is no reading behind BOS: there a target's text reads as its own v. Its ``logp`` is ``alone``, of
    the first 256: behind the start token, no v in sight.
    """
    if run.folder.has(CEILINGS):
        return load_ceilings(run)
    backbone, sizes = run.backbone, run.sizes
    require_disk(run.folder.path, 2 * (sizes.pool_size + sizes.n_eval * 104) * backbone.d * 4)
    pool = read(backbone, sources(targets, targets.pool, "pool"), PUBLISHED)
    texts, pool.logp["alone"] = {"pool": pool}, np.full(pool.lengths.shape, np.nan, dtype=np.float32)
    pool.logp["alone"][:POOL_TEXTS, 0] = -nats_per_token(backbone, pool.sequences[:POOL_TEXTS])
    asked = [(kind, protocol) for kind, protocols in READINGS.items() for protocol in protocols.values()]
    for kind, protocol in Progress(asked, desc="ceilings", unit="reading"):
        name = protocol.texts(kind)
        if name not in texts:
            texts[name] = WRITERS[kind](run, targets, targets.eval_rows(protocol), protocol)
        read(backbone, texts[name], protocol)
    save_texts(run.folder, CEILINGS, texts, made_from={"targets": targets.sha256})
    return texts


def load_ceilings(run: Run) -> dict[str, Texts]:
    """Ceilings made by notebook 03; raises ``ArtefactError`` if they are missing, of another run or broken."""
    return texts_of(run.folder.load(CEILINGS))


def sources(targets: Targets, rows: np.ndarray, kind: str = "source") -> Texts:
    """The targets' own texts."""
    return Texts(kind, rows, targets.ids[rows][:, None], targets.lengths[rows][:, None])


def tails(targets: Targets, rows: np.ndarray) -> Texts:
    """The source's own last n tokens, n as in ``TAIL_LENGTHS``."""
    return Texts.of("tail", rows, [targets.sequence(i)[-n:] for i in rows for n in TAIL_LENGTHS])


def _paraphrase_settings(config: RunConfig) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=config.sizes.max_new_tokens, top_p=0.95)


def paraphrases(run: Run, targets: Targets, rows: np.ndarray, protocol: Protocol) -> Texts:
    """8 paraphrases per target; what any run beside this one has drawn is taken.

    Prompts are padded on the left and begin with the start token, or as the tokenizer does by default (slip
    ``pad_generate``). Where the two ways give the same prompts, they give the same paraphrases, drawn once. A target
    whose text is not known has paraphrases of no tokens.
    """
    backbone, settings = run.backbone, _paraphrase_settings(run.config)
    known_M = targets.lengths[rows] > 0
    known = rows[known_M]
    prompts = [prompt_ids(backbone, backbone.decode_text(targets.sequence(i)), protocol) for i in known]
    side = "left" if "pad_generate" not in protocol.slips else backbone.padding_side
    repeated = [p for p in prompts for _ in range(N_PARAPHRASES)]
    streams = row_streams(run.seed, "paraphrases", known, N_PARAPHRASES)

    def draw(part_of: slice) -> dict[str, np.ndarray]:
        samples = continue_prompts(backbone, repeated[part_of], settings, streams[part_of], side)
        return {"ids": samples.ids, "lengths": samples.lengths, "logp": samples.mean_logprob}

    # Beside a backbone's runs, under a hash of all they depend on. The layer is not among it: a sweep draws them once.
    plan = {k: v for k, v in run.folder.conditions.items() if k != "layer"}
    plan |= {"side": side, "sampling": settings.record(), "batch": backbone.sample_batch}
    plan |= {"rows": json_hash(known.tolist()), "prompts": json_hash(prompts)}
    chunks = ChunkStore(run.folder.path.parent / "paraphrases" / json_hash(plan)[:16], plan)
    shape = len(rows), N_PARAPHRASES
    ids, lengths = np.full((*shape, settings.max_new_tokens), backbone.pad_id, np.int32), np.zeros(shape, np.int32)
    logp = np.full(shape, np.nan, np.float32)
    if len(known):
        drawn = chunks.fill(len(repeated), backbone.sample_batch, draw, "paraphrasing", "text")
        for found, name in ((ids, "ids"), (lengths, "lengths"), (logp, "logp")):
            found[known_M] = drawn[name].reshape(-1, *found.shape[1:])
    return Texts("paraphrase", rows, ids, lengths, {"sampled": logp})


WRITERS = {
    "source": lambda run, targets, rows, protocol: sources(targets, rows),
    "tail": lambda run, targets, rows, protocol: tails(targets, rows),
    "paraphrase": paraphrases,
}


def continue_prompts(
    backbone: Backbone, prompts: Sequence[Sequence[int]], settings: SamplingSettings, streams_B: np.ndarray, side: str
) -> Samples:
    """One continuation a prompt, the prompts padded on ``side`` and decoded together."""
    ids_BT, mask_BT = pad(prompts, backbone.pad_id, side)
    return sample(backbone, backbone.embed(ids_BT), settings, streams_B, mask_BT)


def prompt_ids(backbone: Backbone, text: str, protocol: Protocol) -> list[int]:
    """The prompt as the tokenizer encodes it by default (slip ``pad_generate``); else behind the start token."""
    ids = backbone.tokenizer(PROMPT.format(text=text)).input_ids
    if "pad_generate" not in protocol.slips and ids[0] != backbone.start_id:
        ids = [backbone.start_id, *ids]
    return ids


PROBE = "probe"
PROBE_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHUNK = 1024
NEAREST_ROWS = 256


def fit_spec(config: RunConfig) -> dict:
    """What a linear fit depends on beside the run's identity and its targets, strengths of the ridge aside."""
    s = config.sizes
    return {"n_eval": s.n_eval, "tail_tokens": TAIL_TOKENS, "validation": [VALIDATION_SHARE, s.n_validate]}


SPECS[PROBE] = lambda config: {**TEXTS_FORMAT, **fit_spec(config), "ridges": PROBE_RIDGES, "lengths": PROBE_LENGTHS}


def make_probe(run: Run, targets: Targets) -> Texts:
    """The probe's last 1, 2, 4 and 8 tokens of the in-sample and the held-out targets, or what is on disk."""
    if run.folder.has(PROBE):
        return load_probe(run)
    rows = np.concatenate([targets.in_sample, targets.held_out])
    train, validation = fit_split(run, targets)
    # Without texts (released vectors alone) there is nothing to fit it to: it writes no tokens.
    ids_Rn, trials = np.empty((len(rows), 0), dtype=np.int32), []
    if len(train):
        probe, trials = fit_probe(run.backbone, [(targets, train)], targets, validation, TAIL_TOKENS)
        ids_Rn = probe.decode(targets.v[rows], TAIL_TOKENS)
    texts = Texts.of("probe", rows, [row[-n:].tolist() for row in ids_Rn for n in PROBE_LENGTHS])
    about = {"seed": run.seed, "trials": trials, "train_rows": len(train)}
    read(run.backbone, texts, *PROTOCOLS)
    save_texts(run.folder, PROBE, {"probe": texts}, made_from={"targets": targets.sha256}, **about)
    return texts


def load_probe(run: Run) -> Texts:
    """The probe's texts; raises ``ArtefactError`` if notebook 04 has not made them."""
    return texts_of(run.folder.load(PROBE))["probe"]


def fit_split(run: Run, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, validation rows) of a linear fit: neither the held-out targets nor those without a text."""
    rng = np.random.default_rng(derive_seed(run.seed, "reader split", 0))
    order = rng.permutation(np.flatnonzero(targets.lengths[: len(targets.v) - targets.n_eval]))
    n_val = min(run.sizes.n_validate, max(2, round(VALIDATION_SHARE * len(order))))
    return np.sort(order[n_val:]), np.sort(order[:n_val])


@dataclass
class Probe:
    """Ŷ = intercept + (v − v̄) B: the centred embeddings of the last n tokens, the last first."""

    b_dq: Tensor
    intercept_q: Tensor
    v_mean_d: np.ndarray
    embedding_mean_d: Tensor
    table_Vd: Tensor

    def decode(self, v_Md: np.ndarray, n: int) -> np.ndarray:
        """Nearest tokens to the predicted embeddings of the last n (M, n), in reading order."""
        y_Mq = torch.from_numpy(v_Md - self.v_mean_d) @ self.b_dq + self.intercept_q
        y_md = y_Mq.reshape(len(v_Md), -1, len(self.embedding_mean_d))[:, :n].flatten(0, 1)
        ids = nearest_tokens(self.table_Vd, self.embedding_mean_d, y_md.to(self.table_Vd.device))
        return ids.reshape(len(v_Md), n)[:, ::-1].copy()


class NormalEquations:
    """Sums from which Y ≈ ȳ + (X − x̄) B follows in closed form, from data that is seen once, chunk by chunk.

    X (n, p) and Y (n, q) are added in chunks and never kept. Sums are float64, products within a chunk
    float32, so X and Y should come roughly centred; the exact means are taken out at the end.
    """

    def __init__(self, p: int, q: int):
        self.n = 0
        self.sum_x = torch.zeros(p, dtype=torch.float64)
        self.sum_y = torch.zeros(q, dtype=torch.float64)
        self.raw_xx = torch.zeros(p, p, dtype=torch.float64)
        self.raw_xy = torch.zeros(p, q, dtype=torch.float64)

    def add(self, x_np: Tensor, y_nq: Tensor, with_xx: bool = True) -> None:
        """Add rows of X and Y, or all but their XᵀX, where the caller has a cheaper way to it."""
        if with_xx:
            self.raw_xx += (x_np.T @ x_np).cpu()
        self.n += len(x_np)
        self.sum_x += x_np.sum(0).cpu().double()
        self.sum_y += y_nq.sum(0).cpu().double()
        self.raw_xy += (x_np.T @ y_nq).cpu()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(B (p, q), intercept ȳ − x̄ B (q,)), with a penalty of ``ridge`` times the mean diagonal of XᵀX."""
        # At p = 18,432 (eight embeddings of Gemma-2-2B) each (p, p) is 2.7 GB, so none is made that can be spared.
        penalised_pp = torch.addr(self.raw_xx, self.sum_x, self.sum_x, alpha=-1 / self.n)
        penalised_pp.diagonal().add_(ridge * penalised_pp.diagonal().mean().clamp_min(1e-12))
        b_pq = torch.cholesky_solve(self.xy(), torch.linalg.cholesky(penalised_pp))
        return b_pq, (self.sum_y - self.sum_x @ b_pq) / self.n

    def xy(self) -> Tensor:
        """XᵀY (p, q), means taken out."""
        return torch.addr(self.raw_xy, self.sum_x, self.sum_y, alpha=-1 / self.n)


@torch.inference_mode()
def fit_probe(
    backbone: Backbone, parts: Sequence[tuple[Targets, np.ndarray]], targets: Targets, validation: np.ndarray, n: int
) -> tuple[Probe, list[dict]]:
    """A probe fitted on rows of one or several sets of targets, and the ridge strengths that were tried.

    The one kept names the most last tokens of the validation rows.
    """
    table_Vd = backbone.embedding_table()
    counts_V = sum(token_counts(own, rows, table_Vd) for own, rows in parts)
    first_targets, first_rows = parts[0]
    mean_d, v_mean_d = embedding_mean(table_Vd, counts_V), first_targets.v[first_rows].mean(axis=0)
    equations = NormalEquations(backbone.d, n * backbone.d)
    for own, rows in parts:
        for first in range(0, len(rows), CHUNK):
            chosen = rows[first : first + CHUNK]
            y_nj = tail_features(own.ids, chosen, own.lengths[chosen], n, backbone.start_id)
            y_nq = (table_Vd[torch.from_numpy(y_nj).to(backbone.device)].float() - mean_d).flatten(1)
            equations.add(torch.from_numpy(own.v[chosen] - v_mean_d), y_nq.cpu())
    last = tail_features(targets.ids, validation, targets.lengths[validation], 1, backbone.start_id)
    trials = []
    for ridge in PROBE_RIDGES:
        b_dq, intercept_q = (x.float() for x in equations.solve(ridge))
        probe = Probe(b_dq, intercept_q, v_mean_d, mean_d, table_Vd)
        trials.append((float((probe.decode(targets.v[validation], 1) == last).mean()), ridge, probe))
    best = max(trials, key=lambda t: t[0])[2]
    return best, [{"ridge": ridge, "names_last_token": share} for share, ridge, _ in trials]


def tail_features(ids_NT: np.ndarray, rows: np.ndarray, positions: np.ndarray, n: int, start_id: int) -> np.ndarray:
    """Token ids (len(rows), n): the n tokens up to each position, the last first, padded by the start token."""
    at = positions[:, None] - np.arange(1, n + 1)
    return np.where(at >= 0, ids_NT[rows[:, None], np.maximum(at, 0)], start_id)


def token_counts(targets: Targets, rows: np.ndarray, table_Vd: Tensor) -> np.ndarray:
    """How often each token of the table stands in the rows' sequences (V,)."""
    return np.bincount(np.concatenate(targets.sequences(rows)), minlength=len(table_Vd))


def embedding_mean(table_Vd: Tensor, counts_V: np.ndarray) -> Tensor:
    """Mean embedding (d,) float32 under token counts, without a float32 copy of the table."""
    weight_V = torch.from_numpy(counts_V / counts_V.sum()).float().to(table_Vd.device)
    used = weight_V.nonzero()[:, 0]
    return weight_V[used] @ table_Vd[used].float()


def nearest_tokens(table_Vd: Tensor, mean_d: Tensor, guess_md: Tensor) -> np.ndarray:
    """The token whose centred embedding has the largest cosine with each centred guess (m,)."""
    best_m = []
    norm_V = torch.cat([(t.float() - mean_d).norm(dim=1) for t in table_Vd.split(16384)]).clamp_min(1e-6)
    for block_md in guess_md.split(NEAREST_ROWS):
        dot_mV = (block_md.to(table_Vd.dtype) @ table_Vd.T).float() - (block_md @ mean_d)[:, None]
        best_m.append((dot_mV / norm_V).argmax(dim=1).cpu())
    return torch.cat(best_m).numpy()
