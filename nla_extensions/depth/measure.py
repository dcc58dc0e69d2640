"""What text can reach at each layer of a backbone, with no AV: one set of sequences, one pass over each text.

The sequences do not depend on the layer, so each layer's targets are byte for byte those that a run of that layer
alone would draw. Replay, tail oracle, paraphrase, retrieval and the unrelated-text null need v and the texts alone, and
the tail reader is solved for at all layers from one pass over the sequences, or from a few where memory is short.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Optional, Sequence

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from nla_extensions.tail_reader.reader import fit_readers, load_reader, read_greedy
from nla_extensions.tail_reader.scores import names_last_token
from nla_utils import rows
from nla_utils.baselines import paraphrases, sources, tails
from nla_utils.config import ROOT, TAIL_TOKENS
from nla_utils.encoding import Texts, read
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.evidence import of_ceilings
from nla_utils.metrics import fve, fve_matrix, off_diagonal
from nla_utils.protocol import CORRECTED, PUBLISHED
from nla_utils.run import Run
from nla_utils.scores import Column, score
from nla_utils.store import ChunkStore, Progress, atomic_write, require_disk, require_same
from nla_utils.targets import (
    TARGETS,
    Targets,
    draw_sequences,
    load_targets,
    save_targets,
    sequences_hash,
    target_settings,
    target_streams,
)

# What two runs must have in common for the one's sequences to be the other's: not the layer.
SHARED = ("backbone", "format", "weight_hash", "settings_hash", "start_id", "eos_ids", "pad_id", "dtype", "seed")
# What text can reach, in the ``corrected`` column.
CENTRED = (
    *(rows.REPLAY, rows.PARAPHRASE, rows.FLOOR, rows.UNRELATED_8, rows.UNRELATED, rows.RETRIEVAL, *rows.TAILS.values()),
    *(rows.CONSTANT_MU, rows.PARAPHRASE_MINUS_UNRELATED, rows.minus(rows.TAILS[8], rows.RETRIEVAL)),
)
REACHED = (
    *(dataclasses.replace(row, only=("cen",)) for row in CENTRED),
    dataclasses.replace(rows.FLOOR, only=("raw",)),
)
# Readers of as many layers as this many bytes hold are fitted from one pass: all of a small backbone's.
FIT_BYTES = 4 * 2**30


def committed_sequences(run: Run) -> Path:
    """Where the repository keeps the sequences of a run."""
    name = dataclasses.replace(run.config, layer=None).folder_name
    return ROOT / "paper" / "sequences" / run.folder.backbone / f"{name}.safetensors"


def _record(run: Run) -> dict:
    return {**{key: run.folder.identity[key] for key in SHARED}, "sampling": target_settings(run.config).record()}


def write_sequences(path: Path, run: Run, targets: Targets) -> None:
    """Keep ids (N, T) int32 and lengths (N,) int32 of a run's targets, with what drew them."""
    tensors = {name: np.ascontiguousarray(x) for name, x in targets.texts.items()}
    record = {**_record(run), "sha256": sequences_hash(**tensors)}
    atomic_write(path, save(tensors, metadata={"record": json.dumps(record)}))


def read_sequences(path: Path, run: Run) -> dict[str, np.ndarray]:
    """The run's N sequences: ids (N, T) int32, lengths (N,) int32. Raises ``ArtefactError`` where the file is missing,
    broken, too small, or of a backbone, seed or way of sampling that is not the run's."""
    n = run.sizes.n_targets
    try:
        with safe_open(path, "np") as f:
            record, names = json.loads((f.metadata() or {}).get("record", "{}")), set(f.keys())
            tensors = {name: f.get_tensor(name) for name in names & {"ids", "lengths"}}
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"{path} was not read ({error}); `nla sequences` writes such a file") from None
    if len(tensors) < 2:
        raise ArtefactError(f"{path} holds {sorted(names)}, not ids and lengths; `nla sequences` writes such a file")
    require_same(path, record, _record(run), "its sequences can be looked at, but this run has to draw its own")
    if record.get("sha256") != sequences_hash(**tensors):
        raise ArtefactError(f"{path} was altered: its sequences are not those it was written with")
    held = len(tensors["ids"])
    if held < n:
        raise ArtefactError(f"{path} holds {held} sequences, the run needs {n}; add --set n_targets={held}")
    return {name: x[:n] for name, x in tensors.items()}


