"""DataFrames of published and reproduced numbers, and their Markdown and LaTeX."""

from __future__ import annotations

import math
import re
import statistics
from typing import Callable, Iterable, Mapping, Optional, Sequence

import pandas as pd

from nla_utils import rows
from nla_utils.protocol import SLIPS
from nla_utils.report.results import (
    BACKBONES,
    SECTION_11,
    TITLES,
    RunResults,
    card,
    group,
    k_curve,
    later_nulls,
    look_up,
    null_at,
    published,
    published_null,
)
from nla_utils.rows import Row

PUBLISHED = f"published, {TITLES[SECTION_11]}"
RELEASED = "released AV, our run"
NULL_SIZE = Row("unrelated texts to choose from, P", "unrelated_text_pool_size")
# The numbers of §11's summary.
HEADLINE = (
    (rows.REPLAY, "cen"),
    (rows.PARAPHRASE, "cen"),
    (rows.FLOOR, "raw"),
    (rows.FLOOR, "cen"),
    (rows.GREEDY, "raw"),
    (rows.GREEDY, "cen"),
    (rows.OTHERS_GREEDY, "cen"),
    (rows.PROBE[8], "cen"),
    (rows.BEST, "cen"),
    (rows.UNRELATED, "cen"),
    (NULL_SIZE, ""),
    (rows.OTHERS_BEST, "cen"),
    (rows.RETRIEVAL, "cen"),
    (rows.SLOPE, "cen"),
    (rows.SLOPE_UNRELATED, "cen"),
    (rows.LOGP_RERANK, "cen"),
    (rows.ANCHOR_RERANK, "cen"),
)
MU_NORM = Row("‖μ‖", "mu_norm", published_path="centred_eval.mu_norm")
SIDE_BY_SIDE = (
    (MU_NORM, ""),
    (rows.FLOOR, "raw"),
    (rows.FLOOR, "cen"),
    (rows.REPLAY, "cen"),
    (rows.PARAPHRASE, "cen"),
    (rows.NN_IN_POOL, "cen"),
    (rows.GAP, "cen"),
    (rows.GREEDY, "cen"),
    (rows.BEST, "cen"),
    (Row("K", "K", published_path="centred_eval.K"), ""),
    (rows.RETRIEVAL, "cen"),
    (rows.SLOPE, "cen"),
    (rows.SPEARMAN, ""),
)
# What seeds are compared by; centred, ``corrected``.
OVER_SEEDS = (
    rows.PARAPHRASE,
    rows.GREEDY,
    rows.GREEDY_MINUS_OTHERS,
    rows.BEST,
    rows.BEST_MINUS_UNRELATED,
    rows.SLOPE,
    rows.RETRIEVAL,
)


def number(value: Optional[float], digits: int = 3) -> str:
    """The number as text, a dash for ``None``."""
    return "–" if value is None else f"{value:.{digits}f}"


def with_interval(column: dict, key: str, digits: int = 3) -> str:
    """``0.576 [0.561, 0.592]``, or a dash where the column has no such row."""
    if column.get(key) is None:
        return "–"
    text = number(column[key], digits)
    interval = column["ci95"].get(key)
    if interval and None not in interval:
        text += f" [{number(interval[0], digits)}, {number(interval[1], digits)}]"
    return text


def signed(column: dict, key: str) -> str:
    """A difference with its interval and signs, ``+0.016 [+0.001, +0.032]``, or a dash where the column has no such row."""
    if column.get(key) is None:
        return "–"
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(column[key], *column["ci95"][key])


def over_seeds(by_row: Mapping[str, Mapping[int, tuple[dict, str]]]) -> pd.DataFrame:
    """``{label: {seed: (column, key)}}`` as a table: each seed with its interval over targets, and mean ± standard
    deviation (of n − 1) over seeds."""
    table = []
    for label, by_seed in by_row.items():
        values = [column[key] for column, key in by_seed.values()]
        row = {"row": label, **{f"seed {seed}": with_interval(*where) for seed, where in by_seed.items()}}
        row["over seeds, mean ± sd"] = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        table.append(row)
    return pd.DataFrame(table).set_index("row")


def seed_groups(everything: Sequence[RunResults]) -> list[dict[int, RunResults]]:
    """Results of at least two seeds that are otherwise alike, by seed."""
    return group(everything, lambda r: (r.backbone, r.family, r.layer), lambda r: r.seed, 2)


