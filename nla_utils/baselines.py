"""What text can reach at all: replay, paraphrase, tail oracle, and the texts of the null (PROTOCOL.md §5, §8).

Everything that needs the model happens here; :mod:`nla_utils.scores` makes scores from the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Mapping, Optional, Sequence

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
from nla_utils.encoding import TEXT_BATCH, nats_per_token, re_encode
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import Samples, SamplingSettings, pad, row_streams, sample
from nla_utils.protocol import CORRECTED, LADDER, PROTOCOLS, PUBLISHED, Protocol, ablation_steps
from nla_utils.rollouts import rows_at
from nla_utils.run import Run
from nla_utils.store import SPECS, Artefact, ChunkStore, Progress, derive_seed, json_hash, require_disk
from nla_utils.targets import Targets

CEILINGS = "ceilings"
PROMPT = "Paraphrase the following text using different words but the same meaning.\n\nText: {text}\n\nParaphrase:"

SPECS[CEILINGS] = lambda config: {
    "n_eval": config.sizes.n_eval,
    "pool": [config.sizes.pool_size, POOL_TEXTS],
    "text_batch": TEXT_BATCH,
    "paraphrases": N_PARAPHRASES,
    "paraphrase_sampling": _paraphrase_settings(config).record(),
    "prompt": PROMPT,
    "tail_lengths": TAIL_LENGTHS,
    "readings": [[p.name, *sorted(p.slips)] for p in (*PROTOCOLS, *LADDER)],
}


@dataclass
class Paraphrases:
    """8 paraphrases of each of M targets: ``ids`` (8 M, T), ``lengths`` (8 M,), and ``logp`` (8 M,), their mean token
    log-probability under the distribution that was sampled."""

    ids: np.ndarray
    lengths: np.ndarray
    logp: np.ndarray

    @property
    def sequences(self) -> list[list[int]]:
        """Token ids of each, targets in order."""
        return [row[:n].tolist() for row, n in zip(self.ids, self.lengths)]

    def named(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays by the names they are kept under."""
        return {f"{prefix}{f.name}": getattr(self, f.name) for f in fields(self)}


@dataclass
class EncodedTexts:
    """One protocol's texts, re-encoded as it does: ``replay`` (M, d), ``paraphrase`` (M, 8, d), ``tail``
    (M, len(TAIL_LENGTHS), d), the null's ``pool_h`` (P, d); and the paraphrases as they were ``drawn``."""

    replay: np.ndarray
    paraphrase: np.ndarray
    tail: np.ndarray
    pool_h: np.ndarray
    drawn: Paraphrases


@dataclass
class Ceilings:
    """All that notebook 03 encodes: the texts of both protocols by name, and the replay ladder's (M, d) by reading.

    ``pool_logp``: mean log-probability a token of the pool's first 256 texts behind the start token, no v in sight."""

    texts: Mapping[str, EncodedTexts]
    ladder: Mapping[str, np.ndarray]
    sha256: str = ""
    pool_logp: Optional[np.ndarray] = None

    @classmethod
    def of(cls, artefact: Artefact) -> "Ceilings":
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(f"{prefix}."): a for k, a in artefact.tensors.items() if k.startswith(f"{prefix}.")}

        drawn = {p.name: Paraphrases(**part(f"{p.name}.drawn")) for p in PROTOCOLS}
        names = ("replay", "paraphrase", "tail", "pool_h")
        texts = {p: EncodedTexts(*(artefact.tensors[f"{p}.{n}"] for n in names), drawn=d) for p, d in drawn.items()}
        return cls(texts, part("ladder"), artefact.sha256, artefact.tensors["pool_logp"])


