"""Training pairs (v, text): the paper's texts, and the random 5 % of them that validate (PROTOCOL.md §1, §2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Iterable, Optional

import numpy as np

from nla_utils.artefacts import derive_seed
from nla_utils.config import VALIDATION_SHARE
from nla_utils.lm.backbone import Backbone
from nla_utils.run import Run
from nla_utils.stages.targets import Targets


@dataclass
class TextPairs:
    """Training pairs (row of the target, token ids of its text), how many were skipped for their length,
    and how many came back from the text as other ids than were sampled (special tokens aside)."""

    rows: list[int]
    ids: list[list[int]]
    skipped: int
    changed: int

    def take(self, indices: Iterable[int]) -> "TextPairs":
        """Some of the pairs, in the order asked for."""
        indices = list(indices)
        return replace(self, rows=[self.rows[i] for i in indices], ids=[self.ids[i] for i in indices])


def paper_pairs(backbone: Backbone, targets: Targets, rows: np.ndarray, limit: float = math.inf) -> TextPairs:
    """The paper's training texts: decoded without special tokens, tokenized again, long ones skipped."""
    kept_rows, kept_ids, changed = [], [], 0
    special = set(backbone.tokenizer.all_special_ids)
    for i in rows:
        sampled = targets.sequence(i)
        ids = backbone.tokenize_text(backbone.decode_text(sampled))
        changed += ids != [t for t in sampled if t not in special]
        if 0 < len(ids) <= limit:
            kept_rows.append(int(i))
            kept_ids.append(ids)
    return TextPairs(kept_rows, kept_ids, len(rows) - len(kept_rows), changed)


def tail_pairs(targets: Targets, rows: np.ndarray, n: int) -> TextPairs:
    """The last n sampled tokens of each source, EOS included where it has one: nothing is tokenized again. Targets
    whose text is not known are skipped."""
    known = [int(i) for i in rows if targets.lengths[i]]
    return TextPairs(known, [targets.sequence(i)[-n:] for i in known], skipped=len(rows) - len(known), changed=0)


@dataclass
class Split:
    """Pairs to train on and to validate on (indices into the pairs), the paper's random 5 %."""

    pairs: TextPairs
    train: np.ndarray
    validation: np.ndarray


def make_split(run: Run, targets: Targets, span: Optional[int] = None) -> Split:
    """All pairs but the held-out targets' ones, split at random over the pairs as the paper does.

    A pair's text is the whole source; with ``span`` it is the source's last n tokens.
    """
    rows = np.arange(run.sizes.n_train_rows)
    if span is None:
        pairs = paper_pairs(run.backbone, targets, rows, run.sizes.max_new_tokens)
    else:
        pairs = tail_pairs(targets, rows, span)
    rng = np.random.default_rng(derive_seed(run.seed, "split", 0))
    order = rng.permutation(len(pairs.rows))
    # Two at least: what v is worth is asked by giving one the other's.
    n_val = max(2, round(VALIDATION_SHARE * len(order)))
    return Split(pairs, order[n_val:], order[:n_val])
