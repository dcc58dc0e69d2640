"""The audit: each slip of the paper's measurement, where it acts, and what it moves in a run.

Source: PROTOCOL.md §7. Every figure is read from the run's results files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable

import pandas as pd

from nla_utils.results import RunResults
from nla_utils.tables import number


@dataclass(frozen=True)
class Slip:
    """A slip: ``moves`` formats its effect from a run's results."""

    id: str
    what: str
    where: str
    moves: Callable[[RunResults], str]


def _step(run: RunResults, slip: str, key: str) -> str:
    """A quantity as published and with this one slip corrected."""
    alone = run.data["centered_eval"]["ablation"]["alone"]
    return f"{number(alone['paper'][key])} → {number(alone[slip][key])}"


def _pair(run: RunResults, name: str, key: str) -> str:
    """A quantity under the paper's and under the corrected protocol."""
    return " → ".join(number(run.column(name, p)[key]) for p in ("paper", "corrected"))


def _corrected(run: RunResults, name: str, key: str) -> str:
    return number(run.column(name, "corrected")[key])


def _in_sample(run: RunResults) -> str:
    training, sizes = run.data["training"], run.data["targets"]["sizes"]
    column = run.column("centered_eval", "corrected")
    low, high = column["ci95"]["in_sample_advantage_greedy"]
    count = training["in_sample_trained_on"]
    return (f"{'an unknown number' if count is None else count} of {sizes['M']} trained on; advantage of greedy "
            f"{column['in_sample_advantage_greedy']:+.3f} [{low:+.3f}, {high:+.3f}]")  # fmt: skip


def _null(run: RunResults) -> str:
    column = run.column("centered_eval", "corrected")
    return (f"best-of-{column['K']} {number(column['adapter_cen_bestofK_mean'])}, as many unrelated texts "
            f"{number(column['unrelated_text_cen_bestofK_mean'])}")  # fmt: skip


def _first_k(run: RunResults) -> str:
    column = run.column("rerank_eval", "corrected")
    gaps = [abs(column["kcurve_first_cen"][k] - column["kcurve_exact_cen"][k]) for k in column["kcurve_exact_cen"]]
    return f"largest difference along the curve {number(max(gaps), 4)}"


def _floor_kind(run: RunResults) -> str:
    column = run.column("centered_eval", "corrected")
    floor, others, greedy = (
        number(column[k]) for k in ("random_floor_cen_mean", "shuffled_v_cen_greedy_mean", "adapter_cen_greedy_mean")
    )
    return f"random floor {floor}, others' greedy {others}, greedy {greedy}"


def _raw_select(run: RunResults) -> str:
    training = run.data["training"]
    return f"step {training['best_step']} kept, centred would keep {training['best_step_by_centred']}"


def _retokenize(run: RunResults) -> str:
    t = run.data["training"]
    return f"{t['changed_pairs']} of {t['pairs']} texts come back as other ids, {t['skipped_pairs']} skipped"


def _no_stop(run: RunResults) -> str:
    ended, column = run.data["targets"]["ended_share"], run.column("centered_eval", "corrected")
    return f"{ended:.1%} of sources end, {column['shorter_than_limit_share']:.1%} of rollouts"


def _inject_norm(run: RunResults) -> str:
    facts = run.data["targets"]
    return f"‖v‖ {facts['v_norm_mean']:,.0f}, an embedding's norm {facts['embedding_norm_mean']:,.1f}"


def _one_span(run: RunResults) -> str:
    column = run.column("oracle_ceiling", "corrected")
    return (f"last 4 tokens {number(column['tail_oracle_4_cen_fve_mean'])}, last 8 "
            f"{number(column['tail_oracle_8_cen_fve_mean'])}, the AV's greedy text of all "
            f"{_corrected(run, 'centered_eval', 'adapter_cen_greedy_mean')}")  # fmt: skip


SLIPS: tuple[Slip, ...] = (
    Slip("bos", "targets are taken behind BOS, texts are re-encoded without it", "03, 04, 05",
         lambda r: f"replay {_step(r, 'bos', 'replay')}, greedy {_step(r, 'bos', 'greedy')}"),
    Slip("left_pad", "the last token is read at count − 1 in a batch padded on the left", "03",
         lambda r: f"replay {_step(r, 'left_pad', 'replay')}, paraphrase {_step(r, 'left_pad', 'paraphrase_bestof8')}"),
    Slip("eos_text", "a source that ended in EOS is re-encoded from text that cannot hold it", "03",
         lambda r: f"replay {_step(r, 'eos_text', 'replay')} alone; "
                   f"{r.data['targets']['ended_share']:.1%} of sources end in EOS"),
    Slip("pad_generate", "paraphrase prompts are padded where the tokenizer pads, which may be the right", "03",
         lambda r: f"paraphrase best-of-8 {_step(r, 'pad_generate', 'paraphrase_bestof8')}"),
    Slip("in_sample", "targets called held-out were trained on", "04, 05", _in_sample),
    Slip("no_null", "nothing stands beside best-of-K that selects without reading", "04, 05", _null),
    Slip("self_mu", "ceilings take μ and floor from the evaluated targets themselves", "03",
         lambda r: f"floor {_step(r, 'self_mu', 'random_floor')}, "
                   f"paraphrase {_step(r, 'self_mu', 'paraphrase_bestof8')}"),
    Slip("k_mismatch", "ρ divides a best-of-K by a best-of-8", "04",
         lambda r: f"ρ of best-of-K {_step(r, 'k_mismatch', 'rho_bestofK')}"),
    Slip("floor_kind", "the floor compares targets with targets, not with re-encoded text", "03, 04", _floor_kind),
    Slip("uncentred_anchor", "the NN-anchor row is labelled centred and computed raw", "05",
         lambda r: f"{_pair(r, 'rerank_eval', 'nn_anchor_baseline')}"),
    Slip("logp_embeds", "log-probabilities come from the raw embedding table", "05",
         lambda r: f"mean token log-probability {_pair(r, 'rerank_eval', 'mean_logp')}, "
                   f"Spearman {_pair(r, 'rerank_eval', 'spearman_logp_vs_oracle_cen_mean')}"),
    Slip("top_k", "temperature 1, top_p 1 is in fact top_k 50", "01, 04",
         lambda r: "kept in both protocols: it defines the distribution of targets and rollouts"),
    Slip("first_k", "the K-curve uses the first K' columns only", "05", _first_k),
    Slip("raw_select", "the checkpoint is chosen on raw fve_nrm", "02", _raw_select),
    Slip("retokenize", "training texts are decoded and tokenized again", "02", _retokenize),
    Slip("no_stop", "training text never holds EOS", "02", _no_stop),
    Slip("inject_norm", "v enters at its own norm", "02", _inject_norm),
    Slip("one_span", "the AV writes from the beginning, v knows the end", "02", _one_span),
)  # fmt: skip


def audit_table(run: RunResults) -> pd.DataFrame:
    """Each slip, what it is, in which notebooks it acts, and what it moves in this run (→: once corrected)."""
    rows = [{"slip": s.id, "what it is": s.what, "acts in": s.where, "what it moves": s.moves(run)} for s in SLIPS]
    return pd.DataFrame(rows).set_index("slip")