def make_ceilings(run: Run, targets: Targets) -> Ceilings:
    """Encode all that notebook 03 scores, or load it if it is finished."""
    if run.folder.has(CEILINGS):
        return load_ceilings(run)
    backbone, sizes = run.backbone, run.sizes
    require_disk(run.folder.path, 2 * (sizes.n_targets + sizes.n_eval * 40) * backbone.d * 4)
    tensors: dict[str, np.ndarray] = {}
    with Progress(total=6, desc="ceilings", unit="part") as bar:
        for protocol in PROTOCOLS:
            rows, name = targets.eval_rows(protocol), protocol.name
            drawn = draw_paraphrases(run, targets, rows, protocol)
            h_nd = re_encode(backbone, drawn.sequences, protocol)
            tensors[f"{name}.paraphrase"] = h_nd.reshape(len(rows), N_PARAPHRASES, -1)
            tensors |= drawn.named(f"{name}.drawn.")
            bar.update()
            tensors[f"{name}.replay"] = re_encode(backbone, targets.sequences(rows), protocol)
            tails = re_encode(backbone, tail_ids(targets, rows), protocol.on_ids)
            tensors[f"{name}.tail"] = tails.reshape(len(rows), len(TAIL_LENGTHS), -1)
            bar.update()
        tensors["published.pool_h"] = re_encode(backbone, targets.sequences(targets.pool), PUBLISHED.on_ids)
        # Behind BOS a target's text re-encodes to its own v, so every one that is not evaluated costs nothing.
        # The pool comes first among them.
        tensors["corrected.pool_h"] = targets.v[targets.unevaluated]
        nats = nats_per_token(backbone, targets.sequences(targets.pool[:POOL_TEXTS]))
        tensors["pool_logp"] = -nats.astype(np.float32)
        bar.update()
        ladder = _ladder(backbone, targets, tensors["published.replay"])
        tensors |= {f"ladder.{reading}": h_Md for reading, h_Md in ladder.items()}
        bar.update()
    return Ceilings.of(run.folder.save(CEILINGS, tensors, made_from={"targets": targets.sha256}))


def load_ceilings(run: Run) -> Ceilings:
    """Ceilings made by notebook 03; raises ``ArtefactError`` if they are missing, of another run or broken."""
    return Ceilings.of(run.folder.load(CEILINGS))


def _ladder(backbone: Backbone, targets: Targets, published: np.ndarray) -> dict[str, np.ndarray]:
    """Replay (M, d) of the paper's own targets by the readings of :data:`LADDER`, the first of which is there."""
    own = targets.sequences(targets.in_sample)
    return {PUBLISHED.name: published} | {p.reading: re_encode(backbone, own, p) for p in LADDER if p != PUBLISHED}


def tail_ids(targets: Targets, rows: np.ndarray) -> list[list[int]]:
    """The source's own last n tokens, target by target, n as in ``TAIL_LENGTHS``."""
    return [targets.sequence(i)[-n:] for i in rows for n in TAIL_LENGTHS]


def _paraphrase_settings(config: RunConfig) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=config.sizes.max_new_tokens, top_p=0.95)


def draw_paraphrases(run: Run, targets: Targets, rows: np.ndarray, protocol: Protocol) -> Paraphrases:
    """8 paraphrases per target, targets in order; what any run beside this one has drawn is taken.

    Prompts are padded on the left and begin with the start token where ``left_prompts``, else as the tokenizer does
    by default (slip ``pad_generate``). Where the two ways give the same prompts, they give the same paraphrases, drawn
    once. A target whose text is not known has paraphrases of no tokens.
    """
    backbone, settings = run.backbone, _paraphrase_settings(run.config)
    everything, rows = rows, rows[targets.lengths[rows] > 0]
    prompts = [prompt_ids(backbone, backbone.decode_text(targets.sequence(i)), protocol) for i in rows]
    side = "left" if "pad_generate" not in protocol.slips else backbone.padding_side

    repeated = [p for p in prompts for _ in range(N_PARAPHRASES)]
    streams = row_streams(run.seed, "paraphrases", rows, N_PARAPHRASES)

    def draw(c: int, part_of: slice) -> dict[str, np.ndarray]:
        samples = continue_prompts(backbone, repeated[part_of], settings, streams[part_of], side)
        return {"ids": samples.ids, "lengths": samples.lengths, "logp": samples.mean_logprob}

    # Beside a backbone's runs, under a hash of all they depend on. The layer is not among it: a sweep draws them once.
    plan = {k: v for k, v in run.folder.conditions.items() if k != "layer"}
    plan |= {"side": side, "sampling": settings.record(), "batch": backbone.sample_batch}
    plan |= {"rows": json_hash(rows.tolist()), "prompts": json_hash(prompts)}
    chunks = ChunkStore(run.folder.path.parent / "paraphrases" / json_hash(plan)[:16], plan)
    n = len(everything) * N_PARAPHRASES
    ids, logp = (
        np.full((n, settings.max_new_tokens), backbone.pad_id, dtype=np.int32),
        np.full(n, np.nan, dtype=np.float32),
    )
    found = Paraphrases(ids, np.zeros(n, dtype=np.int32), logp)
    if len(rows):
        drawn = chunks.fill(len(rows) * N_PARAPHRASES, backbone.sample_batch, draw, "paraphrasing", "text")
        there = np.repeat(targets.lengths[everything] > 0, N_PARAPHRASES)
        found.ids[there], found.lengths[there], found.logp[there] = drawn["ids"], drawn["lengths"], drawn["logp"]
    return found


