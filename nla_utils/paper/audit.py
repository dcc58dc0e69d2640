"""The audit: what each slip of the published measurement moves in a run (PROTOCOL.md §7).

Slips are those of :mod:`nla_utils.protocol`; every figure is read from the run's results files.
"""

from __future__ import annotations

from typing import Callable, Sequence

import pandas as pd

from nla_utils.paper.results import RunResults
from nla_utils.paper.tables import number, signed
from nla_utils.protocol import SLIPS
from nla_utils.scores import rows


def _step(results: RunResults, slip: str, key: str) -> str:
    """A quantity as published and with this one slip corrected."""
    alone = results.data["centered_eval"]["ablation"]["alone"]
    return f"{number(alone['paper'][key])} → {number(alone[slip][key])}"


def _in_order(results: RunResults, slip: str, key: str) -> str:
    """A quantity with all earlier slips corrected, and with this one too."""
    steps = results.data["centered_eval"]["ablation"]["in_order"]
    before = list(steps)[list(steps).index(slip) - 1]
    return f"{number(steps[before][key])} → {number(steps[slip][key])}"


def _pair(results: RunResults, row: rows.Row) -> str:
    """A quantity under the paper's and under the corrected protocol."""
    return " → ".join(number(results.column(row.file, p)[row.cen]) for p in ("paper", "corrected"))


def _uncentred_anchor(results: RunResults) -> str:
    """The nearest stored vector's score: raw as published, centred alone."""
    anchor, centred = results.column("rerank_eval", "paper")[rows.ANCHOR.key], results.column("centered_eval", "paper")
    return f"{number(anchor)} → {number(centred[rows.RETRIEVAL.cen])}"


def _corrected(results: RunResults, row: rows.Row) -> str:
    return number(results.column(row.file, "corrected")[row.cen])


def _in_sample(results: RunResults) -> str:
    count, column = results.data["training"]["in_sample_trained_on"], results.column("centered_eval", "corrected")
    shown = "an unknown number" if count is None else count
    low, high = column["ci95"][rows.IN_SAMPLE_GREEDY.key]
    undecided = ", not decided" if low <= 0 <= high else ""
    return (
        f"{shown} of {column['n']} trained on. Other targets, in order: paraphrase "
        f"{_in_order(results, 'in_sample', 'paraphrase_bestof8')}. Training: greedy's margin over others', in-sample − held "
        f"out, {signed(column, rows.IN_SAMPLE_GREEDY.key)}{undecided}"
    )


def _null(results: RunResults) -> str:
    k = results.column("centered_eval", "corrected")["K"]
    return f"best-of-{k} {_corrected(results, rows.BEST)}, as many unrelated texts {_corrected(results, rows.UNRELATED)}"


def _first_k(results: RunResults) -> str:
    first, exact = (results.column("rerank_eval", "corrected")[f"kcurve_{x}_cen"] for x in ("first", "exact"))
    return f"largest difference along the curve {number(max(abs(first[k] - exact[k]) for k in exact), 4)}"


def _floor_kind(results: RunResults) -> str:
    floor, greedy = _corrected(results, rows.POOL_FLOOR), _corrected(results, rows.OTHERS_GREEDY)
    return f"at {results.size}: others' greedy {greedy}, random floor {floor}"


def _raw_select(results: RunResults) -> str:
    training = results.data["training"]
    validation, kept, steps = training["validation"], training["best_step"], training["steps"]
    if not validation:
        return "not trained here"
    at, interval = {v["step"]: v for v in validation}, validation[0]["step"]
    words = [f"step {kept} of {steps} kept, centred would keep {training['best_step_by_centred']}"]
    if steps != kept:
        raw, cen = (at[steps][key] - at[kept][key] for key in ("fve_nrm", "fve_nrm_cen"))
        words.append(f"on the validation targets the last step has {raw:+.3f} raw, {cen:+.3f} centred against it")
    saved = [v for v in validation if v["step"] % interval == 0]
    authors = max(saved, key=lambda v: v["fve_nrm"])["step"]
    # Runs before this rule was followed may have kept their last step.
    if authors != kept:
        words.append(f"the authors, who save at multiples of {interval} alone, would keep {authors}")
    return "; ".join(words)


