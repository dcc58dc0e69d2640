"""Target activations: draw sequences from the start token, extract v, check the pool (PROTOCOL.md §1)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nla_utils.config import FLOOR_ROWS, ROOT, RunConfig
from nla_utils.errors import ArtefactError, CollapsedTargetsError
from nla_utils.lm.backbone import Backbone, check_finite, outside_ids
from nla_utils.lm.sampling import Samples, SamplingSettings, pad, row_streams, sample
from nla_utils.lm.weights import BackboneSpec, fetch_targets, resolve, targets_content
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import Protocol
from nla_utils.run import Run
from nla_utils.store import SPECS, Artefact, ChunkStore, Progress, require_disk

# A text of fewer tokens is left out: its activation is mostly that of the start.
LEAST_TOKENS = 8


def read_texts(path: Path) -> list[str]:
    """The texts of a corpus in their order, files by name; raises ``ArtefactError`` that names the file and the line."""
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
        if not files:
            raise ArtefactError(
                f"{path} holds no .txt file; a corpus is a folder of them, or a .jsonl with a field 'text'"
            )
        return [_decoded(file) for file in files]
    if path.suffix != ".jsonl" or not path.is_file():
        raise ArtefactError(f"{path} is neither a .jsonl file nor a folder of .txt files")
    # JSON Lines ends a line at \n alone: U+2028 and the like are part of a text.
    return [_text_of(line, f"{path}, line {i}") for i, line in enumerate(_decoded(path).split("\n"), 1) if line.strip()]


def _decoded(path: Path) -> str:
    try:
        # A byte order mark is no part of the text.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path} is not UTF-8 ({error})") from None
    except OSError as error:
        raise ArtefactError(f"{path} could not be read ({error.strerror})") from None


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{where} is not valid JSON ({error})") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ArtefactError(f"{where}: it needs a field 'text' that holds a string, not {row!r:.80}")
    return text


def corpus_hash(texts: list[str]) -> str:
    """Hex sha256 over the texts of a corpus."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def corpus_rows(texts: list[str], path: Path, tokenizer, n: int, longest: int) -> list[list[int]]:
    """Token ids of the first n different texts of the corpus at ``path`` that have 8 tokens or more, cut at ``longest``.

    Texts that are alike in those tokens have the same activation, so only the first of them is taken: else a held-out
    target could be in the pool. Raises ``ConfigError`` for a text that spells a special token, ``ArtefactError`` where
    there are fewer than n.
    """
    rows = [outside_ids(tokenizer, text, f"{path}, text {i}")[:longest] for i, text in enumerate(texts, 1)]
    long_enough = [tuple(ids) for ids in rows if len(ids) >= LEAST_TOKENS]
    different = list(dict.fromkeys(long_enough))
    if len(different) < n:
        raise ArtefactError(
            f"{path} holds {len(texts)} texts, {len(rows) - len(long_enough)} of them shorter than {LEAST_TOKENS} tokens and "
            f"{len(long_enough) - len(different)} equal to another in their first {longest} tokens; the run needs {n}: "
            f"give more texts, or add --set n_targets={len(different)}"
        )
    return [list(ids) for ids in different[:n]]


def corpus_targets(texts: list[str], path: Path, backbone: Backbone, n: int, longest: int) -> dict[str, np.ndarray]:
    """The texts of :func:`corpus_rows` as targets: ids (n, T) int32, lengths (n,), and v (n, d) at the last token of each,
    behind BOS."""
    rows = corpus_rows(texts, path, backbone.tokenizer, n, longest)
    ids_NT, valid_NT = pad(rows, backbone.pad_id, "right")
    lengths = valid_NT.sum(dim=1).int().numpy()
    return {"ids": ids_NT.int().numpy(), "lengths": lengths, "v": backbone.encode(rows, start=True)}


# Pages of a mapped file that were touched count as memory until it is closed: about 0.1 MB a sample.
SAMPLES_PER_OPENING = 6000
PARQUET_BATCH = 64
LAYOUTS = (
    "'activations' or 'activations_by_layer' (a list of (T, d), or (N, T, d)), with ids in 'token_ids' or 'sequences', or "
    "text in 'sequences' or 'texts', and 'attn_masks' where padded; or one tensor (N, d) of vectors"
)


