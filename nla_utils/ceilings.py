"""What text can reach at all: replay, paraphrase, tail oracle, and the texts of the null (§5, §8).

Everything that needs the model happens here; scores are made from the arrays by
:mod:`nla_utils.evaluation`.
"""

from __future__ import annotations

from typing import Sequence

import numpy as np

from nla_utils import paper_way
from nla_utils.backbone import Backbone
from nla_utils.config import N_PARAPHRASES, PROTOCOLS, TAIL_LENGTHS, RunConfig
from nla_utils.parallel import fill_chunks
from nla_utils.progress import Progress
from nla_utils.sampling import SAMPLE_BATCH, Samples, SamplingSettings, sample
from nla_utils.store import Artefact, ChunkStore, RunFolder, derive_seed, json_hash, require_disk
from nla_utils.targets import Targets

ARTEFACT = "ceilings"
PROMPT = (
    "Paraphrase the following text using different words but the same meaning.\n\n"
    "Text: {text}\n\nParaphrase:"
)


def make_ceilings(run: RunConfig, backbone: Backbone, targets: Targets, folder: RunFolder) -> Artefact:
    """Encode all that notebook 03 scores, or load it if it is whole.

    Arrays, for each protocol p: ``{p}.replay`` (M, d), ``{p}.paraphrase`` (M, 8, d),
    ``{p}.tail`` (M, len(TAIL_LENGTHS), d), ``{p}.pool_h`` (P, d). The replay ladder, on the paper's own targets:
    ``ladder.*`` (M, d). ``{p}.paraphrase_ids`` and ``_lengths`` keep the texts.
    """
    if folder.has(ARTEFACT):
        return folder.load(ARTEFACT)
    sizes = run.sizes
    require_disk(folder.path, 2 * (sizes.pool_size + sizes.n_eval * 40) * backbone.d * 4)
    tensors: dict[str, np.ndarray] = {}
    with Progress(total=6, desc="ceilings", unit="part") as bar:
        for protocol in PROTOCOLS:
            rows = targets.eval_rows(protocol)
            tensors |= _named(protocol, _paraphrases(run, backbone, targets, rows, protocol, folder))
            bar.update()
            tensors[f"{protocol}.replay"] = replay(backbone, targets, rows, protocol)
            tensors[f"{protocol}.tail"] = _tails(backbone, targets, rows, start=protocol == "corrected")
            bar.update()
        pool = targets.sequences(targets.pool)
        tensors["paper.pool_h"] = backbone.encode(pool, start=False)
        # Behind BOS the pool's texts re-encode to the pool's own activations.
        tensors["corrected.pool_h"] = targets.v[targets.pool]
        bar.update()
        tensors |= _named("ladder", replay_ladder(backbone, targets, targets.in_sample))
        bar.update()
    return folder.save(
        ARTEFACT, tensors, made_from={"targets": targets.sha256}, seed=run.seed,
        sampling=_paraphrase_settings(run).record(), prompt=PROMPT,
    )  # fmt: skip


