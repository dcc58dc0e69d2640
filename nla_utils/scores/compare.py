"""Arrays to evidence: every text's activation compared with its target, the pool and others (PROTOCOL.md §4, §5, §8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional, Sequence

import numpy as np
import pyarrow as pa

from nla_utils import metrics
from nla_utils.config import FLOOR_ROWS, N_PARAPHRASES, POOL_TEXTS, PROBE_LENGTHS, TAIL_LENGTHS
from nla_utils.metrics import fve
from nla_utils.protocol import CORRECTED, LADDER, PAPER, PROTOCOLS, encoding_key
from nla_utils.scores.column import Scorer
from nla_utils.scores.evidence import CENTRINGS, Evidence, block, part_of

if TYPE_CHECKING:
    from nla_utils.stages.ablation import Ablation
    from nla_utils.stages.ceilings import Ceilings
    from nla_utils.stages.probe import ProbeTexts
    from nla_utils.stages.rollouts import Rollouts
    from nla_utils.stages.source_loss import SourceLoss
    from nla_utils.stages.targets import Targets

# Directions of the pool that coordinates are kept on, other targets that a rollout is scored against, and blocks of the
# pool that the null is taken without.
N_DIRECTIONS, N_OTHERS, N_BLOCKS = 4, 8, 10
BY_NAME = {p.name: p for p in PROTOCOLS}
# Rollouts and the probe's texts are never centred by the targets' own mean.
CENTRINGS_OF = dict.fromkeys(("source", "paraphrase", "tail"), CENTRINGS)
CENTRINGS_OF |= dict.fromkeys(("rollout", "probe"), CENTRINGS[:2])
# The protocol that evaluates a part.
OWN = {part_of(p): p for p in PROTOCOLS}


class Part:
    """The targets that one protocol evaluates, and what texts of theirs score.

    Args:
        pool_h: the null's texts (P, d) as that protocol reads them, ``None`` where they are not needed.
    """

    def __init__(self, targets: Targets, name: str, pool_h: Optional[np.ndarray] = None):
        self.targets, self.name, self.rows = targets, name, targets.eval_rows(OWN[name])
        self.v, self.pool, self.mu = targets.v[self.rows], targets.v[targets.pool], targets.mu
        self.own_mu = self.v.mean(axis=0)
        centres = {"raw": None, "cen": self.mu, "own": self.own_mu}
        self.scorers = {kind: Scorer(self.v, self.pool, mu) for kind, mu in centres.items()}
        self.directions_4d = metrics.principal_directions(self.pool, N_DIRECTIONS)
        self.anchor_Md = self.pool[self.scorers["cen"].against_pool.argmax(axis=1)]
        self.null_MP = None if pool_h is None else np.sort(self.scorers["cen"].against(_known(pool_h)), axis=1)

    def place(self, h: np.ndarray) -> dict[str, np.ndarray]:
        """‖h − μ‖ and the coordinates of h (…, d) on the pool's first principal directions."""
        gap = h.astype(np.float64) - self.mu
        return {"norm": np.linalg.norm(gap, axis=-1), "pc": gap @ self.directions_4d.T}

    def texts(self, kind: str, reading: str, h_Mnd: np.ndarray, draws: Sequence[int], tokens, **more) -> pa.Table:
        """Rows of texts, n of each target. Where they lie, and their rank among the null's texts, is kept with the reading
        of the protocol that evaluates the part."""
        columns = {centring: self.scorers[centring].own(h_Mnd) for centring in CENTRINGS_OF[kind]}
        if reading == OWN[self.name].name:
            pairs = zip(self.null_MP, columns["cen"])
            rank = np.stack([len(null) - np.searchsorted(null, own, "left") for null, own in pairs])
            # NaN sorts last: a null that is not known has it at its end.
            unknown = np.isnan(columns["cen"]) | np.isnan(self.null_MP[:, -1:])
            columns["rank"] = np.where(unknown, np.nan, rank)
            columns |= self.place(h_Mnd)
        return block(kind, self.name, reading, self.rows, draws, **columns, tokens=tokens, **more)

    def target(self, reading: str, pool_h: np.ndarray, ks: Sequence[int]) -> pa.Table:
        """A row a target: where it lies, its neighbours and floors, and the null's curve of the texts of ``pool_h``."""
        columns = self.place(self.v) | {"constant_mu": fve(self.mu, self.v)}
        for centring, scorer in self.scorers.items():
            columns |= {
                f"nearest_{centring}": scorer.nearest, f"floor_{centring}": scorer.floor,
                f"nearest_other_{centring}": metrics.nearest_other(self.v, scorer.mu),
                f"pair_floor_{centring}": metrics.pair_floor(self.v, scorer.mu),
                f"null_{centring}": metrics.exact_k_curve(scorer.against(pool_h), ks),
            }  # fmt: skip
        if reading == OWN[self.name].name:
            columns["null_left_out"] = metrics.curves_without_blocks(self.scorers["cen"].against(pool_h), ks, N_BLOCKS)
        return block("target", self.name, reading, self.rows, **{k: np.asarray(x)[:, None] for k, x in columns.items()})

    def others(self, reading: str, h_MKd: np.ndarray) -> pa.Table:
        """A row a target: what the rollouts of other targets score, and the rank of its own v for its greedy text."""
        columns = {}
        for kind in ("raw", "cen"):
            greedy, best = self.scorers[kind].others(h_MKd)
            columns |= {f"others_greedy_{kind}": greedy, f"others_best_{kind}": best}
        ks = metrics.k_values(h_MKd.shape[1] - 1)
        columns["others_curve"] = self.scorers["cen"].others_curve(h_MKd[:, 1:], ks)
        columns["greedy_rank"] = np.rint(1 / metrics.identification(h_MKd[:, 0], self.v, self.mu)[1])
        return block("others", self.name, reading, self.rows, **{k: x[:, None] for k, x in columns.items()})

    def pool_texts(self, reading: str, h_Pd: np.ndarray, logp: np.ndarray) -> pa.Table:
        """Rows of the pool's first texts, each scored against every target of the part; with the published reading, of
        the first 512, which the published floor is made of."""
        n, rows = min(POOL_TEXTS, len(h_Pd)), self.targets.pool
        scores, place = self.scorers["cen"].against(h_Pd[:n]).T, self.place(h_Pd[:n])
        columns = {
            "against": [*scores.astype(np.float32)], "norm": [*place["norm"]], "pc": [*place["pc"].astype(np.float32)],
            "logp": [*logp[:n]], "ids": self.targets.sequences(rows[:n]),
        }  # fmt: skip
        floors, kept = {}, n
        if reading == PAPER.name:
            kept = min(FLOOR_ROWS, len(rows))
            first = self.pool[:kept]
            floors = {f"floor_{k}": metrics.pair_floor(first, self.scorers[k].mu)[:, None] for k in ("raw", "cen")}
        columns = {name: x + [None] * (kept - n) for name, x in columns.items()}
        tokens = self.targets.lengths[rows[:kept]][:, None]
        return block("pool", self.name, reading, rows[:kept], tokens=tokens, **columns, **floors)


