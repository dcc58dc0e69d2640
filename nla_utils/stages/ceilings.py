"""What text can reach at all: replay, paraphrase, tail oracle, and the texts of the null (PROTOCOL.md §5, §8).

Everything that needs the model happens here; :mod:`nla_utils.scores.ceilings` makes scores from the arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

import numpy as np

from nla_utils.artefacts import Artefact, derive_seed, json_hash, require_disk
from nla_utils.chunks import ChunkStore
from nla_utils.config import N_PARAPHRASES, TAIL_LENGTHS, RunConfig
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import Samples, SamplingSettings, pad, sample
from nla_utils.progress import Progress
from nla_utils.protocol import CORRECTED, PAPER, PROTOCOLS, Protocol
from nla_utils.run import Run
from nla_utils.stages.encoding import re_encode
from nla_utils.stages.targets import Targets

ARTEFACT = "ceilings"
PROMPT = (
    "Paraphrase the following text using different words but the same meaning.\n\n"
    "Text: {text}\n\nParaphrase:"
)
# Replay, one slip corrected after the other.
LADDER: dict[str, Protocol] = {
    "published": PAPER,
    "right_index": PAPER.fix("left_pad"),
    "same_ids_no_bos": PAPER.on_ids,
    "with_bos": PAPER.fix("left_pad", "bos"),
    "same_ids": PAPER.fix("left_pad", "bos", "eos_text"),
}


@dataclass
class EncodedTexts:
    """One protocol's texts, re-encoded as it does: ``replay`` (M, d), ``paraphrase`` (M, 8, d), ``tail``
    (M, len(TAIL_LENGTHS), d), the null's ``pool_h`` (P, d), and where they are kept the paraphrases' ids (8 M, T)."""

    replay: np.ndarray
    paraphrase: np.ndarray
    tail: np.ndarray
    pool_h: np.ndarray
    paraphrase_ids: Optional[np.ndarray] = None
    paraphrase_lengths: Optional[np.ndarray] = None

    def paraphrases(self) -> list[list[int]]:
        """Token ids of 8 paraphrases per target, targets in order."""
        return [row[:n].tolist() for row, n in zip(self.paraphrase_ids, self.paraphrase_lengths)]


@dataclass
class Ceilings:
    """All that notebook 03 encodes: the texts of both protocols by name, and the replay ladder's (M, d) by step."""

    texts: Mapping[str, EncodedTexts]
    ladder: Mapping[str, np.ndarray]
    sha256: str

    @classmethod
    def of(cls, artefact: Artefact) -> "Ceilings":
        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(f"{prefix}."): a for k, a in artefact.tensors.items() if k.startswith(f"{prefix}.")}

        return cls({p.name: EncodedTexts(**part(p.name)) for p in PROTOCOLS}, part("ladder"), artefact.sha256)


def make_ceilings(run: Run, targets: Targets) -> Ceilings:
    """Encode all that notebook 03 scores, or load it if it is finished."""
    if run.folder.has(ARTEFACT):
        return load_ceilings(run)
    backbone, sizes = run.backbone, run.sizes
    require_disk(run.folder.path, 2 * (sizes.pool_size + sizes.n_eval * 40) * backbone.d * 4)
    tensors: dict[str, np.ndarray] = {}
    with Progress(total=6, desc="ceilings", unit="part") as bar:
        for protocol in PROTOCOLS:
            rows, name = targets.eval_rows(protocol), protocol.name
            sequences = draw_paraphrases(run, targets, rows, protocol)
            h_nd = re_encode(backbone, sequences, protocol)
            tensors[f"{name}.paraphrase"] = h_nd.reshape(len(rows), N_PARAPHRASES, -1)
            tensors |= {f"{name}.{k}": x for k, x in _packed(sequences, sizes.max_new_tokens, backbone.pad_id).items()}
            bar.update()
            tensors[f"{name}.replay"] = re_encode(backbone, targets.sequences(rows), protocol)
            tails = re_encode(backbone, tail_ids(targets, rows), protocol.on_ids)
            tensors[f"{name}.tail"] = tails.reshape(len(rows), len(TAIL_LENGTHS), -1)
            bar.update()
        # Where no text of the pool is known there is no null without BOS: NaN.
        pool = targets.pool[targets.lengths[targets.pool] > 0]
        tensors["paper.pool_h"] = re_encode(
            backbone, targets.sequences(pool if len(pool) else targets.pool), PAPER.on_ids
        )
        # Behind BOS the pool's texts re-encode to the pool's own activations.
        tensors["corrected.pool_h"] = targets.v[targets.pool]
        bar.update()
        ladder = _ladder(backbone, targets, tensors["paper.replay"])
        tensors |= {f"ladder.{step}": h_Md for step, h_Md in ladder.items()}
        bar.update()
    facts = {"seed": run.seed, "sampling": _paraphrase_settings(run.config).record(), "prompt": PROMPT}
    return Ceilings.of(run.folder.save(ARTEFACT, tensors, made_from={"targets": targets.sha256}, **facts))


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