def seeds_table(by_seed: Mapping[int, RunResults]) -> pd.DataFrame:
    """Each seed with its interval over targets, and the spread over seeds; held out, ``corrected``, centred."""
    return over_seeds(
        {row.title: {s: (r.column(row.file, "corrected"), row.cen) for s, r in by_seed.items()} for row in OVER_SEEDS}
    )


def _side_by_side(shown: Sequence[tuple[Row, str]], results: RunResults, kind_in_label: bool = False) -> pd.DataFrame:
    """Published · as published · corrected, of each row and kind."""
    stated, table = published(SECTION_11), []
    for row, kind in shown:
        path, digits = row.published_path.format(kind=kind), {MU_NORM.key: 1, NULL_SIZE.key: 0}.get(row.key, 3)
        label = _with_kind(row, kind) if kind_in_label else row.title
        ours = [with_interval(results.column(row.file, p), row.at(kind), digits) for p in ("published", "corrected")]
        table.append((label, number(look_up(stated, path) if path else None, digits), *ours))
    columns = ["row", PUBLISHED, "as published", "corrected"]
    return pd.DataFrame(table, columns=columns).set_index("row")


def _with_kind(row: Row, kind: str) -> str:
    return f"{row.title}, {'raw' if kind == 'raw' else 'centred'}" if kind else row.title


def ceilings_table(results: RunResults, kind: str) -> pd.DataFrame:
    """Ceilings (§11; PROTOCOL.md §5)."""
    return _side_by_side([(row, kind) for row in rows.CEILINGS], results)


def both_kinds_table(shown: Sequence[Row], results: RunResults) -> pd.DataFrame:
    """Published · as published · corrected, each raw and centred. Of tails, probes and other controls the paper prints
    nothing."""
    made = {kind: _side_by_side([(row, kind) for row in shown], results) for kind in ("raw", "cen")}
    table = pd.DataFrame(
        {
            f"{column.replace(PUBLISHED, 'published')}, {word}": made[kind][column]
            for column in made["raw"].columns
            for kind, word in (("raw", "raw"), ("cen", "centred"))
        }
    )
    if rows.CONSTANT_MU in shown:
        # Centred, μ is the zero vector, which has no direction.
        table.loc[rows.CONSTANT_MU.title, [c for c in table.columns if c.endswith("centred")]] = number(None)
    return table


def evaluation_table(results: RunResults, kind: str) -> pd.DataFrame:
    """Centred evaluation (PROTOCOL.md §4)."""
    shown = [*rows.EVALUATION, rows.CONSTANT_MU] if kind == "raw" else rows.EVALUATION
    return _side_by_side([*((row, kind) for row in shown), (NULL_SIZE, "")], results)


def rho_table(results: RunResults) -> pd.DataFrame:
    """ρ_cen; ``corrected`` divides by a ceiling drawn as often as the row. A ratio whose denominator may be zero is none."""
    stated = published(SECTION_11)
    table = [
        {
            "row": row.title,
            PUBLISHED: number(look_up(stated, row.published_path) if row.published_path else None, 2),
            "as published": rho(results, "published", row),
            "corrected": rho(results, "corrected", row),
        }
        for row in rows.RHO
    ]
    return pd.DataFrame(table).set_index("row")


def rho(results: RunResults, protocol: str, row: Row) -> str:
    """ρ with its interval; a dash where there is none, or where ceiling − floor, between the ends of their intervals,
    may be zero."""
    scale = results.column(rows.CEILING_FILE, protocol)
    if protocol == "published":
        divisor = rows.RHO_CEILINGS[results.spec.ceiling].cen
    else:
        divisor = (rows.PARAPHRASE_ALL if row in rows.RHO_OF_ONE else rows.PARAPHRASE).cen
    (low, _), (_, floor) = scale["ci95"][divisor], scale["ci95"][rows.FLOOR.cen]
    return with_interval(results.column(row.file, protocol), row.key, 2) if low > floor else number(None)


def rerank_table(results: RunResults) -> pd.DataFrame:
    """Cheap reranks and Spearman (PROTOCOL.md §6)."""
    return _side_by_side([(row, "cen") for row in rows.RERANKS], results)