def continue_prompts(
    backbone: Backbone, prompts: Sequence[Sequence[int]], settings: SamplingSettings, streams_B: np.ndarray, side: str
) -> Samples:
    """One continuation a prompt, the prompts padded on ``side`` and decoded together."""
    ids_BT, mask_BT = pad(prompts, backbone.pad_id, side)
    return sample(backbone, backbone.embed(ids_BT), settings, streams_B, mask_BT)


def prompt_ids(backbone: Backbone, text: str, protocol: Protocol) -> list[int]:
    """The prompt as the tokenizer encodes it by default; behind the start token where ``left_prompts``."""
    ids = backbone.tokenizer(PROMPT.format(text=text)).input_ids
    if "pad_generate" not in protocol.slips and ids[0] != backbone.start_id:
        ids = [backbone.start_id, *ids]
    return ids


ABLATION = "ablation"
# The paraphrases that notebook 03 keeps: how they were prompted for, and of which targets.
KEPT = {("pad_generate" in p.slips, "in_sample" in p.slips) for p in PROTOCOLS}

STEPS: dict[str, Protocol] = {p.reading: p for way in ablation_steps().values() for p in way.values()}
SPECS[ABLATION] = lambda config: {"n_eval": config.sizes.n_eval, "steps": list(STEPS)}


@dataclass
class Ablation:
    """Replay (M, d) and paraphrases (M, 8, d) by :func:`~nla_utils.protocol.encoding_key`, and the paraphrases that
    notebook 03 has not drawn, by the key that is the first to read them."""

    replay: dict[str, np.ndarray]
    paraphrase: dict[str, np.ndarray]
    drawn: dict[str, Paraphrases]
    sha256: str

    @classmethod
    def of(cls, artefact: Artefact) -> "Ablation":
        found: dict[str, dict[str, np.ndarray]] = {"replay": {}, "paraphrase": {}, "drawn": {}}
        for name, array in artefact.tensors.items():
            what, _, key = name.partition(".")
            found[what][key] = array
        keys = sorted({key.rpartition(".")[0] for key in found["drawn"]})
        drawn = {k: Paraphrases(*(found["drawn"][f"{k}.{f.name}"] for f in fields(Paraphrases))) for k in keys}
        return cls(found["replay"], found["paraphrase"], drawn, artefact.sha256)


def make_ablation(run: Run, targets: Targets, ceilings: Ceilings) -> Ablation:
    """Replay and paraphrases encoded for every step, or what is on disk. What notebook 03 has encoded is taken."""
    if run.folder.has(ABLATION):
        return load_ablation(run)
    arrays, drawn, tensors = _known(ceilings), {}, {}
    with Progress(total=len(STEPS), desc="slip by slip", unit="step") as bar:
        for key, protocol in STEPS.items():
            rows = targets.eval_rows(protocol)
            if f"replay.{key}" not in arrays:
                arrays[f"replay.{key}"] = re_encode(run.backbone, targets.sequences(rows), protocol)
            if f"paraphrase.{key}" not in arrays:
                kind = ("pad_generate" in protocol.slips, "in_sample" in protocol.slips)
                if kind not in drawn:
                    drawn[kind] = draw_paraphrases(run, targets, rows, protocol)
                    if kind not in KEPT:
                        tensors |= drawn[kind].named(f"drawn.{key}.")
                h_nd = re_encode(run.backbone, drawn[kind].sequences, protocol)
                arrays[f"paraphrase.{key}"] = h_nd.reshape(len(rows), N_PARAPHRASES, -1)
            bar.update()
    tensors |= {f"{what}.{key}": arrays[f"{what}.{key}"] for key in STEPS for what in ("paraphrase", "replay")}
    parents = {"targets": targets.sha256, "ceilings": ceilings.sha256}
    return Ablation.of(run.folder.save(ABLATION, tensors, made_from=parents, seed=run.seed))


def _known(ceilings: Ceilings) -> dict[str, np.ndarray]:
    """What notebook 03 has encoded under a step's protocol: both protocols' own texts, and the replay ladder."""
    arrays = {f"replay.{reading}": h_Md for reading, h_Md in ceilings.ladder.items()}
    for protocol in PROTOCOLS:
        texts, key = ceilings.texts[protocol.name], protocol.reading
        arrays |= {f"replay.{key}": texts.replay, f"paraphrase.{key}": texts.paraphrase}
    return arrays


def load_ablation(run: Run) -> Ablation:
    """The ablation's arrays; raises ``ArtefactError`` if notebook 03 has not made them."""
    return Ablation.of(run.folder.load(ABLATION))