@dataclass
class Pack:
    """N samples of a file: ``hidden`` gives each one's activations (T, d), the start token's first, and as far as they
    are there ``ids`` (T,), ``masks`` (T,) and ``texts``. Vectors alone are samples of one position."""

    hidden: Sequence[Tensor]
    ids: Optional[Sequence[Any]] = None
    masks: Optional[Sequence[Any]] = None
    texts: Optional[Sequence[str]] = None
    meta: dict = field(default_factory=dict)

    @property
    def has_positions(self) -> bool:
        """Whether there are activations of whole sequences, whose length a text can be compared with."""
        return self.ids is not None or len(self.hidden[0]) > 1


def load_pt(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # The loader has an error of its own for each way in which a file can be broken or unsafe.
    except Exception as error:
        raise ArtefactError(
            f"{path} was not read: it is broken, or holds more than tensors and plain values ({error})"
        ) from None


def fields_of(content: Any, path: Path, layer: int) -> Pack:
    """The samples of a ``.pt``; raises ``ArtefactError`` that says what is there instead."""
    if isinstance(content, Tensor) and content.ndim == 2:
        return Pack(content[:, None])
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds a {type(content).__name__}, no released targets ({LAYOUTS})")
    by_layer = {int(key): x for key, x in (content.get("activations_by_layer") or {}).items()}
    hidden = by_layer.get(layer, None if by_layer else content.get("activations"))
    if hidden is None and by_layer:
        raise ArtefactError(f"{path} holds layers {sorted(by_layer)}, this run reads layer {layer}")
    if hidden is None or not len(hidden) or hidden[0].ndim != 2:
        raise ArtefactError(f"{path} holds {sorted(map(str, content))}, no released targets ({LAYOUTS})")
    sequences, texts = content.get("sequences"), content.get("texts")
    if sequences is not None and isinstance(sequences[0], str):
        sequences, texts = None, sequences
    meta = {**{k: v for k, v in content.items() if isinstance(v, (str, int))}, **(content.get("meta") or {})}
    if by_layer:
        meta["layer"] = meta["extraction_layer"] = layer
    pack = Pack(hidden, content.get("token_ids", sequences), content.get("attn_masks"), texts, meta)
    for name, column in (("ids", pack.ids), ("masks", pack.masks), ("texts", pack.texts)):
        if column is not None and len(column) != len(hidden):
            raise ArtefactError(f"{path} holds activations of {len(hidden)} samples and {name} of {len(column)}")
    if isinstance(hidden, Tensor) and pack.ids is None and pack.masks is None and hidden.shape[1] > 1:
        raise ArtefactError(f"{path}: its samples are padded to one length; without ids it needs 'attn_masks'")
    return pack


def parquet_rows(path: Path, layer: int) -> int:
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(path)
        names = set(file.schema_arrow.names)
        layers = file.read(columns=["layer"])["layer"].to_numpy() if "layer" in names else None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} was not read ({error}); fetch it again") from None
    if "activations" not in names:
        raise ArtefactError(f"{path} has columns {sorted(names)}; released targets have text, activations and layer")
    held = file.metadata.num_rows if layers is None else int((layers == layer).sum())
    if not held:
        raise ArtefactError(f"{path} holds layers {sorted(set(layers.tolist()))}, this run reads layer {layer}")
    return held


