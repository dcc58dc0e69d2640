"""Targets: sequences (drawn, of a corpus, or released) and the activation v at the end of each (PROTOCOL.md §1)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional, Sequence

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from nla_utils.config import FLOOR_ROWS, ROOT, RunConfig, source_name
from nla_utils.errors import ArtefactError, CollapsedTargetsError
from nla_utils.lm.backbone import Backbone, Description, check_finite, outside_ids, pad
from nla_utils.lm.sampling import Samples, SamplingSettings, row_streams, sample
from nla_utils.lm.weights import fetch_targets, resolve, targets_content
from nla_utils.metrics import fve, fve_matrix
from nla_utils.protocol import Protocol
from nla_utils.run import Run
from nla_utils.store import SPECS, Artefact, ChunkStore, Progress, json_hash, require_disk

TARGETS = "targets"
# A text of fewer tokens is left out: its activation is mostly that of the start.
LEAST_TOKENS = 8
# Pages of a mapped file that were touched count as memory until it is closed: about 0.1 MB a sample.
SAMPLES_PER_OPENING = 6000
PARQUET_BATCH = 64
# Released texts are re-encoded, so many of them; so close must their activations be, and so many of them.
CHECKED_ROWS, AGREES, NEEDED_AGREEMENT = 64, 0.98, 0.9
LAYOUTS = (
    "'activations' or 'activations_by_layer' (a list of (T, d), or (N, T, d)), with ids in 'token_ids' or 'sequences', "
    "or text in 'sequences' or 'texts', and 'attn_masks' where padded; or one tensor (N, d) of vectors"
)
# What released files call the facts that are compared with the run's.
META = {
    "backbone": ("backbone_id", "backbone"),
    "layer": ("extraction_layer", "layer"),
    "d": ("d",),
    "start token": ("bos_token_id",),
}


@dataclass
class Targets:
    """N sequences and the activation at the last token of each.

    ``ids`` (N, T) int32 right-padded, generated tokens only; ``lengths`` (N,), 0 where a released target's text is not
    known, so that it can't be replayed or trained on; ``v`` (N, d) float32.
    Rows are used in four parts: the first M as the paper evaluates them (``in_sample``), the next ``pool``, then
    training only, and the last M, which training never sees (``held_out``). ``unevaluated``: the two in the middle.
    """

    ids: np.ndarray
    lengths: np.ndarray
    v: np.ndarray
    n_eval: int
    pool_size: int
    sha256: str

    def __post_init__(self) -> None:
        n, m = len(self.v), self.n_eval
        self.in_sample, self.pool = np.arange(m), np.arange(m, m + self.pool_size)
        self.unevaluated, self.held_out = np.arange(m, n - m), np.arange(n - m, n)

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

    def sequences(self, rows: Iterable[int]) -> list[list[int]]:
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
        "corpus_sha256": corpus and json_hash(read_texts(ROOT / corpus)),
        "corpus_tokens": corpus and [LEAST_TOKENS, sizes.max_new_tokens],
        "target_sampling": None if released or corpus else target_settings(config).record(),
    }


SPECS[TARGETS] = spec


def make_targets(run: Run) -> Targets:
    """The run's targets: from disk, from a release or a corpus if the run names one, or drawn and encoded.

    Raises ``ArtefactError`` if what is on disk is another run's, what was given does not fit or there is no room,
    ``SourceError`` for a release that cannot be fetched, ``CollapsedTargetsError`` or ``BackboneError`` as
    :func:`check_health` does.
    """
    if run.folder.has(TARGETS):
        return load_targets(run)
    config, backbone, n = run.config, run.backbone, run.sizes.n_targets
    if config.released_targets is not None:
        path = fetch_targets(config.released_targets, backbone.spec)
        tensors, facts = read_released(path, backbone, n)
        name = source_name(config.released_targets)
        where = {"released": name, "released_from": path.parent.name, "file": path.name}
        return save_targets(run, tensors, where | facts)
    if config.corpus is not None:
        path = ROOT / config.corpus
        rows = corpus_rows(read_texts(path), path, backbone.tokenizer, n, run.sizes.max_new_tokens)
        return save_targets(run, _tensors(rows, backbone.encode(rows, start=True), backbone), {"corpus": path.name})
    settings = target_settings(config)
    require_disk(run.folder.path, 3 * n * (backbone.d + settings.max_new_tokens) * 4)
    plan = {**run.folder.conditions, **spec(config), "batch": backbone.sample_batch}
    chunks = ChunkStore(run.folder.file("targets.chunks"), plan)

    def draw(rows: slice) -> dict[str, np.ndarray]:
        return draw_chunk(backbone, settings, target_streams(run, rows))

    tensors = chunks.fill(n, backbone.sample_batch, draw, "drawing targets", "seq")
    targets = save_targets(run, tensors, {"sampling": settings.record()})
    chunks.clear()
    return targets


def load_targets(run: Run) -> Targets:
    """Targets made by notebook 01; raises ``ArtefactError`` if they are missing, broken or of another run."""
    return Targets.of(run.folder.load(TARGETS), run.config)


def save_targets(run: Run, tensors: dict[str, np.ndarray], facts: dict) -> Targets:
    """Keep ids, lengths and v with facts about them; raises as :func:`check_health` does."""
    health = check_health(tensors["v"])
    return Targets.of(run.folder.save(TARGETS, tensors, seed=run.seed, **facts, health=health), run.config)


def check_health(v_Nd: np.ndarray, what: str = "target activations") -> dict:
    """Check that activations are finite and not collapsed into one vector; returns the figures judged by.

    The BOS = EOS trap of PROTOCOL.md §1. Raises ``BackboneError`` or ``CollapsedTargetsError``.
    """
    check_finite(v_Nd, what)
    # A release may hold float16, whose squares end at 256.
    v_Nd = v_Nd.astype(np.float32, copy=False)
    spread, size = float(np.sqrt(v_Nd.var(axis=0).mean())), float(np.sqrt((v_Nd**2).mean()))
    distinct = len(np.unique(v_Nd, axis=0))
    if spread < 1e-4 * size or distinct < 0.5 * len(v_Nd):
        raise CollapsedTargetsError(
            f"{what}: {distinct} distinct vectors among {len(v_Nd)}, spread {spread:.3g} at size {size:.3g}: either "
            f"many texts are the same (or end in the same few tokens), or sequences were cut at the start token "
            f"because it is also an EOS"
        )
    return {"rms": size, "std": spread, "distinct": distinct}


def _tensors(rows: Sequence[Sequence[int]], v_Nd: np.ndarray, backbone: Backbone) -> dict[str, np.ndarray]:
    """ids (N, T) int32, lengths (N,) int32 and v (N, d) of token ids, which may be none, and their activations."""
    ids_NT, valid_NT = pad(rows, backbone.pad_id, "right")
    return {"ids": ids_NT.int().numpy(), "lengths": valid_NT.sum(dim=1).int().numpy(), "v": v_Nd}


# Sequences that the model draws


def target_streams(run: Run, rows: slice) -> np.ndarray:
    """Keys of the random streams that some of the run's sequences are drawn from."""
    return row_streams(run.seed, "targets", range(rows.start, rows.stop))


