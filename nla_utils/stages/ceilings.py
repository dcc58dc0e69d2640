"""What text can reach at all: replay, paraphrase, tail oracle, and the texts of the null (PROTOCOL.md §5, §8).

Everything that needs the model happens here; :mod:`nla_utils.scores.ceilings` makes scores from the arrays.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Mapping, Optional, Sequence

import numpy as np

from nla_utils.artefacts import SPECS, Artefact, json_hash, require_disk
from nla_utils.chunks import ChunkStore
from nla_utils.config import N_PARAPHRASES, POOL_TEXTS, TAIL_LENGTHS, RunConfig
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import Samples, SamplingSettings, pad, row_streams, sample
from nla_utils.progress import Progress
from nla_utils.protocol import CORRECTED, LADDER, PAPER, PROTOCOLS, Protocol
from nla_utils.run import Run
from nla_utils.stages.encoding import TEXT_BATCH, nats_per_token, re_encode
from nla_utils.stages.targets import Targets

ARTEFACT = "ceilings"
PROMPT = (
    "Paraphrase the following text using different words but the same meaning.\n\n"
    "Text: {text}\n\nParaphrase:"
)

SPECS[ARTEFACT] = lambda config: {
    "n_eval": config.sizes.n_eval, "pool": [config.sizes.pool_size, POOL_TEXTS], "text_batch": TEXT_BATCH,
    "paraphrases": N_PARAPHRASES, "paraphrase_sampling": _paraphrase_settings(config).record(), "prompt": PROMPT,
    "tail_lengths": TAIL_LENGTHS, "readings": [asdict(p) for p in (*PROTOCOLS, *LADDER.values())],
}  # fmt: skip


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
    """All that notebook 03 encodes: the texts of both protocols by name, and the replay ladder's (M, d) by step.

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
    if run.folder.has(ARTEFACT):
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
        tensors["paper.pool_h"] = re_encode(backbone, targets.sequences(targets.pool), PAPER.on_ids)
        # Behind BOS a target's text re-encodes to its own v, so every one that is not evaluated costs nothing.
        # The pool comes first among them.
        tensors["corrected.pool_h"] = targets.v[targets.unevaluated]
        nats = nats_per_token(backbone, targets.sequences(targets.pool[:POOL_TEXTS]))
        tensors["pool_logp"] = -nats.astype(np.float32)
        bar.update()
        ladder = _ladder(backbone, targets, tensors["paper.replay"])
        tensors |= {f"ladder.{step}": h_Md for step, h_Md in ladder.items()}
        bar.update()
    return Ceilings.of(run.folder.save(ARTEFACT, tensors, made_from={"targets": targets.sha256}))


def load_ceilings(run: Run) -> Ceilings:
    """Ceilings made by notebook 03; raises ``ArtefactError`` if they are missing, of another run or broken."""
    return Ceilings.of(run.folder.load(ARTEFACT))


def _ladder(backbone: Backbone, targets: Targets, published: np.ndarray) -> dict[str, np.ndarray]:
    """Replay (M, d) of the paper's own targets at each step of :data:`LADDER`, the first of which is there."""
    own, first = targets.sequences(targets.in_sample), {"published": published}
    return first | {s: re_encode(backbone, own, p) for s, p in LADDER.items() if s not in first}


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
    side = "left" if protocol.left_prompts else backbone.padding_side

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
    ids, logp = np.full((n, settings.max_new_tokens), backbone.pad_id, dtype=np.int32), np.full(n, np.nan, dtype=np.float32)
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
    if protocol.left_prompts and ids[0] != backbone.start_id:
        ids = [backbone.start_id, *ids]
    return ids