def of_ceilings(targets: Targets, ceilings: Ceilings, k: int, ablation: Optional[Ablation] = None) -> Evidence:
    """What notebook 03 scores: targets, sources, paraphrases, last tokens and the pool's texts.

    ``k``: draws that best-of-K is taken of, for which the null is wanted. Without ``ablation`` the readings between the
    two protocols are left out. Of protocols that the ceilings do not hold, nothing is made.
    """
    held = {name: ceilings.texts[p.name] for name, p in OWN.items() if p.name in ceilings.texts}
    parts = {name: Part(targets, name, texts.pool_h) for name, texts in held.items()}
    facts = {
        "sizes": {"M": targets.n_eval, "pool": targets.pool_size},
        "mu_norm": {"pool": float(np.linalg.norm(targets.mu)),
                    **{name: float(np.linalg.norm(part.own_mu)) for name, part in parts.items()}},
        "null_pool": {}, "null_k": {},
    }  # fmt: skip
    tables, replay, paraphrase = [], {}, {}
    for name, texts in ceilings.texts.items():
        null_Pd = _known(texts.pool_h)
        ks = sorted({*metrics.k_values(len(null_Pd)), k, N_PARAPHRASES})
        facts["null_pool"][name], facts["null_k"][name] = len(null_Pd), ks
        replay[name], paraphrase[name] = texts.replay, texts.paraphrase
        tables += [part.target(name, null_Pd, ks) for part in parts.values()]
        own = parts[part_of(BY_NAME[name])]
        lengths = np.minimum(TAIL_LENGTHS, targets.lengths[own.rows][:, None])
        tables.append(own.texts("tail", name, texts.tail, TAIL_LENGTHS, lengths, ids=_tails(targets, own.rows, lengths)))
        if ceilings.pool_logp is not None:
            pool_h = texts.pool_h if name == PAPER.name else own.pool
            tables.append(own.pool_texts(name, pool_h, ceilings.pool_logp))
    replay |= {encoding_key(LADDER[step]): h_Md for step, h_Md in ceilings.ladder.items()}
    if ablation is not None:
        replay, paraphrase = replay | ablation.replay, paraphrase | ablation.paraphrase
    # In an order of their own: artefacts that are read back have another than those just made.
    for reading, h_Md in sorted(replay.items()):
        part = parts[part_of_reading(reading)]
        ids = {"ids": targets.sequences(part.rows)} if reading in BY_NAME else {}
        tables.append(part.texts("source", reading, h_Md[:, None], [0], targets.lengths[part.rows][:, None], **ids))
    drawn = {name: texts.drawn for name, texts in ceilings.texts.items()} | (ablation.drawn if ablation else {})
    written = {_prompted(reading): texts for reading, texts in drawn.items()}
    for reading, h_Mnd in sorted(paraphrase.items()):
        part, texts = parts[part_of_reading(reading)], written[_prompted(reading)]
        once = {"ids": texts.sequences, "logp": texts.logp} if reading in drawn else {}
        tables.append(part.texts("paraphrase", reading, h_Mnd, range(N_PARAPHRASES), texts.lengths, **once))
    return Evidence(pa.concat_tables(tables), facts)


