"""The files of released targets, whatever their layout, as samples (PROTOCOL.md §1).

A ``.pt`` is read with ``weights_only``, so no code of a file is run, and mapped from disk: of 17 to 26 GB one position a
sample is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator, Optional, Sequence

import numpy as np
import torch
from torch import Tensor

from nla_utils.errors import ArtefactError

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