def draw_paraphrases(run: Run, targets: Targets, rows: np.ndarray, protocol: Protocol) -> list[list[int]]:
    """Token ids of 8 paraphrases per target, targets in order; what any run beside this one has drawn is taken.

    A target whose text is not known has paraphrases of no tokens. Prompts are padded on the left and begin with the start token where ``left_prompts``, else as the tokenizer does
    by default (slip ``pad_generate``).
    """
    backbone, settings = run.backbone, _paraphrase_settings(run.config)
    kind = CORRECTED.name if protocol.left_prompts else PAPER.name
    known = targets.lengths[rows] > 0
    everything, rows = rows, rows[known]
    if not len(rows):
        return [[]] * (len(everything) * N_PARAPHRASES)
    prompts = [prompt_ids(backbone, backbone.decode_text(targets.sequence(i)), protocol) for i in rows]
    side = "left" if protocol.left_prompts else backbone.padding_side

    def draw(c: int, part_of: slice) -> dict[str, np.ndarray]:
        seed = derive_seed(run.seed, f"paraphrase/{kind}", c)
        repeated = [p for p in prompts for _ in range(N_PARAPHRASES)]
        samples = continue_prompts(backbone, repeated[part_of], settings, seed, side)
        return {"ids": samples.ids, "lengths": samples.lengths}

    # Beside a backbone's runs, under a hash of all they depend on. The layer is not among it: a sweep draws them once.
    plan = {k: v for k, v in run.folder.identity.items() if k != "layer"}
    plan |= {"protocol": kind, "prompt": PROMPT, "sampling": settings.record()}
    plan |= {"sources": json_hash(targets.sequences(rows)), "batch": backbone.sample_batch}
    chunks = ChunkStore(run.folder.path.parent / "paraphrases" / json_hash(plan)[:16], plan)
    drawn = chunks.fill(len(rows) * N_PARAPHRASES, backbone.sample_batch, draw, f"paraphrasing, {kind}", "text")
    texts = iter([row[:n].tolist() for row, n in zip(drawn["ids"], drawn["lengths"])])
    return [next(texts) if there else [] for there in np.repeat(known, N_PARAPHRASES)]


def continue_prompts(
    backbone: Backbone, prompts: Sequence[Sequence[int]], settings: SamplingSettings, seed: int, side: str
) -> Samples:
    """One continuation a prompt, the prompts padded on ``side`` and decoded together."""
    ids_BT, mask_BT = pad(prompts, backbone.pad_id, side)
    return sample(backbone, backbone.embed(ids_BT), settings, seed, mask_BT)


def prompt_ids(backbone: Backbone, text: str, protocol: Protocol) -> list[int]:
    """The prompt as the tokenizer encodes it by default; behind the start token where ``left_prompts``."""
    ids = backbone.tokenizer(PROMPT.format(text=text)).input_ids
    if protocol.left_prompts and ids[0] != backbone.start_id:
        ids = [backbone.start_id, *ids]
    return ids


def _packed(sequences: Sequence[Sequence[int]], width: int, pad_id: int) -> dict[str, np.ndarray]:
    ids = np.full((len(sequences), width), pad_id, dtype=np.int32)
    for i, s in enumerate(sequences):
        ids[i, : len(s)] = s
    lengths = np.array([len(s) for s in sequences], dtype=np.int32)
    return {"paraphrase_ids": ids, "paraphrase_lengths": lengths}