def parquet_samples(path: Path, layer: int, d: int) -> Iterator[Pack]:
    """A batch of samples at a time; activations as (T, d), nested or in one row."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    file = parquet.ParquetFile(path)
    columns = [c for c in ("text", "activations", "layer") if c in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=PARQUET_BATCH, columns=columns):
        chosen = [i for i in range(len(batch)) if "layer" not in columns or batch["layer"][i].as_py() == layer]
        hidden = []
        for i in chosen:
            flat = batch["activations"][i].values
            nested = pa.types.is_list(flat.type) or pa.types.is_large_list(flat.type)
            width = len(flat[0].values) if nested else d
            flat = (flat.flatten() if nested else flat).to_numpy(zero_copy_only=False)
            if not len(flat) or len(flat) % width:
                raise ArtefactError(f"{path}: an activation has {len(flat)} numbers, not a multiple of {width}")
            hidden.append(torch.from_numpy(flat.astype(np.float32)).reshape(-1, width))
        if chosen:
            texts = [batch["text"][i].as_py() for i in chosen] if "text" in columns else None
            yield Pack(hidden, texts=texts)


def samples(path: Path, layer: int, d: int, n: int) -> Iterator[tuple[Pack, int]]:
    """(pack, index in it) of the first ``n`` samples of a file."""
    if path.suffix == ".parquet":
        found = ((pack, i) for pack in parquet_samples(path, layer, d) for i in range(len(pack.hidden)))
        yield from (sample for sample, _ in zip(found, range(n)))
        return
    for first in range(0, n, SAMPLES_PER_OPENING):
        pack = fields_of(load_pt(path), path, layer)
        yield from ((pack, i) for i in range(first, min(first + SAMPLES_PER_OPENING, n)))


CHECKED_ROWS = 64
AGREES, NEEDED_AGREEMENT = 0.98, 0.9
# What the packs call the facts that are compared with the run's.
META = {
    "backbone": ("backbone_id", "backbone"),
    "layer": ("extraction_layer", "layer"),
    "d": ("d",),
    "start token": ("bos_token_id",),
}


def check_released(path: Path, spec: BackboneSpec, layer: int, d: int, start_id: int, n: int) -> None:
    """Raise ``ArtefactError`` that names the file if it is broken, unknown, too small, or of another backbone or layer.

    Nothing but its first sample is read.
    """
    if path.suffix == ".safetensors":
        with _own(path) as f:
            held, width = f.get_slice("v").get_shape()
        _require_shape(path, held, width, n, d)
        return
    if path.suffix == ".parquet":
        held, first = parquet_rows(path, layer), next(parquet_samples(path, layer, d))
    else:
        first = fields_of(load_pt(path), path, layer)
        held = len(first.hidden)
    _require_shape(path, held, first.hidden[0].shape[-1], n, d)
    own = {"backbone": spec.source, "layer": layer, "d": d, "start token": start_id}
    for what, names in META.items():
        stated = next((first.meta[name] for name in names if first.meta.get(name) is not None), own[what])
        # A folder's name says nothing of the model in it.
        comparable = what != "backbone" or isinstance(spec.source, str) and not Path(spec.source).is_dir()
        if comparable and str(stated).split("@")[0].lower() != str(own[what]).split("@")[0].lower():
            raise ArtefactError(f"{path} says that its {what} is {stated!r}; this run has {own[what]!r}")


def read_released(path: Path, backbone: Backbone, n: int) -> tuple[dict[str, np.ndarray], dict]:
    """The first ``n`` targets of a file, and facts to be recorded.

    Returns ids (n, T) int32 of generated tokens, lengths (n,), 0 where the text of a target is not known, and v (n, d)
    float32. Facts: ``texts`` says where the ids are from, ``texts_unmatched`` counts the texts that do not give as many
    tokens as there are activations.

    Raises ``ArtefactError`` as :func:`check_released` does, and where the texts do not re-encode to the activations on
    this backbone and layer, with the likely cause; ``CollapsedTargetsError`` where all activations are the same.
    """
    check_released(path, backbone.spec, backbone.layer, backbone.d, backbone.start_id, n)
    if path.suffix == ".safetensors":
        with _own(path) as f:
            tensors = {k: f.get_slice(k)[:n] for k in ("ids", "lengths", "v")}
        facts = {"texts": "ids", "texts_unmatched": 0}
    else:
        tensors, facts = _read_samples(path, backbone, n)
    _check(tensors, path, backbone)
    return tensors, facts


def _own(path: Path):
    try:
        f = safe_open(path, "np")
    except Exception as error:  # the library's own, for each way in which a file can be broken
        raise ArtefactError(f"{path} was not read ({error}); fetch it again") from None
    missing = {"ids", "lengths", "v"} - set(f.keys())
    if missing:
        raise ArtefactError(f"{path} lacks {sorted(missing)}")
    return f


def _require_shape(path: Path, held: int, width: int, n: int, d: int) -> None:
    if held < n:
        raise ArtefactError(f"{path} holds {held} targets, the run needs {n}; add --set n_targets={held}")
    if width != d:
        raise ArtefactError(f"{path}: activations have width {width}, the backbone has {d}; it is of another backbone")


def _read_samples(path: Path, backbone: Backbone, n: int) -> tuple[dict[str, np.ndarray], dict]:
    v_nd, rows, texts, counts = np.empty((n, backbone.d), dtype=np.float32), [], [], np.zeros(n, dtype=np.int64)
    found = samples(path, backbone.layer, backbone.d, n)
    has_positions = True
    for i, (pack, j) in enumerate(Progress(found, desc="reading released targets", unit="target", total=n)):
        at, row = _valid(pack, j, path, backbone)
        v_nd[i], counts[i] = pack.hidden[j][at[-1]].float().numpy(), len(at) - 1
        has_positions &= pack.has_positions
        rows.append(row)
        texts.append(pack.texts[j] if pack.texts is not None else None)
    source, unmatched = "ids", 0
    if rows[0] is None and has_positions and texts[0] is not None:
        rows = _tokenized_again(texts, counts, backbone)
        source, unmatched = "tokenized again", sum(not row for row in rows)
        if unmatched > n / 2:
            raise ArtefactError(
                f"{path}: {unmatched} of {n} texts, tokenized again, do not give as many tokens as there are activations: "
                f"they are of another tokenizer, or the activations are padded and there are no 'attn_masks'"
            )
        print(
            f"{path.name}: {unmatched} of {n} texts, tokenized again, do not give as many tokens as there are "
            f"activations; they are kept as vectors, and left out of ceilings and training pairs"
        )
    elif rows[0] is None:
        rows, source = [[]] * n, "none"
        print(f"{path.name}: vectors without texts that could be compared with them: no ceilings, no training")
    lengths = np.array([len(r) for r in rows], dtype=np.int32)
    ids_nT = np.full((n, max(1, lengths.max())), backbone.pad_id, dtype=np.int32)
    for filled, row in zip(ids_nT, rows):
        filled[: len(row)] = row
    return {"ids": ids_nT, "lengths": lengths, "v": v_nd}, {"texts": source, "texts_unmatched": unmatched}


def _valid(pack: Pack, j: int, path: Path, backbone: Backbone) -> tuple[np.ndarray, Optional[list[int]]]:
    """Positions of a sample's start token and valid tokens, and the ids of the latter if they are there.

    The mask says which are valid, else the first generated EOS, which is kept, else all of them.
    """
    held = len(pack.hidden[j])
    mask = np.ones(held, dtype=bool) if pack.masks is None else np.asarray(pack.masks[j]).astype(bool)
    if pack.ids is not None:
        ids = np.asarray(pack.ids[j])
        if pack.masks is None:
            mask = np.ones(len(ids), dtype=bool)
            ended = np.flatnonzero(np.isin(ids[1:], backbone.eos_ids))
            mask[int(ended[0]) + 2 if len(ended) else len(ids) :] = False
    at = np.flatnonzero(mask)
    row = [int(x) for x in ids[at]] if pack.ids is not None and len(ids) == len(mask) else None
    wrong = pack.ids is not None and (row is None or len(row) < 2 or row[0] != backbone.start_id)
    if wrong or not len(at) or at[-1] >= held:
        shown = "" if pack.ids is None else f" and ids {[int(x) for x in np.asarray(pack.ids[j])[:4]]}…"
        raise ArtefactError(
            f"{path}: sample {j} has activations {tuple(pack.hidden[j].shape)}, {mask.sum()} valid positions{shown}; "
            f"ids begin with the start token {backbone.start_id}, and each valid one has an activation"
        )
    return at, None if row is None else row[1:]


def _tokenized_again(texts: Sequence[str], counts: np.ndarray, backbone: Backbone) -> list[list[int]]:
    """Ids of texts that have lost their special tokens, each as long as ``counts`` says, or empty.

    A sequence shorter than the longest ended in an EOS, which its text has lost.
    """
    rows = []
    for text, count in zip(texts, counts):
        ids = backbone.tokenize_text(text)
        if count < counts.max():
            ids = [*ids, *backbone.eos_ids[:1]]
        rows.append(ids if len(ids) == count else [])
    return rows


def _check(tensors: dict[str, np.ndarray], path: Path, backbone: Backbone) -> None:
    """Texts of some targets must re-encode to their v, behind the start token."""
    v_nd, known = tensors["v"], np.flatnonzero(tensors["lengths"])
    shown = np.linspace(0, len(v_nd) - 1, min(CHECKED_ROWS, len(v_nd))).astype(int)
    if len(np.unique(v_nd[shown], axis=0)) <= max(1, len(shown) // 2):
        raise CollapsedTargetsError(
            f"{path}: most of its activations are the same vector: its sequences were cut at the start token, which is "
            f"an EOS too; it needs to be made again"
        )
    if not len(known):
        return
    rows = known[np.linspace(0, len(known) - 1, min(CHECKED_ROWS, len(known))).astype(int)]
    sequences = [tensors["ids"][i, : tensors["lengths"][i]].tolist() for i in rows]
    mu_d = v_nd.mean(axis=0)
    agree = float((fve(backbone.encode(sequences, start=True), v_nd[rows], mu_d) > AGREES).mean())
    if agree < NEEDED_AGREEMENT:
        raise ArtefactError(
            f"{path}: the texts of only {agree:.0%} of {len(rows)} samples re-encode to their activations at layer "
            f"{backbone.layer} of {backbone.name}; {_cause(path, backbone, sequences, v_nd, rows, mu_d)}"
        )


def _cause(
    path: Path, backbone: Backbone, sequences: list[list[int]], v_nd: np.ndarray, rows: np.ndarray, mu_d: np.ndarray
) -> str:
    """Why texts do not re-encode to their activations, as far as can be told from both."""
    layers = range(1, backbone.n_layers)
    h_LRd = backbone.encode_layers(sequences, True, layers)
    by_layer = [float((fve(h_Rd, v_nd[rows], mu_d) > AGREES).mean()) for h_Rd in h_LRd]
    best = int(np.argmax(by_layer))
    if by_layer[best] >= NEEDED_AGREEMENT:
        return f"they are those of layer {layers[best]}: add --layer {layers[best]}, or take another file"
    if path.suffix == ".pt":
        hidden, h_Rd = fields_of(load_pt(path), path, backbone.layer).hidden, h_LRd[backbone.layer - 1]
        elsewhere = [fve(h_d, hidden[i].float().numpy(), mu_d).max() > AGREES for i, h_d in zip(rows, h_Rd)]
        if np.mean(elsewhere) >= NEEDED_AGREEMENT:
            return "they are at other positions of the same samples: the last one is padding"
    return "they are of other weights (another model, revision, or fine-tuned), or of another tokenizer"


TARGETS = "targets"


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
        return self.held_out if "in_sample" not in protocol.slips else self.in_sample

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


SPECS[TARGETS] = spec


def make_targets(run: Run) -> Targets:
    """The run's targets: from disk, from a release or a corpus if the run names one, or drawn and extracted.

    Raises ``ArtefactError`` if what is on disk is another run's or there is no room, ``CollapsedTargetsError`` or
    ``BackboneError`` if the activations are not healthy.
    """
    if run.folder.has(TARGETS):
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
    return Targets.of(run.folder.save(TARGETS, tensors, seed=run.seed, **facts), run.config)


def take_released(run: Run) -> Targets:
    """The first N released targets as this run's; raises ``SourceError`` or ``ArtefactError`` if they do not fit."""
    released = run.config.released_targets
    path = fetch_targets(released, run.backbone.spec)
    tensors, found = read_released(path, run.backbone, run.sizes.n_targets)
    facts = {"released": released, "released_from": path.parent.name, "file": path.name, **found}
    facts["health"] = check_health(tensors["v"])
    return Targets.of(run.folder.save(TARGETS, tensors, seed=run.seed, **facts), run.config)


def take_corpus(run: Run) -> Targets:
    """The first N texts of the run's corpus as its targets; raises ``ArtefactError`` if they do not do."""
    path = ROOT / run.config.corpus
    texts = read_texts(path)
    tensors = corpus_targets(texts, path, run.backbone, run.sizes.n_targets, run.sizes.max_new_tokens)
    facts = {"corpus": path.name, "health": check_health(tensors["v"])}
    return Targets.of(run.folder.save(TARGETS, tensors, seed=run.seed, **facts), run.config)


def load_targets(run: Run) -> Targets:
    """Targets made by notebook 01; raises ``ArtefactError`` if they are missing, of another run or corpus, or broken."""
    return Targets.of(run.folder.load(TARGETS), run.config)


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