PROBE = "probe"
PROBE_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
CHUNK = 1024
NEAREST_ROWS = 256


@dataclass
class ProbeTexts:
    """The probe's texts of some targets: ``ids`` (R, n), and their last 1, 2, 4, 8 tokens re-encoded (R, lengths, d)."""

    rows: np.ndarray
    ids: np.ndarray
    h_bos: np.ndarray
    h_nobos: np.ndarray
    sha256: str

    @classmethod
    def of(cls, artefact: Artefact) -> "ProbeTexts":
        t = artefact.tensors
        return cls(t["rows"], *(t[f"probe_{name}"] for name in ("ids", "h_bos", "h_nobos")), artefact.sha256)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Ids (len(rows), n) of these targets' texts."""
        return self.ids[rows_at(self.rows, rows)]

    def h(self, protocol: Protocol, rows: np.ndarray) -> np.ndarray:
        """(len(rows), lengths, d) of these targets, as the protocol encodes it."""
        return (self.h_bos if "bos" not in protocol.slips else self.h_nobos)[rows_at(self.rows, rows)]


def fit_spec(config: RunConfig) -> dict:
    """What a linear fit depends on beside the run's identity and its targets, strengths of the ridge aside."""
    s = config.sizes
    return {"n_eval": s.n_eval, "tail_tokens": TAIL_TOKENS, "validation": [VALIDATION_SHARE, s.n_validate]}


SPECS[PROBE] = lambda config: {**fit_spec(config), "ridges": PROBE_RIDGES, "lengths": PROBE_LENGTHS}


def make_probe(run: Run, targets: Targets) -> ProbeTexts:
    """The probe's texts of the in-sample and the held-out targets, or what is on disk."""
    if run.folder.has(PROBE):
        return ProbeTexts.of(run.folder.load(PROBE))
    rows, n = np.concatenate([targets.in_sample, targets.held_out]), TAIL_TOKENS
    train, validation = fit_split(run, targets)
    # Without texts (released vectors alone) there is nothing to fit it to: it writes no tokens.
    ids_Rn, trials = np.empty((len(rows), 0), dtype=np.int32), []
    if len(train):
        probe, trials = fit_probe(run.backbone, [(targets, train)], targets, validation, n)
        ids_Rn = probe.decode(targets.v[rows], n)
    texts, shape = [row[-k:].tolist() for row in ids_Rn for k in PROBE_LENGTHS], (len(rows), len(PROBE_LENGTHS), -1)
    tensors = {
        "rows": rows,
        "probe_ids": ids_Rn.astype(np.int32),
        "probe_h_bos": re_encode(run.backbone, texts, CORRECTED.on_ids).reshape(shape),
        "probe_h_nobos": re_encode(run.backbone, texts, PUBLISHED.on_ids).reshape(shape),
    }
    facts = {"seed": run.seed, "trials": trials, "train_rows": len(train)}
    return ProbeTexts.of(run.folder.save(PROBE, tensors, made_from={"targets": targets.sha256}, **facts))


def load_probe(run: Run) -> ProbeTexts:
    """The probe's texts; raises ``ArtefactError`` if notebook 04 has not made them."""
    return ProbeTexts.of(run.folder.load(PROBE))


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

    def add(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Add rows of X and Y."""
        self.raw_xx += (x_np.T @ x_np).cpu()
        self.add_all_but_xx(x_np, y_nq)

    def add_all_but_xx(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Add rows of X and Y whose XᵀX the caller adds to ``raw_xx``, having a cheaper way to it."""
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
            y_nj = torch.from_numpy(_tails(own, chosen, n, backbone.start_id)).to(backbone.device)
            y_nq = (table_Vd[y_nj].float() - mean_d).flatten(1)
            equations.add(torch.from_numpy(own.v[chosen] - v_mean_d), y_nq.cpu())
    last = _tails(targets, validation, 1, backbone.start_id)
    trials = []
    for ridge in PROBE_RIDGES:
        b_dq, intercept_q = (x.float() for x in equations.solve(ridge))
        probe = Probe(b_dq, intercept_q, v_mean_d, mean_d, table_Vd)
        trials.append((float((probe.decode(targets.v[validation], 1) == last).mean()), ridge, probe))
    best = max(trials, key=lambda t: t[0])[2]
    return best, [{"ridge": ridge, "names_last_token": share} for share, ridge, _ in trials]


def _tails(targets: Targets, rows: np.ndarray, n: int, start_id: int) -> np.ndarray:
    return tail_features(targets.ids, rows, targets.lengths[rows], n, start_id)


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