def _named(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{prefix}.{k}": v for k, v in tensors.items()}


def _texts(backbone: Backbone, targets: Targets, rows: np.ndarray) -> list[str]:
    return [backbone.decode_text(targets.sequence(i)) for i in rows]


def replay(backbone: Backbone, targets: Targets, rows: np.ndarray, protocol: str) -> np.ndarray:
    """The very same texts, encoded as the protocol does (M, d)."""
    if protocol == "paper":
        return paper_way.encode_texts(backbone, _texts(backbone, targets, rows))
    return backbone.encode(targets.sequences(rows), start=True)


def replay_ladder(backbone: Backbone, targets: Targets, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Replay of the same targets, one slip corrected after the other (M, d) each.

    ``published``: text, tokenizer's padding, index count − 1, no BOS. ``right_index``: text, last token,
    no BOS. ``with_bos``: text behind BOS. ``same_ids``: the sampled ids behind BOS, EOS kept.
    ``same_ids_no_bos``: the sampled ids, no BOS.
    """
    texts = _texts(backbone, targets, rows)
    # A text can be empty (the target was a lone EOS); the start token alone stands for it.
    ids = [backbone.tokenize_text(t) or [backbone.start_id] for t in texts]
    own = targets.sequences(rows)
    return {
        "published": paper_way.encode_texts(backbone, texts),
        "right_index": backbone.encode(ids, start=False),
        "with_bos": backbone.encode(ids, start=True),
        "same_ids": backbone.encode(own, start=True),
        "same_ids_no_bos": backbone.encode(own, start=False),
    }


def tail_ids(targets: Targets, rows: np.ndarray) -> list[list[int]]:
    """The source's own last n tokens, target by target, n as in ``TAIL_LENGTHS``."""
    return [targets.sequence(i)[-n:] for i in rows for n in TAIL_LENGTHS]


def _tails(backbone: Backbone, targets: Targets, rows: np.ndarray, start: bool) -> np.ndarray:
    """The source's own last n tokens, re-encoded (M, len(TAIL_LENGTHS), d)."""
    return backbone.encode(tail_ids(targets, rows), start=start).reshape(len(rows), len(TAIL_LENGTHS), -1)


def _paraphrase_settings(run: RunConfig) -> SamplingSettings:
    return SamplingSettings(max_new_tokens=run.sizes.max_new_tokens, top_p=0.95)


def _paraphrases(
    run: RunConfig, backbone: Backbone, targets: Targets, rows: np.ndarray, protocol: str, folder: RunFolder
) -> dict[str, np.ndarray]:
    """8 paraphrases per target: generated and re-encoded as the protocol does.

    ``paper`` re-encodes text; ``corrected`` the sampled ids behind BOS.
    """
    sequences = draw_paraphrases(run, backbone, targets, rows, protocol, folder)
    if protocol == "paper":
        h_nd = paper_way.encode_texts(backbone, [backbone.decode_text(s) for s in sequences])
    else:
        h_nd = backbone.encode(sequences, start=True)
    return {
        "paraphrase": h_nd.reshape(len(rows), N_PARAPHRASES, -1),
        **_packed(sequences, run.sizes.max_new_tokens, backbone.pad_id),
    }


def paraphrase_store(
    run: RunConfig, targets: Targets, folder: RunFolder, rows: np.ndarray, protocol: str
) -> ChunkStore:
    """Where the paraphrases of some targets are kept: beside a backbone's runs, under a hash of all they depend on.

    The layer is not among it: in a sweep they are drawn once.
    """
    plan = {k: v for k, v in folder.identity.items() if k != "layer"}
    plan |= {"protocol": protocol, "prompt": PROMPT, "sampling": _paraphrase_settings(run).record()}
    plan |= {"sources": json_hash(targets.sequences(rows)), "batch": SAMPLE_BATCH}
    return ChunkStore(folder.path.parent / "paraphrases" / json_hash(plan)[:16], plan)


def draw_paraphrases(
    run: RunConfig, backbone: Backbone, targets: Targets, rows: np.ndarray, protocol: str, folder: RunFolder
) -> list[list[int]]:
    """Token ids of 8 paraphrases per target, targets in order; what any run beside this one has drawn is taken.

    ``paper`` pads the prompts on the tokenizer's own side (slip ``pad_generate``); ``corrected`` pads them
    on the left and sees to the start token.
    """
    prompts = [prompt_ids(backbone, text, protocol) for text in _texts(backbone, targets, rows)]
    side = backbone.padding_side if protocol == "paper" else "left"
    settings = _paraphrase_settings(run)
    repeated = [p for p in prompts for _ in range(N_PARAPHRASES)]

    def draw(c: int, part_of: slice) -> dict[str, np.ndarray]:
        seed = derive_seed(run.seed, f"paraphrase/{protocol}", c)
        samples = continue_prompts(backbone, repeated[part_of], settings, seed, side)
        return {"ids": samples.ids, "lengths": samples.lengths}

    store = paraphrase_store(run, targets, folder, rows, protocol)
    drawn = fill_chunks(store, len(repeated), SAMPLE_BATCH, draw, f"paraphrasing, {protocol}", "text")
    return [row[:n].tolist() for row, n in zip(drawn["ids"], drawn["lengths"])]


def continue_prompts(
    backbone: Backbone, prompts: list[list[int]], settings: SamplingSettings, seed: int, side: str
) -> Samples:
    """One continuation a prompt, the prompts padded on ``side`` and decoded together."""
    ids_BT, mask_BT = paper_way.pad(prompts, backbone.pad_id, side)
    return sample(backbone, backbone.embed(ids_BT), settings, seed, mask_BT)


def stored_paraphrases(ceilings: Artefact, protocol: str) -> list[list[int]]:
    """The paraphrases that a protocol's ceiling was made of."""
    ids, lengths = (ceilings.tensors[f"{protocol}.paraphrase_{k}"] for k in ("ids", "lengths"))
    return [row[:n].tolist() for row, n in zip(ids, lengths)]


def prompt_ids(backbone: Backbone, text: str, protocol: str) -> list[int]:
    """The prompt as the tokenizer encodes it by default; ``corrected`` sees to the start token."""
    ids = backbone.tokenizer(PROMPT.format(text=text)).input_ids
    if protocol == "corrected" and ids[0] != backbone.start_id:
        ids = [backbone.start_id, *ids]
    return ids


def _packed(sequences: Sequence[Sequence[int]], width: int, pad_id: int) -> dict[str, np.ndarray]:
    ids = np.full((len(sequences), width), pad_id, dtype=np.int32)
    for i, s in enumerate(sequences):
        ids[i, : len(s)] = s
    lengths = np.array([len(s) for s in sequences], dtype=np.int32)
    return {"paraphrase_ids": ids, "paraphrase_lengths": lengths}