def of_rollouts(
    targets: Targets, rollouts: Rollouts, ceilings: Ceilings, probe: ProbeTexts, loss: Optional[SourceLoss] = None,
    ceiling: str = "paraphrase_bestof8",
) -> Evidence:  # fmt: skip
    """What notebook 04 scores: rollouts, what others' rollouts score, the probe's texts, and losses of the sources.

    ``ceiling``: the row of notebook 03 that ρ takes as ceiling in ``paper``.
    """
    tables, n = [], max(PROBE_LENGTHS)
    for name, protocol in OWN.items():
        part = Part(targets, name, ceilings.texts[protocol.name].pool_h)
        own = rollouts.at(part.rows)
        for reading, as_read in BY_NAME.items():
            h_MKd = own.h(as_read)
            more = _first_reading(part, own, h_MKd) if as_read == protocol else {}
            tables.append(part.texts("rollout", reading, h_MKd, range(own.k + 1), own.lengths, **more))
            tables.append(part.others(reading, h_MKd))
            h_Mnd, ids_Mn = probe.h(as_read, part.rows), probe.at(part.rows)
            ids = {"ids": [row[n - j :].tolist() for row in ids_Mn for j in PROBE_LENGTHS]} if as_read == protocol else {}
            lengths = np.tile(PROBE_LENGTHS, (len(part.rows), 1))
            tables.append(part.texts("probe", reading, h_Mnd, PROBE_LENGTHS, lengths, **ids))
    if loss is not None:
        lengths = np.isfinite(loss.nats["own"]).sum(axis=1)
        nats = {f"nats_{c}": [row[:t] for row, t in zip(nats_MT, lengths)] for c, nats_MT in loss.nats.items()}
        part, reading = part_of(CORRECTED), CORRECTED.name
        tables.append(block("source_loss", part, reading, loss.rows, tokens=lengths[:, None], **nats))
    return Evidence(pa.concat_tables(tables), {"K": rollouts.k, "T": rollouts.ids.shape[2], "ceiling": ceiling})


def _known(h_Pd: np.ndarray) -> np.ndarray:
    """The rows of texts that are known; where none is (released vectors alone), all of them, which are NaN."""
    known = np.isfinite(h_Pd[:, 0])
    return h_Pd[known] if known.any() else h_Pd


def part_of_reading(reading: str) -> str:
    """The part whose sources and paraphrases a reading is of."""
    return "held_out" if reading == CORRECTED.name or "in_sample" in reading.split("+") else "in_sample"


def _prompted(reading: str) -> tuple[bool, str]:
    """Which paraphrases a reading is of: how they were prompted for, and of which part."""
    return reading == CORRECTED.name or "pad_generate" in reading.split("+"), part_of_reading(reading)


def _tails(targets: Targets, rows: np.ndarray, lengths_Mn: np.ndarray) -> list[list[int]]:
    return [targets.sequence(i)[-n:] for i, lengths in zip(rows, lengths_Mn) for n in lengths]


def _first_reading(part: Part, own: Rollouts, h_MKd: np.ndarray) -> dict:
    """What is kept of rollouts once, with the reading of the protocol that evaluates them."""
    no_greedy = np.full((len(own.rows), 1), np.nan)
    shifts = range(1, min(N_OTHERS, len(own.rows) - 1) + 1)
    return {
        "ids": [own.sequence(m, j) for m in range(len(own.rows)) for j in range(own.k + 1)],
        "logp": np.hstack([no_greedy, own.logp]),
        "logp_paper": np.hstack([no_greedy, own.logp_paper]),
        "anchor": fve(h_MKd, part.anchor_Md[:, None], part.mu),
        "others": np.stack([fve(h_MKd, np.roll(part.v, -s, axis=0)[:, None], part.mu) for s in shifts], axis=-1),
    }