def _retokenize(results: RunResults) -> str:
    t = results.data["training"]
    if t["pairs"] is None:
        return "not trained here"
    return f"{t['changed_pairs']} of {t['pairs']} texts come back as other ids, {t['skipped_pairs']} skipped"


def _no_stop(results: RunResults) -> str:
    ended, column = results.data["targets"]["ended_share"], results.column("centered_eval", "corrected")
    return f"{ended:.1%} of sources end, {column['shorter_than_limit_share']:.1%} of rollouts"


def _inject_norm(results: RunResults) -> str:
    facts = results.data["targets"]
    return f"‖v‖ {facts['v_norm_mean']:,.0f}, an embedding's norm {facts['embedding_norm_mean']:,.1f}"


def _one_span(results: RunResults) -> str:
    tails = ", ".join(f"last {n} tokens {_corrected(results, rows.TAILS[n])}" for n in (4, 8))
    return f"{tails}, the AV's greedy text of all {_corrected(results, rows.GREEDY)}"


def _eos_text(results: RunResults) -> str:
    return (
        f"{results.data['targets']['ended_share']:.1%} end in EOS; replay alone {_step(results, 'eos_text', 'replay')}, "
        f"in order {_in_order(results, 'eos_text', 'replay')}. It also drops the decoding and tokenizing again, which moves padding"
    )


def _self_mu(results: RunResults) -> str:
    shown = (("floor", "random_floor"), ("paraphrase", "paraphrase_bestof8"))
    return ", ".join(f"{label} {_step(results, 'self_mu', key)}" for label, key in shown)


# What a slip moves, as text; an arrow leads from the published value to the one with this slip corrected.
MOVES: dict[str, Callable[[RunResults], str]] = {
    "bos": lambda r: f"replay {_step(r, 'bos', 'replay')}, greedy {_step(r, 'bos', 'greedy')}",
    "left_pad": lambda r: f"replay {_step(r, 'left_pad', 'replay')}, "
                          f"paraphrase {_step(r, 'left_pad', 'paraphrase_bestof8')}",
    "eos_text": _eos_text,
    "pad_generate": lambda r: f"paraphrase best-of-8 {_step(r, 'pad_generate', 'paraphrase_bestof8')}",
    "in_sample": _in_sample,
    "no_null": _null,
    "self_mu": _self_mu,
    "k_mismatch": lambda r: f"ρ of best-of-K {_step(r, 'k_mismatch', 'rho_bestofK')}",
    "floor_kind": _floor_kind,
    "uncentred_anchor": _uncentred_anchor,
    "logp_embeds": lambda r: "all slips corrected, other targets: mean token log-probability "
                             f"{_pair(r, rows.MEAN_LOGP)}, Spearman {_pair(r, rows.SPEARMAN)}",
    "top_k": lambda r: "kept in both protocols: it defines the distribution of targets and rollouts",
    "first_k": _first_k,
    "raw_select": _raw_select,
    "retokenize": _retokenize,
    "no_stop": _no_stop,
    "inject_norm": _inject_norm,
    "one_span": _one_span,
}  # fmt: skip


def audit_table(results: RunResults) -> pd.DataFrame:
    """Each slip, what it is, in which notebooks it acts, and what it moves in this run."""
    table = [
        {"slip": s.id, "what it is": s.what, "acts in": s.acts_in, "what it moves": MOVES[s.id](results)}
        for s in SLIPS.values()
    ]
    return pd.DataFrame(table).set_index("slip")


def audit_of_all(runs: Sequence[RunResults], everything: Sequence[RunResults]) -> pd.DataFrame:
    """Each slip, what it is, and what it moves in each of ``runs``. What depends on size is shown at every size that a
    backbone has in ``everything``."""
    table = []
    for slip in SLIPS.values():
        row = {"slip": slip.id, "what it is": slip.what}
        for results in runs:
            moved = MOVES[slip.id]
            own = [r for r in everything if r.backbone == results.backbone and not r.corpus]
            own.sort(key=lambda r: r.data["targets"]["sizes"]["N"])
            row[results.label] = "; ".join(moved(r) for r in own) if slip.id == "floor_kind" else moved(results)
        table.append(row)
    return pd.DataFrame(table).set_index("slip")
