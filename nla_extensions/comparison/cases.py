"""What ways of reading are compared on: sources that none of them has seen, each with a twin that ends alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from nla_extensions.release.api import NLA
from nla_utils.errors import ConfigError
from nla_utils.lm.sampling import SamplingSettings, row_streams
from nla_utils.targets import draw_sequences

# Tokens that a source and its twin share, at the end; before them each has at least as many again, twice.
SHARED = 8
LEAST = 3 * SHARED
# How many last tokens of a text and of its source are compared.
ENDS = (1, 2, 4, 8, 16)


@dataclass
class Cases:
    """``sources`` (2 n token sequences) and ``v`` (2 n, d): n sources drawn from the start token, then their twins.

    A twin is the next source's text up to its last 8 tokens, and then this source's last 8. ``ends_h``: activations of the
    sources' own last tokens (n, d), by how many of :data:`ENDS`.
    """

    sources: list[list[int]]
    v: np.ndarray
    ends_h: dict[int, np.ndarray]

    @property
    def n(self) -> int:
        return len(self.sources) // 2

    @property
    def twin_v(self) -> np.ndarray:
        """The activation of each source's other one (2 n, d)."""
        return np.roll(self.v, self.n, axis=0)


def draw_cases(nla: NLA, n: int, seed: int) -> Cases:
    """n sources of at least 24 tokens, sampled as the targets of §11 are, and their twins.

    Raises ``ConfigError`` for fewer than two, or where the AV's texts are too short to have twins.
    """
    backbone, settings = nla.backbone, SamplingSettings(max_new_tokens=nla.bundle.av.config.max_new_tokens)
    if n < 2:
        raise ConfigError(f"n is {n}; a source has its twin's beginning from another, so at least 2 are needed")
    if settings.max_new_tokens < LEAST:
        raise ConfigError(f"this AV writes {settings.max_new_tokens} tokens; sources with twins have at least {LEAST}")
    drawn: list[list[int]] = []
    first, size = 0, min(2 * n, backbone.sample_batch)
    while len(drawn) < n:
        samples = draw_sequences(backbone, settings, row_streams(seed, "compare", range(first, first + size)))
        drawn += [s for s in map(samples.sequence, range(size)) if len(s) >= LEAST]
        first += size
    sources = drawn[:n] + twins(drawn[:n])
    ends_h = {end: backbone.encode([s[-end:] for s in drawn[:n]], start=True) for end in ENDS}
    return Cases(sources, backbone.encode(sources, start=True), ends_h)


def twins(sources: Sequence[list[int]]) -> list[list[int]]:
    """For each source another that ends in the same 8 tokens and differs before."""
    return [other[:-SHARED] + own[-SHARED:] for own, other in zip(sources, [*sources[1:], sources[0]])]