def parse_layers(text: str, n_layers: int) -> list[int]:
    """``all``, or ``6,13`` as sorted numbers; raises ``ConfigError`` for what is no layer of the backbone. The last is
    none: ``hidden_states[L]`` is already normalised."""
    if text == "all":
        return list(range(1, n_layers))
    parts = [p.strip() for p in text.split(",")]
    wrong = [p for p in parts if not p.isdigit() or not 1 <= int(p) < n_layers]
    if wrong:
        raise ConfigError(f"--layers {text!r}: {wrong[0]!r} is none of 1 to {n_layers - 1}; write all, or 6,13")
    return sorted({int(p) for p in parts})


def extract_layers(run: Run, layers: Sequence[int], sequences: Optional[Path] = None) -> None:
    """Draw the run's sequences once and keep the targets of each layer in that layer's run folder.

    ``run`` is opened at its backbone's own layer. Layers that have their targets are left alone. The sequences are
    taken from a file where one is named, else from layers that have them. Needs N · L · d · 4 bytes twice while it
    works. Raises ``ArtefactError`` if the file is not of this run, or not all is of the same sequences.
    """
    at = {layer: run.at(layer) for layer in layers}
    texts = {r.folder.path: load_targets(r).texts for r in at.values() if r.folder.has(TARGETS)}
    plan = {}
    if sequences is not None:
        texts[sequences] = read_sequences(sequences, run)
        plan["sequences"] = sequences_hash(**texts[sequences])
    hashes = {path: sequences_hash(**given) for path, given in texts.items()}
    if len(set(hashes.values())) > 1:
        raise ArtefactError(
            "not of the same sequences: "
            + ", ".join(f"{path} ({found[:12]}…)" for path, found in hashes.items())
            + "; choose another --out, or delete the targets that are not wanted"
        )
    missing = {layer: r for layer, r in at.items() if not r.folder.has(TARGETS)}
    if missing:
        _extract(run, list(at), missing, next(iter(texts.values()), None), plan)


def _extract(run: Run, layers: list[int], missing: dict[int, Run], given: Optional[dict], plan: dict) -> None:
    """Targets of the layers that have none, of the given ids and lengths or of sequences that are drawn."""
    n, backbone, settings = run.sizes.n_targets, run.backbone, target_settings(run.config)
    require_disk(run.folder.path, 2 * n * len(layers) * backbone.d * 4)
    # All the layers, missing or not: a sweep that was cut while some were kept already finds its chunks again.
    plan = {**plan, **run.folder.conditions, "layer": layers, "n": n, "sampling": settings.record()}
    chunks = ChunkStore(run.folder.file("layers.chunks"), {**plan, "batch": backbone.sample_batch})
    starts, what = range(0, n, backbone.sample_batch), "reading" if given else "drawing"
    with Progress(total=n, desc=f"{what} targets, {len(layers)} layers", unit="seq") as bar:
        for c, first in enumerate(starts):
            part = slice(first, min(first + backbone.sample_batch, n))
            # All the layers of all chunks are never in memory at once, so they are not joined as other chunks are.
            if chunks.get(c) is None:
                if given:
                    ids, lengths = (given[name][part] for name in ("ids", "lengths"))
                else:
                    drawn = draw_sequences(backbone, settings, target_streams(run, part))
                    ids, lengths = drawn.ids, drawn.lengths
                texts = [row[:length].tolist() for row, length in zip(ids, lengths)]
                v = {f"v.{x}": v_Bd for x, v_Bd in zip(layers, backbone.encode_layers(texts, True, layers))}
                chunks.put(c, {"ids": ids, "lengths": lengths, **v})
            bar.update(part.stop - part.start)
    for layer, own in missing.items():
        names = {"ids": "ids", "lengths": "lengths", "v": f"v.{layer}"}
        parts = {k: [chunks.tensor(c, name) for c in range(len(starts))] for k, name in names.items()}
        save_targets(own, {k: np.concatenate(x) for k, x in parts.items()}, {"sampling": settings.record()})
    chunks.clear()


