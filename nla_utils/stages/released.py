"""Released targets, in the layouts that the authors published and in this repository's own (PROTOCOL.md §1).

:mod:`nla_utils.stages.packs` reads the files. Here their samples become targets, and the texts of some must re-encode to
their activations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Optional, Sequence

import numpy as np
from safetensors import safe_open

from nla_utils.errors import ArtefactError, CollapsedTargetsError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.registry import BackboneSpec
from nla_utils.metrics import fve
from nla_utils.progress import Progress
from nla_utils.stages.packs import Pack, fields_of, load_pt, parquet_rows, parquet_samples, samples

CHECKED_ROWS = 64
AGREES, NEEDED_AGREEMENT = 0.98, 0.9
# What the packs call the facts that are compared with the run's.
META = {"backbone": ("backbone_id", "backbone"), "layer": ("extraction_layer", "layer"), "d": ("d",),
        "start token": ("bos_token_id",)}  # fmt: skip


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
        print(f"{path.name}: {unmatched} of {n} texts, tokenized again, do not give as many tokens as there are "
              f"activations; they are kept as vectors, and left out of ceilings and training pairs")  # fmt: skip
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