def with_released(
    make: Callable[[RunResults], pd.DataFrame], results: RunResults, released: Optional[RunResults]
) -> pd.DataFrame:
    """A run's table; right of what is published for §11's backbone, what the AV that was released for it scores in
    ``released``, a run of ours, under the same protocol."""
    table = make(results)
    if released is None or released is results:
        return table
    theirs = make(released).reindex(table.index).fillna(number(None))
    for column in [c for c in table.columns if c.startswith("published")]:
        kind = column.removeprefix(PUBLISHED).removeprefix("published")
        table.insert(table.columns.get_loc(column) + 1, RELEASED + kind, theirs[f"as published{kind}"])
    return table


def headline_table(results: RunResults) -> pd.DataFrame:
    """The numbers of §11's summary."""
    return _side_by_side([(MU_NORM, ""), *HEADLINE], results, kind_in_label=True)


def k_curve_table(results: RunResults) -> pd.DataFrame:
    """Centred K-curve: published · first-K' under ``published`` · exact under ``corrected`` · its nulls."""
    stated = k_curve(SECTION_11)
    paper, corrected = results.column("rerank_eval", "published"), results.column("rerank_eval", "corrected")
    columns = (
        ("as published", paper, rows.CURVE, rows.SLOPE),
        ("control: unrelated text, as published", paper, rows.CURVE_UNRELATED, rows.SLOPE_UNRELATED),
        ("corrected", corrected, rows.CURVE, rows.SLOPE),
        ("control: unrelated text, corrected", corrected, rows.CURVE_UNRELATED, rows.SLOPE_UNRELATED),
        ("control: other targets' rollouts, corrected", corrected, rows.CURVE_OTHERS, rows.SLOPE_OTHERS),
    )
    table = []
    for k in sorted(set(stated) | set(paper["ks"])):
        points = {label: _curve_point(column, curve.cen, str(k)) for label, column, curve, _ in columns}
        table.append({"K": k, PUBLISHED: number(stated.get(k)), **points})
    slopes = {label: with_interval(column, slope.cen) for label, column, _, slope in columns}
    published_slope = look_up(published(SECTION_11), rows.SLOPE.published_path)
    return pd.DataFrame([*table, {"K": rows.SLOPE.label, PUBLISHED: number(published_slope), **slopes}]).set_index("K")


def short_k_curve_table(results: RunResults) -> pd.DataFrame:
    """The published K-curve, and ours under both protocols, each beside its null."""
    return k_curve_table(results).drop(columns="control: other targets' rollouts, corrected")


def _curve_point(column: dict, key: str, k: str) -> str:
    if k not in column[key]:
        return "–"
    low, high = column["ci95"][key][k]
    return f"{column[key][k]:.3f} [{low:.3f}, {high:.3f}]"