def draw_sequences(backbone: Backbone, settings: SamplingSettings, streams_B: np.ndarray) -> Samples:
    """One sequence a stream, sampled freely from the start token."""
    return sample(backbone, backbone.embed(torch.full((len(streams_B), 1), backbone.start_id)), settings, streams_B)


def draw_chunk(backbone: Backbone, settings: SamplingSettings, streams_B: np.ndarray) -> dict[str, np.ndarray]:
    """A sequence a stream and the activation at the end of each: ids (B, T), lengths (B,), v (B, d)."""
    samples = draw_sequences(backbone, settings, streams_B)
    v = backbone.encode([samples.sequence(i) for i in range(len(streams_B))], start=True)
    return {"ids": samples.ids, "lengths": samples.lengths, "v": v}


# Texts of one's own


def read_texts(path: Path) -> list[str]:
    """The texts of a corpus in order, files by name; raises ``ArtefactError`` that names the file and the line."""
    if path.is_dir():
        files = sorted(file for file in path.glob("*.txt") if file.is_file())
        if not files:
            said = f"{path} holds no .txt file"
            raise ArtefactError(f"{said}; a corpus is a folder of them, or a .jsonl with a field 'text'")
        return [_decoded(file) for file in files]
    if path.suffix != ".jsonl" or not path.is_file():
        raise ArtefactError(f"{path} is neither a .jsonl file nor a folder of .txt files")
    texts = []
    for i, row in json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            wanted = "it needs a field 'text' that holds a string"
            raise ArtefactError(f"{path}, line {i}: {wanted}, not {row!r:.80}")
        texts.append(row["text"])
    return texts


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line of a JSON Lines file; raises ``ArtefactError`` that names the file and the line."""
    # A line ends at \n alone: U+2028 and the like are part of a text.
    for i, line in enumerate(_decoded(path).split("\n"), 1):
        if line.strip():
            try:
                yield i, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ArtefactError(f"{path}, line {i} is not valid JSON ({error})") from None


def _decoded(path: Path) -> str:
    try:
        # A byte order mark is no part of the text.
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtefactError(f"{path} is not UTF-8, or could not be read ({error})") from None


def corpus_rows(texts: list[str], path: Path, tokenizer, n: int, longest: int) -> list[list[int]]:
    """Token ids of the first n different texts of a corpus that have 8 tokens or more, cut at ``longest``.

    Texts that are alike in those tokens have the same activation, so only the first of them is taken: else a held-out
    target could be in the pool. Raises ``ConfigError`` for a text that spells a special token, ``ArtefactError`` where
    there are fewer than n.
    """
    rows = [outside_ids(tokenizer, text, f"{path}, text {i}")[:longest] for i, text in enumerate(texts, 1)]
    long_enough = [tuple(ids) for ids in rows if len(ids) >= LEAST_TOKENS]
    different = list(dict.fromkeys(long_enough))
    if len(different) < n:
        short, equal = len(rows) - len(long_enough), len(long_enough) - len(different)
        raise ArtefactError(
            f"{path} holds {len(texts)} texts, {short} of them shorter than {LEAST_TOKENS} tokens and {equal} equal to "
            f"another in their first {longest} tokens; {n} are needed: give more texts, or ask for fewer (nla "
            f"reproduce --set n_targets={len(different)}, nla pool --n {len(different)})"
        )
    return [list(ids) for ids in different[:n]]


# Released targets


@dataclass
class Pack:
    """Samples of a released file: activations (T, d) of each, the start token's first, and as far as they are there
    ``ids`` (T,), ``masks`` (T,) and ``texts``. Vectors alone are samples of one position."""

    hidden: Sequence[Tensor]
    ids: Optional[Sequence[Any]] = None
    masks: Optional[Sequence[Any]] = None
    texts: Optional[Sequence[str]] = None
    meta: dict = field(default_factory=dict)


def check_released(path: Path, backbone: Description, n: int) -> None:
    """Check that a file has n released targets of this backbone and layer; its first sample alone is read.

    Raises ``ArtefactError`` that names the file if it is broken, unknown, too small, or of another backbone or layer.
    """
    layer, d = backbone.layer, backbone.d
    if path.suffix == ".safetensors":
        held, width = _open_own(path).get_slice("v").get_shape()
        meta = {}
    else:
        held, samples = _open_packs(path, layer, d)
        first, _ = next(samples)
        width, meta = first.hidden[0].shape[-1], first.meta
    if held < n:
        raise ArtefactError(f"{path} holds {held} targets, the run needs {n}; add --set n_targets={held}")
    if width != d:
        raise ArtefactError(f"{path}: activations have width {width}, the backbone has {d}; it is of another backbone")
    # A folder's name says nothing of the model in it.
    own = {"backbone": backbone.spec.source} if backbone.spec.on_hub else {}
    for what, value in (own | {"layer": layer, "d": d, "start token": backbone.start_id}).items():
        stated = next((meta[name] for name in META[what] if meta.get(name) is not None), value)
        if str(stated).split("@")[0].lower() != str(value).split("@")[0].lower():
            raise ArtefactError(f"{path} says that its {what} is {stated!r}; this run has {value!r}")


def read_released(path: Path, backbone: Backbone, n: int) -> tuple[dict[str, np.ndarray], dict]:
    """The first ``n`` targets of a file, and facts to be recorded.

    Returns ids (n, T) int32 of generated tokens, lengths (n,), 0 where the text of a target is not known, and v (n, d)
    float32. Facts: ``texts`` says where the ids are from, ``texts_unmatched`` counts the texts that do not give as many
    tokens as there are activations.

    Raises ``ArtefactError`` as :func:`check_released` does, and where the texts do not re-encode to the activations on
    this backbone and layer, with the likely cause; ``CollapsedTargetsError`` where all activations are the same.
    """
    check_released(path, backbone, n)
    if path.suffix == ".safetensors":
        own = _open_own(path)
        tensors = {name: own.get_slice(name)[:n] for name in ("ids", "lengths", "v")}
        facts = {"texts": "ids", "texts_unmatched": 0}
    else:
        tensors, facts = _read_packs(path, backbone, n)
    _check(tensors, path, backbone)
    return tensors, facts


def _open_own(path: Path):
    try:
        f = safe_open(path, "np")
    except Exception as error:  # the library's own, for each way in which a file can be broken
        raise ArtefactError(f"{path} was not read ({error}); fetch it again") from None
    missing = {"ids", "lengths", "v"} - set(f.keys())
    if missing:
        raise ArtefactError(f"{path} lacks {sorted(missing)}")
    return f


def _open_packs(path: Path, layer: int, d: int) -> tuple[int, Iterator[tuple[Pack, int]]]:
    """How many samples a file holds, and each of them: a pack, and which of it the sample is."""
    if path.suffix == ".parquet":
        return _open_parquet(path, layer, d)
    held = len(_open_pt(path, layer).hidden)

    def samples() -> Iterator[tuple[Pack, int]]:
        for i in range(held):
            if i % SAMPLES_PER_OPENING == 0:
                pack = _open_pt(path, layer)
            yield pack, i

    return held, samples()


def _open_pt(path: Path, layer: int) -> Pack:
    """The samples of a ``.pt``; raises ``ArtefactError`` that says what is there instead."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the loader's own, for each way in which a file can be broken or unsafe
        said = "it is broken, or holds more than tensors and plain values"
        raise ArtefactError(f"{path} was not read: {said} ({error})") from None
    if isinstance(content, Tensor) and content.ndim == 2:
        return Pack(content[:, None])
    if not isinstance(content, dict):
        raise ArtefactError(f"{path} holds a {type(content).__name__}, no released targets ({LAYOUTS})")
    by_layer = {int(key): x for key, x in (content.get("activations_by_layer") or {}).items()}
    if by_layer and layer not in by_layer:
        raise ArtefactError(f"{path} holds layers {sorted(by_layer)}, this run reads layer {layer}")
    hidden = by_layer[layer] if by_layer else content.get("activations")
    if hidden is None or not len(hidden) or hidden[0].ndim != 2:
        raise ArtefactError(f"{path} holds {sorted(map(str, content))}, no released targets ({LAYOUTS})")
    sequences, texts = content.get("sequences"), content.get("texts")
    if sequences is not None and isinstance(sequences[0], str):
        sequences, texts = None, sequences
    meta = {**{k: v for k, v in content.items() if isinstance(v, (str, int))}, **(content.get("meta") or {})}
    if by_layer:
        meta["layer"] = meta["extraction_layer"] = layer
    pack = Pack(hidden, content.get("token_ids", sequences), content.get("attn_masks"), texts, meta)
    for name in ("ids", "masks", "texts"):
        column = getattr(pack, name)
        if column is not None and len(column) != len(hidden):
            raise ArtefactError(f"{path} holds activations of {len(hidden)} samples and {name} of {len(column)}")
    if isinstance(hidden, Tensor) and pack.ids is None and pack.masks is None and hidden.shape[1] > 1:
        raise ArtefactError(f"{path}: its samples are padded to one length; without ids it needs 'attn_masks'")
    return pack


