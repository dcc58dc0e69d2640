"""How the measurement is made: the published procedure, the corrected one, and every procedure in between.

A :class:`Protocol` is the set of the published measurement's slips that are in force (``paper/PROTOCOL.md`` §7).
Encoding, scoring, the slip-by-slip ablation and the audit ask for them by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterable, Sequence

from nla_utils.errors import ConfigError, nearest


@dataclass(frozen=True)
class Slip:
    """A slip of the published measurement: what it is, the notebooks it acts in, and whether a run's scores are taken
    with it and without."""

    id: str
    what: str
    acts_in: str
    both_ways: bool = False


SLIPS: dict[str, Slip] = {
    slip.id: slip
    for slip in (
        Slip("bos", "targets are taken behind BOS, texts are re-encoded without it", "03, 04, 05", True),
        Slip("left_pad", "the last token is read at count − 1 in a batch padded on the left", "03", True),
        Slip("eos_text", "a source that ended in EOS is re-encoded from text that cannot hold it", "03", True),
        Slip(
            "pad_generate", "paraphrase prompts are padded where the tokenizer pads, which may be the right", "03", True
        ),
        Slip("in_sample", "targets called held-out were trained on", "04, 05", True),
        Slip("no_null", "nothing stands beside best-of-K that selects without reading", "04, 05"),
        Slip("self_mu", "ceilings take μ and floor from the evaluated targets themselves", "03", True),
        Slip("k_mismatch", "ρ divides a best-of-K by a best-of-8", "04", True),
        Slip("floor_kind", "the floor compares targets with targets, not with re-encoded text", "03, 04"),
        Slip("uncentred_anchor", "the NN-anchor row is labelled centred and computed raw", "05", True),
        Slip("logp_embeds", "log-probabilities come from the raw embedding table", "05", True),
        Slip("top_k", "temperature 1, top_p 1 is in fact top_k 50", "01, 04"),
        Slip("first_k", "the K-curve uses the first K' columns only", "05", True),
        Slip("raw_select", "the checkpoint is chosen on raw fve_nrm", "02"),
        Slip("retokenize", "training texts are decoded and tokenized again", "02"),
        Slip("no_stop", "training text never holds EOS", "02"),
        Slip("inject_norm", "v enters at its own norm", "02"),
        Slip("one_span", "the AV writes from the beginning, v knows the end", "02"),
    )
}


@dataclass(frozen=True)
class Protocol:
    """One way of measuring: the slips that are in force."""

    name: str
    slips: frozenset[str] = frozenset()

    def fix(self, *slips: str) -> "Protocol":
        """The same protocol with these slips corrected; raises ``ConfigError`` for what is none."""
        for slip in slips:
            if slip not in PUBLISHED.slips:
                raise ConfigError(f"unknown slip {slip!r}: {nearest(slip, PUBLISHED.slips)}")
        return Protocol("+".join((self.name, *slips)), self.slips - set(slips))

    @property
    def on_ids(self) -> "Protocol":
        """The same for sampled ids that are never decoded: rollouts, tails, and the texts of the null."""
        return self.fix("left_pad", "eos_text")

    def corrected_of(self, slips: Sequence[str]) -> str:
        """Which of some slips it corrects, by name; ``published`` for none of them, ``corrected`` for all."""
        fixed = [slip for slip in slips if slip not in self.slips]
        return CORRECTED.name if len(fixed) == len(slips) else "+".join(fixed) or PUBLISHED.name

    @property
    def reading(self) -> str:
        """How it re-encodes: the slips of re-encoding that it corrects."""
        return self.corrected_of(ENCODING_SLIPS)

    def texts(self, kind: str) -> str:
        """The name of the texts of one kind that it reads, after the slips that choose them."""
        return f"{kind}.{self.corrected_of(CHOOSING_SLIPS[kind])}"


CORRECTED = Protocol("corrected")
PUBLISHED = Protocol("published", frozenset(slip.id for slip in SLIPS.values() if slip.both_ways))
PROTOCOLS = (PUBLISHED, CORRECTED)

# Slips of re-encoding: how a text is read, and of each kind which texts there are to read. Of ids that are never
# decoded (last tokens, rollouts, the probe's texts, the null's) one alone decides how they are read.
READING_SLIPS, ID_SLIPS = ("left_pad", "bos", "eos_text"), ("bos",)
DECODED = ("source", "paraphrase")
CHOOSING_SLIPS = {"source": ("in_sample",), "paraphrase": ("pad_generate", "in_sample"), "tail": ("in_sample",)}
ENCODING_SLIPS = (*READING_SLIPS, *CHOOSING_SLIPS["paraphrase"])
# The slip-by-slip ablation: the first five change what is encoded, the last two only how it is scored.
ABLATED = (*ENCODING_SLIPS, "self_mu", "k_mismatch")


def ablation_steps() -> dict[str, dict[str, Protocol]]:
    """The ablation's protocols by step. ``in_order``: ``published``, then each slip corrected on top of those before
    it. ``alone``: ``published`` with one slip corrected and all the others in force."""
    first = {PUBLISHED.name: PUBLISHED}
    in_order = {s: PUBLISHED.fix(*ABLATED[: i + 1]) for i, s in enumerate(ABLATED)}
    return {"in_order": first | in_order, "alone": first | {s: PUBLISHED.fix(s) for s in ABLATED}}


# Replay of the same targets in other readings.
LADDER = (
    PUBLISHED,
    PUBLISHED.fix("left_pad"),
    PUBLISHED.on_ids,
    PUBLISHED.fix("left_pad", "bos"),
    PUBLISHED.fix("left_pad", "bos", "eos_text"),
)


def _by_reading(protocols: Iterable[Protocol]) -> dict[str, Protocol]:
    return {protocol.reading: protocol for protocol in protocols}


_STEPS = [protocol for way in ablation_steps().values() for protocol in way.values()]
# What is read in notebook 03: of each kind of text the protocols that read it, by reading.
READINGS = {
    "source": _by_reading([*_STEPS, *LADDER]),
    "paraphrase": _by_reading(_STEPS),
    "tail": _by_reading(PROTOCOLS),
}