def backbones_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The published three beside every run, one column each; runs under the published protocol."""
    table: dict[str, dict[str, str]] = {}
    labels = {(row, kind): _with_kind(row, kind) for row, kind in SIDE_BY_SIDE}
    for name in BACKBONES:
        record = published(name)
        table[f"{TITLES[name]}, published"] = {"layer / blocks": f"{record['layer']} / {record['num_layers']}"} | {
            label: _plain(look_up(record, row.published_path.format(kind=kind)))
            for (row, kind), label in labels.items()
        }
    for results in everything:
        blocks = {"layer / blocks": f"{results.layer} / {results.data['targets']['num_layers']}"}
        table[f"{results.title}, as published"] = blocks | {
            label: _plain(results.column(row.file, "published").get(row.at(kind)))
            for (row, kind), label in labels.items()
        }
    return pd.DataFrame(table)


def published_null_table(released: Mapping[str, RunResults]) -> pd.DataFrame:
    """The paper's best of K beside the best of as many unrelated texts, interpolated from the paper's own rows; right of them,
    measured by us under the published protocol, where there is a run of a ``released`` AV, by the name of its published record."""
    k_of = {name: published(name)["centred_eval"]["K"] for name in BACKBONES}
    found = [(TITLES[name], k, *published_null(name, k), "") for name, k in k_of.items()]
    found += [(*later, "at most ") for later in later_nulls()]
    table = [
        {
            "backbone": title,
            "K": str(k),
            "best of K rollouts": number(rollouts),
            "best of K unrelated texts": ("at least " if bound else "") + number(null),
            "difference": f"{bound}{rollouts - null:+.3f}",
        }
        for title, k, null, rollouts, bound in found
    ]
    made = pd.DataFrame(table).set_index("backbone")
    for name, results in released.items():
        column = results.column(rows.EVALUATION_FILE, "published")
        best, null = (with_interval(column, row.cen) for row in (rows.BEST, rows.UNRELATED))
        made.loc[TITLES[name], RELEASED] = f"{best} against {null}, K = {column['K']}"
    return made.fillna(number(None))


def null_mismatch(results: RunResults) -> float:
    """How far the null that is read off NN-in-pool and NN-retrieval, as of the paper's rows, lies above the measured best of
    K unrelated texts that are encoded as rollouts are: centred, published protocol."""
    scale, column = (results.column(name, "published") for name in (rows.CEILING_FILE, rows.EVALUATION_FILE))
    sizes = results.data["targets"]["sizes"]
    points = {sizes["M"] - 1: scale[rows.NN_IN_POOL.cen], sizes["pool"]: column[rows.RETRIEVAL.cen]}
    return null_at(points, column["K"]) - column[rows.UNRELATED.cen]


def null_encoding(results: RunResults) -> float:
    """How much higher the best of K unrelated texts scores behind BOS than without it, on the same held-out targets, centred."""
    behind, without = (
        results.column(rows.EVALUATION_FILE, p)[rows.UNRELATED.cen] for p in ("corrected", "published_on_held_out")
    )
    return behind - without


def _plain(value) -> str:
    if isinstance(value, int):
        return str(value)
    return number(value, 1 if value is not None and abs(value) >= 2 else 3)


def markdown(table: pd.DataFrame) -> str:
    """The table as Markdown."""
    return table.to_markdown(disable_numparse=True) + "\n"


def latex(table: pd.DataFrame, caption: str, label: str, widths: Sequence[float] = (), long: bool = False) -> str:
    """A booktabs table. ``widths``: of its columns, in hundredths of the text's; then they wrap, which needs array.
    ``long``: it goes on over the next page, which needs longtable."""
    escaped = table.reset_index().rename(columns=tex).map(tex)
    columns = "".join(rf">{{\raggedright\arraybackslash}}p{{{w / 100:g}\linewidth}}" for w in widths)
    columns = columns or "l" + "r" * len(table.columns)
    return escaped.to_latex(caption=tex(caption), label=label, column_format=columns, index=False, longtable=long)


TEX = {
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "<": "$<$",
    ">": "$>$",
    "‖": r"$\|$",
    "μ": r"$\mu$",
    "ρ": r"$\rho$",
    "−": "$-$",
    "–": "--",
    "·": r"$\cdot$",
    "²": "$^2$",
    "₂": "$_2$",
    "§": r"\S{}",
    "’": "'",
    "→": r"$\rightarrow$",
    "½": r"$\frac12$",
    "ĥ": r"$\hat h$",
    "×": r"$\times$",
    "≤": r"$\leq$",
    "#": r"\#",
    "\u00a0": "~",
    "“": "``",
    "”": "''",
    "λ": r"$\lambda$",
    "Δ": r"$\Delta$",
    "…": r"\ldots{}",
    "±": r"$\pm$",
    "ℓ": r"$\ell$",
}


def tex(text: object) -> str:
    """Plain text for LaTeX, in ASCII; `code` becomes typewriter."""
    # An interval is not broken over two lines.
    parts = re.sub(r"\[([-+\d.]+), ([-+\d.]+)\]", "[\\1,\u00a0\\2]", str(text)).split("`")
    escaped = ["".join(TEX.get(c, c) for c in part) for part in parts]
    return "".join(rf"\texttt{{{part}}}" if i % 2 else part for i, part in enumerate(escaped))


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
    (
        "‖μ‖, of the evaluated targets",
        "ceilings.mu_norm",
        1,
        lambda r: f"{r.column(rows.CEILING_FILE, 'published')['mu_norm']:,.1f}",
    ),
    ("share of the mean square along μ", "", None, _share),
    ("raw floor of the evaluation", "centred_eval.random_floor.raw", 3, _corrected(rows.POOL_FLOOR, "raw")),
    ("paraphrase − floor, raw", "ceilings.gap_raw", 3, _corrected(rows.GAP, "raw")),
    ("paraphrase − floor, centred", "ceilings.gap_cen", 3, _corrected(rows.GAP, "cen")),
    ("slope per doubling of K", "k_curve.stated_slope_per_doubling_cen", 3, _corrected(rows.SLOPE, "cen")),
)


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
    return (
        f"{value:,}" if digits is None and value >= 10_000 else str(value) if digits is None else number(value, digits)
    )


def slips_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """What the card says, and what its own numbers, the paper's and ours say of it."""
    gemma, llama, said = published(SECTION_11), published("llama32_3b")["ceilings"], card()["statements"]
    nn_gap = llama["nn_in_pool"]["cen"] - llama["random_floor"]["cen"]
    greedy, floors = gemma["centred_eval"]["greedy"]["raw"], (gemma[t]["random_floor"]["raw"] for t in TABLES)
    other, own = (f"{floor:.3f} ({greedy - floor:+.3f})" for floor in floors)
    cosine = gemma["training"]["best_val_fve_nrm"]
    found = (
        (
            "“How to load”: the checkpoint goes to `load_state_dict(state, strict=False)`",
            "The file holds the tensors one level down, under `trainable`. No key fits, `strict=False` says nothing, and "
            "the AV stays as it was initialised: who follows the card evaluates an untrained AV.",
        ),
        (
            f"The ceiling–floor gap is {said['gap']} on Gemma and {said['gap_llama']} on Llama",
            f"Gemma's is paraphrase − floor, Llama's is NN-in-pool − floor ({nn_gap:.3f}). Paraphrase − floor is "
            f"{llama['gap_cen']:.3f} on Llama.",
        ),
        (
            f"Validation fve_nrm {said['validation']}",
            f"It is a plain cosine. As ½(1 + cos), the card's own measure, it is {(1 + cosine) / 2:.3f}.",
        ),
        (
            f"Raw, greedy text ({greedy:.3f}) lies below the raw random floor ({gemma[TABLES[0]]['random_floor']['raw']:.3f})",
            f"That floor is of another table, with other pairs: {other}. In greedy's own table the floor is {own}.",
        ),
        (
            f"‖μ‖ of {said['mu_norm']} makes Gemma-2 the backbone of the highest anisotropy",
            "By the raw floor, which is anisotropy, the order of the paper's three is right, but ‖μ‖ is no reason for it: it grows "
            f"with the activations' scale. {_norms_and_floors(runs)}",
        ),
    )
    return pd.DataFrame(found, columns=["the card", "what is wrong"]).set_index("the card")