def _open_parquet(path: Path, layer: int, d: int) -> tuple[int, Iterator[tuple[Pack, int]]]:
    """Rows of one layer; activations as (T, d), nested or flat."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        names = set(file.schema_arrow.names)
        layers = file.read(columns=["layer"])["layer"].to_numpy() if "layer" in names else None
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path} was not read ({error}); fetch it again") from None
    if "activations" not in names:
        raise ArtefactError(f"{path} has columns {sorted(names)}; released targets have text, activations and layer")
    held = file.metadata.num_rows if layers is None else int((layers == layer).sum())
    if not held:
        raise ArtefactError(f"{path} holds layers {sorted(set(layers.tolist()))}, this run reads layer {layer}")

    def activations(x: np.ndarray) -> Tensor:
        try:
            return torch.from_numpy((np.stack(x) if x.dtype == object else x.reshape(-1, d)).astype(np.float32))
        except ValueError:
            raise ArtefactError(f"{path}: an activation of {len(x)} numbers is not (T, {d}), nested or flat") from None

    def samples() -> Iterator[tuple[Pack, int]]:
        for batch in file.iter_batches(PARQUET_BATCH, columns=sorted({"text", "activations", "layer"} & names)):
            if layers is not None:
                batch = batch.filter(pyarrow.array(batch["layer"].to_numpy() == layer))
            hidden = [activations(x) for x in batch["activations"].to_numpy(zero_copy_only=False)]
            pack = Pack(hidden, texts=batch["text"].to_pylist() if "text" in names else None)
            yield from ((pack, j) for j in range(len(hidden)))

    return held, samples()


def _read_packs(path: Path, backbone: Backbone, n: int) -> tuple[dict[str, np.ndarray], dict]:
    v_nd, counts = np.empty((n, backbone.d), dtype=np.float32), np.zeros(n, dtype=np.int64)
    rows, texts = [], []
    _, samples = _open_packs(path, backbone.layer, backbone.d)
    for i, (pack, j) in zip(Progress(range(n), desc="reading released targets", unit="target"), samples):
        at, row = _valid(pack, j, path, backbone)
        v_nd[i], counts[i] = pack.hidden[j][at[-1]].float().numpy(), len(at) - 1
        rows.append(row)
        texts.append(pack.texts[j] if pack.texts is not None else None)
    source, unmatched = "ids", 0
    if rows[0] is None and texts[0] is not None and counts.any():
        rows = _tokenized_again(texts, counts, backbone)
        source, unmatched = "tokenized again", sum(not row for row in rows)
        said = f"{unmatched} of {n} texts, tokenized again, do not give as many tokens as there are activations"
        if unmatched > n / 2:
            cause = "they are of another tokenizer, or the activations are padded and there are no 'attn_masks'"
            raise ArtefactError(f"{path}: {said}: {cause}")
        print(f"{path.name}: {said}; they are kept as vectors, and left out of ceilings and training pairs")
    elif rows[0] is None:
        rows, source = [[]] * n, "none"
        print(f"{path.name}: vectors without texts that could be compared with them: no ceilings, no training")
    return _tensors(rows, v_nd, backbone), {"texts": source, "texts_unmatched": unmatched}


def _valid(pack: Pack, j: int, path: Path, backbone: Backbone) -> tuple[np.ndarray, Optional[list[int]]]:
    """Positions of a sample's start token and valid tokens, and the ids of the latter if they are there.

    The mask says which are valid, else the first generated EOS, which is kept, else all of them.
    """
    held, ids = len(pack.hidden[j]), None if pack.ids is None else np.asarray(pack.ids[j])
    if pack.masks is not None:
        mask = np.asarray(pack.masks[j]).astype(bool)
    else:
        mask = np.ones(held if ids is None else len(ids), dtype=bool)
        ended = [] if ids is None else np.flatnonzero(np.isin(ids[1:], backbone.eos_ids))
        if len(ended):
            mask[ended[0] + 2 :] = False
    at = np.flatnonzero(mask)
    row = ids[at].tolist() if ids is not None and len(ids) == len(mask) else None
    wrong = ids is not None and (row is None or len(row) < 2 or row[0] != backbone.start_id)
    if wrong or not len(at) or at[-1] >= held:
        shown = "" if ids is None else f" and ids {ids[:4].tolist()}…"
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
    check_health(v_nd, str(path))
    if not len(known):
        return
    rows = known[np.linspace(0, len(known) - 1, min(CHECKED_ROWS, len(known))).astype(int)]
    mu_d = v_nd.mean(axis=0)

    def agreement(h_Rd: np.ndarray) -> float:
        return float((fve(h_Rd, v_nd[rows], mu_d) > AGREES).mean())

    sequences = [tensors["ids"][i, : tensors["lengths"][i]].tolist() for i in rows]
    agree = agreement(backbone.encode(sequences, start=True))
    if agree >= NEEDED_AGREEMENT:
        return
    # Why they do not, as far as can be told from both.
    cause = "they are of other weights (another model, revision, or fine-tuned), or of another tokenizer"
    layers = range(1, backbone.n_layers)
    h_LRd = backbone.encode_layers(sequences, True, layers)
    by_layer = [agreement(h_Rd) for h_Rd in h_LRd]
    if max(by_layer) >= NEEDED_AGREEMENT:
        best = layers[int(np.argmax(by_layer))]
        cause = f"they are those of layer {best}: add --layer {best}, or take another file"
    elif path.suffix == ".pt":
        hidden, h_Rd = _open_pt(path, backbone.layer).hidden, h_LRd[backbone.layer - 1]
        elsewhere = [fve(h_d, hidden[i].float().numpy(), mu_d).max() > AGREES for i, h_d in zip(rows, h_Rd)]
        if np.mean(elsewhere) >= NEEDED_AGREEMENT:
            cause = "they are at other positions of the same samples: the last one is padding"
    raise ArtefactError(
        f"{path}: the texts of only {agree:.0%} of {len(rows)} samples re-encode to their activations at layer "
        f"{backbone.layer} of {backbone.name}; {cause}"
    )


# What notebook 01 shows


def describe(run: Run, targets: Targets) -> dict:
    """The figures of notebook 01: lengths, ‖v‖, ‖μ‖, the share of the mean square along μ, cosines; of which corpus."""
    backbone, v, mu = run.backbone, targets.v.astype(np.float64), targets.mu.astype(np.float64)
    along = v @ (mu / np.linalg.norm(mu))
    cosine = {kind: unrelated_cosines(targets, kind == "cen") for kind in ("raw", "cen")}
    given, corpus = spec(run.config), run.config.corpus
    known = np.flatnonzero(targets.lengths)
    last_ids = targets.ids[known, targets.lengths[known] - 1]
    return {
        **({"corpus": Path(corpus).name.removesuffix(".jsonl")} if corpus else {}),
        **{k: given[k] for k in ("released_targets", "corpus_sha256") if given[k]},
        "sequences": sequences_hash(**targets.texts),
        "num_layers": backbone.n_layers,
        "hidden_size": backbone.d,
        "length_mean": _mean(targets.lengths[known]),
        "ended_share": _mean(np.isin(last_ids, backbone.eos_ids)),
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
    """Mean norm of the token embeddings of the first targets' texts, through the module; ``None`` without texts."""
    ids = torch.tensor([i for s in targets.sequences(targets.in_sample) for i in s], dtype=torch.long)
    with torch.inference_mode():
        return _mean(backbone.embed(ids).float().norm(dim=-1))


def _mean(values: np.ndarray | torch.Tensor) -> Optional[float]:
    """The mean, ``None`` of nothing: no text is known."""
    return float(values.mean()) if len(values) else None


def unrelated_cosines(targets: Targets, centred: bool) -> np.ndarray:
    """Cosines of all unordered pairs of the pool's first 512 targets, raw or centred by μ."""
    pool = targets.v[targets.pool][:FLOOR_ROWS]
    scores = fve_matrix(pool, pool, targets.mu if centred else None)
    return 2 * scores[np.triu_indices(len(pool), 1)] - 1
