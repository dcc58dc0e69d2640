"""§11's model card: the facts that it states beside its tables, with ours, and where its own numbers contradict it."""

from __future__ import annotations

from typing import Callable, Sequence

import pandas as pd

from nla_utils.paper.published import BACKBONES, SECTION_11, TITLES, card, look_up, published
from nla_utils.paper.results import RunResults
from nla_utils.paper.tables import number
from nla_utils.scores import rows


def _share(results: RunResults) -> str:
    return number(results.data["targets"]["mean_square_share_along_mu"])


def _corrected(row: rows.Row, kind: str) -> Callable[[RunResults], str]:
    return lambda r: number(r.column(row.file, "corrected")[row.at(kind)])


def _validation(results: RunResults) -> str:
    """Ours is ½(1 + cos); what the authors wrote into their checkpoints is a plain cosine already."""
    training = results.data["training"]
    value = training["best_val_fve_nrm"]
    return number(value if value is None or training.get("released") else 2 * value - 1, 4)


def _of_training(key: str) -> Callable[[RunResults], str]:
    return lambda r: number(None) if r.data["training"][key] is None else f"{r.data['training'][key]:,}"


# Label, path in a published record, its digits (None for a count), and ours, corrected where a protocol matters.
FACTS: tuple[tuple[str, str, int | None, Callable[[RunResults], str]], ...] = (
    ("extraction layer", "layer", None, lambda r: f"{r.layer}"),
    ("blocks", "num_layers", None, lambda r: f"{r.data['targets']['num_layers']}"),
    ("hidden size", "hidden_size", None, lambda r: f"{r.data['targets']['hidden_size']:,}"),
    ("trainable parameters", "av.trainable_params", None, _of_training("trainable_params")),
    ("targets", "targets.n", None, lambda r: f"{r.data['targets']['sizes']['N']:,}"),
    ("pairs within the token budget", "targets.pairs", None, _of_training("pairs")),
    ("pairs over it, skipped", "targets.skipped", None, _of_training("skipped_pairs")),
    ("training pairs", "targets.train_pairs", None, _of_training("train_pairs")),
    ("steps", "training.steps", None, lambda r: _as_text(r.data["training"]["steps"], None)),
    ("step that was kept", "training.best_step", None, lambda r: _as_text(r.data["training"]["best_step"], None)),
    ("its validation score, plain cosine", "training.best_val_fve_nrm", 4, _validation),
    ("‖μ‖, of the pool", "centred_eval.mu_norm", 1, lambda r: f"{r.data['targets']['mu_norm']:,.1f}"),
    ("‖μ‖, of the evaluated targets", "ceilings.mu_norm", 1,
     lambda r: f"{r.column(rows.CEILING_FILE, 'paper')['mu_norm']:,.1f}"),
    ("share of the mean square along μ", "", None, _share),
    ("raw floor of the evaluation", "centred_eval.random_floor.raw", 3, _corrected(rows.POOL_FLOOR, "raw")),
    ("paraphrase − floor, raw", "ceilings.gap_raw", 3, _corrected(rows.GAP, "raw")),
    ("paraphrase − floor, centred", "ceilings.gap_cen", 3, _corrected(rows.GAP, "cen")),
    ("slope per doubling of K", "k_curve.stated_slope_per_doubling_cen", 3, _corrected(rows.SLOPE, "cen")),
)  # fmt: skip


def facts_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """What the paper says of its backbones and trainings, and the same of ``runs``."""
    stated = [(TITLES[name], published(name)) for name in (SECTION_11, *(n for n in BACKBONES if n != SECTION_11))]
    table = []
    for label, path, digits, ours in FACTS:
        row = {"fact": label}
        for title, record in stated:
            value = look_up(record, path) if path else None
            row[f"published, {title}"] = _as_text(value, digits)
        table.append(row | {r.label: ours(r) for r in runs})
    return pd.DataFrame(table).set_index("fact")


def _as_text(value: float | None, digits: int | None) -> str:
    if value is None:
        return number(None)
    return f"{value:,}" if digits is None and value >= 10_000 else str(value) if digits is None else number(value, digits)


def slips_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """What the card says, and what its own numbers, the paper's and ours say of it."""
    gemma, llama, said = published(SECTION_11), published("llama32_3b")["ceilings"], card()["statements"]
    nn_gap = llama["nn_in_pool"]["cen"] - llama["random_floor"]["cen"]
    greedy, floors = gemma["centred_eval"]["greedy"]["raw"], (gemma[t]["random_floor"]["raw"] for t in TABLES)
    other, own = (f"{floor:.3f} ({greedy - floor:+.3f})" for floor in floors)
    cosine = gemma["training"]["best_val_fve_nrm"]
    found = (
        ("“How to load”: the checkpoint goes to `load_state_dict(state, strict=False)`",
         "The file holds the tensors one level down, under `trainable`. No key fits, `strict=False` says nothing, and "
         "the AV stays as it was initialised: who follows the card evaluates an untrained AV."),
        (f"The ceiling–floor gap is {said['gap']} on Gemma and {said['gap_llama']} on Llama",
         f"Gemma's is paraphrase − floor, Llama's is NN-in-pool − floor ({nn_gap:.3f}). Paraphrase − floor is "
         f"{llama['gap_cen']:.3f} on Llama."),
        (f"Validation fve_nrm {said['validation']}",
         f"It is a plain cosine. As ½(1 + cos), the card's own measure, it is {(1 + cosine) / 2:.3f}."),
        (f"Raw, greedy text ({greedy:.3f}) lies below the raw random floor ({gemma[TABLES[0]]['random_floor']['raw']:.3f})",
         f"That floor is of another table, with other pairs: {other}. In greedy's own table the floor is {own}."),
        (f"‖μ‖ of {said['mu_norm']} makes Gemma-2 the backbone of the highest anisotropy",
         "By the raw floor, which is anisotropy, the order of the paper's three is right, but ‖μ‖ is no reason for it: it grows "
         f"with the activations' scale. {_norms_and_floors(runs)}"),
    )  # fmt: skip
    return pd.DataFrame(found, columns=["the card", "what is wrong"]).set_index("the card")


TABLES = ("ceilings", "centred_eval")


def _norms_and_floors(runs: Sequence[RunResults]) -> str:
    """‖μ‖ and the raw floor, which is anisotropy, do not order backbones alike."""
    found = {TITLES[n]: published(n)["ceilings"] for n in (SECTION_11, "gpt_oss_20b")}
    found["gemma-4-31B-it"] = published("gemma4_31b")["it"]["ceilings"]
    pairs = [(title, c["mu_norm"], c["random_floor"]["raw"]) for title, c in found.items()]
    published_ones = ", ".join(f"{title} {norm:,.0f} and {floor:.3f}" for title, norm, floor in pairs)
    ours = ", ".join(f"{r.name} {r.data['targets']['mu_norm']:,.0f} and {_share(r)}" for r in runs)
    return (
        f"‖μ‖ and raw floor, with later ports: {published_ones}."
        + (f" Ours, ‖μ‖ and the share of the mean square along μ: {ours}." if ours else "")
    )