TABLES = ("ceilings", "centred_eval")


def _norms_and_floors(runs: Sequence[RunResults]) -> str:
    """‖μ‖ and the raw floor, which is anisotropy, do not order backbones alike."""
    found = {TITLES[n]: published(n)["ceilings"] for n in (SECTION_11, "gpt_oss_20b")}
    found["gemma-4-31B-it"] = published("gemma4_31b")["it"]["ceilings"]
    pairs = [(title, c["mu_norm"], c["random_floor"]["raw"]) for title, c in found.items()]
    published_ones = ", ".join(f"{title} {norm:,.0f} and {floor:.3f}" for title, norm, floor in pairs)
    ours = ", ".join(f"{r.name} {r.data['targets']['mu_norm']:,.0f} and {_share(r)}" for r in runs)
    return f"‖μ‖ and raw floor, with later ports: {published_ones}." + (
        f" Ours, ‖μ‖ and the share of the mean square along μ: {ours}." if ours else ""
    )


def _step(results: RunResults, slip: str, key: str) -> str:
    """A quantity as published and with this one slip corrected."""
    alone = results.data["centered_eval"]["ablation"]["alone"]
    return f"{number(alone['published'][key])} → {number(alone[slip][key])}"


def _in_order(results: RunResults, slip: str, key: str) -> str:
    """A quantity with all earlier slips corrected, and with this one too."""
    steps = results.data["centered_eval"]["ablation"]["in_order"]
    before = list(steps)[list(steps).index(slip) - 1]
    return f"{number(steps[before][key])} → {number(steps[slip][key])}"


def _pair(results: RunResults, row: rows.Row) -> str:
    """A quantity under the paper's and under the corrected protocol."""
    return " → ".join(number(results.column(row.file, p)[row.cen]) for p in ("published", "corrected"))


def _uncentred_anchor(results: RunResults) -> str:
    """The nearest stored vector's score: raw as published, centred alone."""
    anchor, centred = (
        results.column("rerank_eval", "published")[rows.ANCHOR.key],
        results.column("centered_eval", "published"),
    )
    return f"{number(anchor)} → {number(centred[rows.RETRIEVAL.cen])}"


def _corrected_value(results: RunResults, row: rows.Row) -> str:
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
    return f"best-of-{k} {_corrected_value(results, rows.BEST)}, as many unrelated texts {_corrected_value(results, rows.UNRELATED)}"