def reach_of_text(run: Run, layers: Sequence[int], sequences: Optional[Path] = None) -> tuple[dict, dict[str, str]]:
    """(``{"K", "sequences", "layers": {layer: {protocol: column}}}``, hashes of the targets), in the key names of
    notebooks 03, 04. The sequences are drawn, or read from a file; see :func:`extract_layers`.

    ``corrected``: held-out targets, μ of the pool. ``reader``: the tail reader's greedy texts of them. ``published``:
    replay alone, of the first M, μ their own mean. ``run`` is opened at its backbone's own layer.
    """
    extract_layers(run, layers, sequences)
    at, together = {x: run.at(x) for x in layers}, _layers_in(FIT_BYTES, run.backbone.d, run.sizes.n_targets)
    for start in range(0, len(layers), together):
        fit_readers([(at[x], load_targets(at[x])) for x in layers[start : start + together]])
    first = load_targets(at[layers[0]])
    held_out = first.held_out
    # The same at each layer: all of a held-out target's text, its ends, its paraphrases.
    written = [sources(first, held_out), tails(first, held_out), paraphrases(run, first, held_out, CORRECTED)]
    h = [run.backbone.encode_layers(texts.sequences, True, layers) for texts in written]
    columns, parents = {}, {}
    for i, layer in enumerate(Progress(layers, desc="scoring layers", unit="layer")):
        own, targets = at[layer], load_targets(at[layer])
        for texts, h_LNd in zip(written, h):
            texts.h = {texts.reading(CORRECTED): h_LNd[i].reshape(*texts.lengths.shape, -1)}
        corrected = _score(targets, written, run.sizes.n_rollouts)
        found = {"published": _replay(own, targets), "corrected": corrected, "reader": _read(own, targets, corrected)}
        columns[str(layer)] = {name: column.to_json() for name, column in found.items()}
        parents[f"targets of layer {layer}"] = targets.sha256
    return {"K": run.sizes.n_rollouts, "sequences": sequences_hash(**first.texts), "layers": columns}, parents


def _layers_in(room: int, d: int, n_targets: int) -> int:
    """How many layers' targets (N, d) float32 and sums XᵀV (n · d, d) float64 are held in that many bytes."""
    return max(1, room // (4 * n_targets * d + 8 * TAIL_TOKENS * d * d))


def _score(targets: Targets, written: Sequence[Texts], k: int) -> Column:
    evidence = of_ceilings(targets, {CORRECTED.texts(texts.kind): texts for texts in written}, k)
    # There are no rollouts here that would say K.
    evidence.facts["K"] = k
    column = score(evidence, CORRECTED, REACHED)
    column.put("mu_norm", evidence.facts["mu_norm"]["pool"])
    return column


def _read(run: Run, targets: Targets, corrected: Column) -> Column:
    """The reader's greedy texts in the key names of notebook 04, with the two that it is compared with: other targets'
    texts, and retrieval, which the layer's ``corrected`` column has."""
    v, sources = targets.v[targets.held_out], targets.sequences(targets.held_out)
    texts = read_greedy(load_reader(run), v).tolist()
    score_MM = fve_matrix(v, run.backbone.encode(texts, start=True), targets.mu)
    column = Column("corrected", len(v))
    column.add(rows.GREEDY.cen, score_MM.diagonal())
    column.add(rows.OTHERS_GREEDY.cen, off_diagonal(score_MM).mean(axis=1))
    column.add(rows.RETRIEVAL.cen, corrected.per_target[rows.RETRIEVAL.cen])
    column.add("names_last_token", names_last_token(texts, sources))
    column.difference(rows.GREEDY.cen, rows.OTHERS_GREEDY.cen)
    column.difference(rows.GREEDY.cen, rows.RETRIEVAL.cen)
    return column


def _replay(run: Run, targets: Targets) -> Column:
    chosen = targets.eval_rows(PUBLISHED)
    column, v = Column("published", len(chosen)), targets.v[chosen]
    replayed = read(run.backbone, sources(targets, chosen), PUBLISHED)
    column.add(rows.REPLAY.cen, fve(replayed.read_as(PUBLISHED)[:, 0], v, v.mean(axis=0)))
    return column
