"""How the measurement is made: the published procedure, the corrected one, and every procedure in between.

A :class:`Protocol` has one field for each slip of the published measurement that a score depends on
(``paper/PROTOCOL.md`` §7). Encoding, scoring, the slip-by-slip ablation and the audit read these fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, Optional

from nla_utils.errors import ConfigError, nearest


@dataclass(frozen=True)
class Protocol:
    """One way of measuring; the defaults are the corrected values."""

    name: str
    # How a text is re-encoded.
    bos: bool = True  # behind the start token, as v was taken
    last_index: Literal["count", "mask"] = "mask"  # where h is read: count − 1 in the padded batch, or the last token
    eos_kept: bool = True  # the sampled ids, EOS included, or the decoded text tokenized again
    # Which texts and targets.
    left_prompts: bool = True  # paraphrase prompts padded on the left, or on the tokenizer's own side
    held_out: bool = True  # targets that training never saw, or the first ones of the training set
    # How scores are made of the activations.
    mu_of: Literal["targets", "pool"] = "pool"  # μ and floor of the ceilings
    equal_k: bool = True  # ρ divides by a ceiling drawn as often as its numerator
    centred_anchor: bool = True  # the NN-anchor row centred, or raw
    sampled_logp: bool = True  # log-probabilities of the sampled distribution, or from the raw embedding table
    all_subsets: bool = True  # the K-curve over all K'-subsets, or over the first K' columns

    def fix(self, *slips: str) -> "Protocol":
        """The same protocol with these slips corrected; raises ``ConfigError`` for what is none."""
        for slip in slips:
            if slip not in FIELD_OF:
                raise ConfigError(f"unknown slip {slip!r}: {nearest(slip, FIELD_OF)}")
        fields = {FIELD_OF[slip]: getattr(CORRECTED, FIELD_OF[slip]) for slip in slips}
        return dataclasses.replace(self, name="+".join((self.name, *slips)), **fields)

    def has_fixed(self, slip: str) -> bool:
        """Whether the field that the slip sets wrong has its corrected value."""
        return getattr(self, FIELD_OF[slip]) == getattr(CORRECTED, FIELD_OF[slip])

    @property
    def on_ids(self) -> "Protocol":
        """The same for sampled ids that are never decoded: rollouts, tails, and the texts of the null."""
        return self.fix("left_pad", "eos_text")


@dataclass(frozen=True)
class Slip:
    """A slip of the published measurement: what it is, the notebooks it acts in, and the field that it sets wrong
    (``None`` where no score of one run can be had both ways)."""

    id: str
    what: str
    acts_in: str
    field: Optional[str] = None


SLIPS: dict[str, Slip] = {
    slip.id: slip
    for slip in (
        Slip("bos", "targets are taken behind BOS, texts are re-encoded without it", "03, 04, 05", "bos"),
        Slip("left_pad", "the last token is read at count − 1 in a batch padded on the left", "03", "last_index"),
        Slip("eos_text", "a source that ended in EOS is re-encoded from text that cannot hold it", "03", "eos_kept"),
        Slip("pad_generate", "paraphrase prompts are padded where the tokenizer pads, which may be the right", "03",
             "left_prompts"),
        Slip("in_sample", "targets called held-out were trained on", "04, 05", "held_out"),
        Slip("no_null", "nothing stands beside best-of-K that selects without reading", "04, 05"),
        Slip("self_mu", "ceilings take μ and floor from the evaluated targets themselves", "03", "mu_of"),
        Slip("k_mismatch", "ρ divides a best-of-K by a best-of-8", "04", "equal_k"),
        Slip("floor_kind", "the floor compares targets with targets, not with re-encoded text", "03, 04"),
        Slip("uncentred_anchor", "the NN-anchor row is labelled centred and computed raw", "05", "centred_anchor"),
        Slip("logp_embeds", "log-probabilities come from the raw embedding table", "05", "sampled_logp"),
        Slip("top_k", "temperature 1, top_p 1 is in fact top_k 50", "01, 04"),
        Slip("first_k", "the K-curve uses the first K' columns only", "05", "all_subsets"),
        Slip("raw_select", "the checkpoint is chosen on raw fve_nrm", "02"),
        Slip("retokenize", "training texts are decoded and tokenized again", "02"),
        Slip("no_stop", "training text never holds EOS", "02"),
        Slip("inject_norm", "v enters at its own norm", "02"),
        Slip("one_span", "the AV writes from the beginning, v knows the end", "02"),
    )
}
FIELD_OF = {slip.id: slip.field for slip in SLIPS.values() if slip.field}

CORRECTED = Protocol("corrected")
PAPER = Protocol(
    "paper", bos=False, last_index="count", eos_kept=False, left_prompts=False, held_out=False, mu_of="targets",
    equal_k=False, centred_anchor=False, sampled_logp=False, all_subsets=False,
)  # fmt: skip
PROTOCOLS = (PAPER, CORRECTED)

# The slip-by-slip ablation: the first five change what is encoded, the last two only how it is scored.
ENCODING_SLIPS = ("left_pad", "bos", "eos_text", "pad_generate", "in_sample")
ABLATED = (*ENCODING_SLIPS, "self_mu", "k_mismatch")


def ablation_steps() -> dict[str, dict[str, Protocol]]:
    """The ablation's protocols by step. ``in_order``: ``paper``, then each slip corrected on top of those before it.
    ``alone``: ``paper`` with one slip corrected and all the others in force."""
    in_order = {s: PAPER.fix(*ABLATED[: i + 1]) for i, s in enumerate(ABLATED)}
    return {"in_order": {"paper": PAPER, **in_order}, "alone": {"paper": PAPER, **{s: PAPER.fix(s) for s in ABLATED}}}


# Replay, one slip corrected after the other.
LADDER: dict[str, Protocol] = {
    "published": PAPER,
    "right_index": PAPER.fix("left_pad"),
    "same_ids_no_bos": PAPER.on_ids,
    "with_bos": PAPER.fix("left_pad", "bos"),
    "same_ids": PAPER.fix("left_pad", "bos", "eos_text"),
}


def encoding_key(protocol: Protocol) -> str:
    """Name of a reading: the corrected ones of the slips that change the encoding; ``paper`` if none, ``corrected`` if all."""
    fixed = [s for s in ENCODING_SLIPS if protocol.has_fixed(s)]
    return CORRECTED.name if len(fixed) == len(ENCODING_SLIPS) else "+".join(fixed) or PAPER.name
