"""How somebody's texts are read, and what is odd about them and their vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Optional, Sequence

import numpy as np

from nla_extensions.scoring.pool import Pool
from nla_utils import metrics
from nla_utils.errors import ConfigError
from nla_utils.lm.backbone import Backbone, pad

# Share of vectors unlike the pool's that is worth a word.
ODD = 0.1


@dataclass(frozen=True)
class Reading:
    """How texts become activations: with the start token or without, at the last token or at the one that scores best,
    by the backbone or by an ``encoder``."""

    backbone: Backbone
    start: bool
    every_token: bool = False
    encoder: Optional[Callable[[list[list[int]]], np.ndarray]] = None

    @property
    def differs(self) -> bool:
        """Whether a text of the pool is read as anything but its own activation."""
        return not self.start or self.every_token or self.encoder is not None

    def states(self, texts: Sequence[list[int]]) -> list[np.ndarray]:
        """h (T, d) float32 of each text: at its last token (T = 1), or at all. Equal texts are read once."""
        place = {tuple(text): i for i, text in enumerate(dict.fromkeys(map(tuple, texts)))}
        unique = list(map(list, place))
        if self.encoder is not None:
            h_Ud = np.asarray(self.encoder(unique), dtype=np.float32)
            if h_Ud.shape != (len(unique), self.backbone.d) or not np.isfinite(h_Ud).all():
                raise ConfigError(
                    f"the encoder gave {h_Ud.shape}, or NaN; it must be ({len(unique)}, {self.backbone.d})"
                )
            found: Sequence = h_Ud[:, None]
        elif self.every_token:
            found = self._all_tokens(unique)
        else:
            rows = unique if self.start else [text or [self.backbone.start_id] for text in unique]
            found = self.backbone.encode(rows, start=self.start)[:, None]
        return [found[place[tuple(text)]] for text in texts]

    def _all_tokens(self, texts: list[list[int]]) -> list[np.ndarray]:
        """At every token, the start token aside unless it is all there is."""
        head = [self.backbone.start_id] if self.start else []
        rows = [head + text or [self.backbone.start_id] for text in texts]
        order, found = sorted(range(len(rows)), key=lambda i: len(rows[i])), [np.empty(0)] * len(rows)
        for batch in np.array_split(order, -(-len(rows) // 32)):
            ids_BT, mask_BT = pad([rows[i] for i in batch], self.backbone.pad_id, "right")
            h_BTd = self.backbone.hidden_at_layer(input_ids=ids_BT.to(self.backbone.device)).float().cpu().numpy()
            for i, h_Td, n in zip(batch, h_BTd, mask_BT.sum(dim=1).tolist()):
                found[i] = h_Td[min(len(head), n - 1) : n].copy()
        return found


def notes_of_texts(ids: Sequence[list[list[int]]], backbone: Backbone, longest: Optional[int]) -> list[str]:
    """What is odd about texts; ``longest`` is the most tokens that a text of the pool has, if all tokens are read.
    Raises ``ConfigError`` where every text begins with the start token."""
    texts, notes = [text for own in ids for text in own], []
    begun = [text[:1] == [backbone.start_id] for text in texts if len(text) > 1]
    if begun and all(begun):
        raise ConfigError(
            f"every text begins with the start token {backbone.start_id}: leave it out, it is put in front"
        )
    if any(begun):
        notes.append(f"{sum(begun)} texts begin with the start token, and are read behind two of them")
    if empty := sum(not text for text in texts):
        notes.append(f"{empty} texts are empty: the start token alone is read in their place")
    longer = sum(len(text) > longest for text in texts) if longest else 0
    if longer:
        said = f"{longer} texts are longer than any of the pool, which have up to {longest} tokens"
        notes.append(f"{said}: their null is too weak")
    return notes


def warnings_of(v_Md: np.ndarray, pool: Pool) -> list[str]:
    """What vectors say by their norm, their part along μ and their first principal coordinate if they are not of the
    pool's kind, with the likely cause."""
    mu_d, found = pool.mu.astype(np.float64), []
    norm_M, norm_P = (np.linalg.norm(x, axis=1) for x in (v_Md, pool.v))
    along_M, along_P = (x @ mu_d / n / np.linalg.norm(mu_d) for x, n in ((v_Md, norm_M), (pool.v, norm_P)))
    first_d = metrics.principal_directions(pool.v[: pool.size], 1)[0]
    at_M, at_P = ((x - mu_d) @ first_d for x in (v_Md, pool.v))
    layer = "another layer or model, or read without the start token, or at it"

    def outside(a_M: np.ndarray, a_P: np.ndarray) -> float:
        margin = (a_P.max() - a_P.min()) / 2
        return ((a_M < a_P.min() - margin) | (a_M > a_P.max() + margin)).mean()

    if np.abs(norm_M - 1).max() < 1e-3 < abs(norm_P.mean() - 1):
        found.append("every vector has norm 1: they were divided by their norms")
    elif (share := outside(norm_M, norm_P)) > ODD:
        ratio = np.median(norm_M) / np.median(norm_P)
        found.append(
            f"{share:.0%} of the vectors' norms are unlike the pool's, {ratio:.3g} times as large: scaled, or {layer}"
        )
    if np.median(along_M) < along_P.min() and np.abs(np.median(along_M)) < along_P.min() / 2:
        said = f"the vectors have a cosine of {np.median(along_M):.2f} with μ, the pool's {np.median(along_P):.2f}"
        found.append(
            f"{said}: differences of activations, rows of an SAE's decoder or steering vectors are --directions"
        )
    elif (share := outside(along_M, along_P)) > ODD:
        found.append(f"{share:.0%} of the vectors' cosines with μ are unlike the pool's: {layer}")
    if (share := outside(at_M, at_P)) > ODD:
        said = f"{share:.0%} of the vectors' first principal coordinates are unlike the pool's"
        found.append(f"{said}: {layer}, or of another kind of text")
    return found