def _first_k(results: RunResults) -> str:
    first, exact = (results.column("rerank_eval", "corrected")[f"kcurve_{x}_cen"] for x in ("first", "exact"))
    return f"largest difference along the curve {number(max(abs(first[k] - exact[k]) for k in exact), 4)}"


def _floor_kind(results: RunResults) -> str:
    floor, greedy = _corrected_value(results, rows.POOL_FLOOR), _corrected_value(results, rows.OTHERS_GREEDY)
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
    tails = ", ".join(f"last {n} tokens {_corrected_value(results, rows.TAILS[n])}" for n in (4, 8))
    return f"{tails}, the AV's greedy text of all {_corrected_value(results, rows.GREEDY)}"


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
    "left_pad": lambda r: (
        f"replay {_step(r, 'left_pad', 'replay')}, paraphrase {_step(r, 'left_pad', 'paraphrase_bestof8')}"
    ),
    "eos_text": _eos_text,
    "pad_generate": lambda r: f"paraphrase best-of-8 {_step(r, 'pad_generate', 'paraphrase_bestof8')}",
    "in_sample": _in_sample,
    "no_null": _null,
    "self_mu": _self_mu,
    "k_mismatch": lambda r: f"ρ of best-of-K {_step(r, 'k_mismatch', 'rho_bestofK')}",
    "floor_kind": _floor_kind,
    "uncentred_anchor": _uncentred_anchor,
    "logp_embeds": lambda r: (
        "all slips corrected, other targets: mean token log-probability "
        f"{_pair(r, rows.MEAN_LOGP)}, Spearman {_pair(r, rows.SPEARMAN)}"
    ),
    "top_k": lambda r: "kept in both protocols: it defines the distribution of targets and rollouts",
    "first_k": _first_k,
    "raw_select": _raw_select,
    "retokenize": _retokenize,
    "no_stop": _no_stop,
    "inject_norm": _inject_norm,
    "one_span": _one_span,
}


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


COLUMNS = ("published", RELEASED, "difference")


def released_runs(everything: Iterable[RunResults]) -> dict[str, RunResults]:
    """By the name of the published record, the largest run that evaluates the AV which the authors released for its
    backbone; a run of that AV on another backbone is none."""
    found: dict[str, RunResults] = {}
    for results in sorted(everything, key=lambda r: r.data["targets"]["sizes"]["M"]):
        name = results.backbone.replace("-", "_")
        source = (results.data["training"].get("released") or "").removeprefix("hub:").split("@")[0]
        if name in BACKBONES and source in ("released", published(name)["av"]["repo"]):
            found[name] = results
    return found


def released_table(name: str, results: RunResults) -> pd.DataFrame:
    """Published · released AV, our run (``published`` protocol) · difference, of each row that the paper prints.

    ``differs`` is written behind a difference that two samples of targets do not explain: beyond √(1 + M / the paper's M)
    times the half width of our 95 % interval on its side. Figures without an interval are not judged, nor those of
    another K.
    """
    stated, table = published(name), []
    for row in (*rows.CEILINGS, *rows.EVALUATION, *rows.RHO, *rows.RERANKS, rows.SLOPE):
        both = "{kind}" in row.published_path
        for kind in ("raw", "cen") if both else ("cen",):
            path, column, key = (
                row.published_path.format(kind=kind),
                results.column(row.file, "published"),
                row.at(kind),
            )
            theirs = look_up(stated, path) if path else None
            if theirs is not None:
                label = f"{row.title}, {'raw' if kind == 'raw' else 'centred'}" if both else row.title
                section = stated["k_curve" if path.startswith("rerank") else path.split(".")[0]]
                table.append(
                    (label, number(theirs), with_interval(column, key), _difference(theirs, column, key, section))
                )
    return pd.DataFrame(table, columns=["row", *COLUMNS]).set_index("row")


def _difference(theirs: float, column: dict, key: str, section: dict) -> str:
    ours, k = column.get(key), column.get("K")
    if ours is None:
        return "–"
    if section.get("K") and k != section["K"]:
        return f"not compared: K {section['K']} and {k}"
    text, (low, high) = f"{ours - theirs:+.3f}", column["ci95"].get(key) or (None, None)
    if low is None or high is None:
        return text
    half = high - ours if theirs > ours else ours - low
    return f"{text}, differs" if abs(ours - theirs) > math.sqrt(1 + column["n"] / section["M"]) * half else text
