"""DataFrames of published and reproduced numbers, and their Markdown and LaTeX."""

from __future__ import annotations

import math
import re
import statistics
from typing import Callable, Iterable, Iterator, Mapping, Optional, Sequence

import pandas as pd

from nla_utils import metrics, rows
from nla_utils.protocol import SLIPS
from nla_utils.report.results import (
    BACKBONES,
    FAMILIES,
    PROTOCOLS,
    SECTION_11,
    TITLES,
    RunResults,
    by_family,
    card,
    group,
    k_curve,
    look_up,
    null_at,
    published,
    published_curves,
)
from nla_utils.rows import Row

PUBLISHED = "published, "
RELEASED = "released AV, our run"
KINDS = {"raw": "raw", "cen": "centred"}
NULL_SIZE = Row("unrelated texts to choose from, P", "unrelated_text_pool_size")
MU_NORM = Row("‖μ‖", "mu_norm", published_path="centred_eval.mu_norm")


def centred(*shown: Row) -> list[tuple[Row, str]]:
    return [(row, "cen") for row in shown]


def both(*shown: Row) -> list[tuple[Row, str]]:
    """Each raw and centred."""
    return [(row, kind) for row in shown for kind in KINDS]


# The numbers of §11's summary, and those by which backbones are compared.
HEADLINE = (
    *centred(MU_NORM, rows.REPLAY, rows.PARAPHRASE),
    *both(rows.FLOOR, rows.GREEDY),
    *centred(rows.OTHERS_GREEDY, rows.PROBE[8], rows.BEST, rows.UNRELATED, NULL_SIZE, rows.OTHERS_BEST),
    *centred(rows.RETRIEVAL, rows.SLOPE, rows.SLOPE_UNRELATED, rows.LOGP_RERANK, rows.ANCHOR_RERANK),
)
SIDE_BY_SIDE = (
    *centred(MU_NORM),
    *both(rows.FLOOR),
    *centred(rows.REPLAY, rows.PARAPHRASE, rows.NN_IN_POOL, rows.GAP, rows.GREEDY, rows.BEST),
    *centred(Row("K", "K", published_path="centred_eval.K"), rows.RETRIEVAL, rows.SLOPE, rows.SPEARMAN),
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


def number(value: Optional[float], digits: int = 3, sign: str = "") -> str:
    """The number as text, a dash for ``None``."""
    return "–" if value is None else f"{value:{sign}.{digits}f}"


def with_interval(column: Mapping, key: str, digits: int = 3, sign: str = "") -> str:
    """``0.576 [0.561, 0.592]``, or a dash where the column has no such row."""
    text = number(column.get(key), digits, sign)
    interval = column["ci95"].get(key) if column.get(key) is not None else None
    if interval and None not in interval:
        text += f" [{number(interval[0], digits, sign)}, {number(interval[1], digits, sign)}]"
    return text


def signed(column: Mapping, key: str) -> str:
    """A difference with its interval and signs, ``+0.016 [+0.001, +0.032]``."""
    return with_interval(column, key, sign="+")


def with_kind(row: Row, kind: str) -> str:
    """The row's title, and which of the two it is, if it is both raw and centred."""
    return f"{row.title}, {KINDS[kind]}" if "{kind}" in row.key else row.title


def stated(row: Row, kind: str = "cen", name: str = SECTION_11) -> Optional[float]:
    """What the paper prints of a row, ``None`` where it does not."""
    return look_up(published(name), row.published_path.format(kind=kind))


def over_seeds(by_row: Mapping[str, Mapping[int, tuple[dict, str]]]) -> pd.DataFrame:
    """``{label: {seed: (column, key)}}`` as a table: each seed with its interval over targets, and mean ± standard
    deviation (of n − 1) over seeds."""
    table = {}
    for label, by_seed in by_row.items():
        values = [column[key] for column, key in by_seed.values()]
        table[label] = {f"seed {seed}": with_interval(*where) for seed, where in by_seed.items()}
        table[label]["over seeds, mean ± sd"] = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    return pd.DataFrame.from_dict(table, orient="index").rename_axis("row")


def seed_groups(everything: Sequence[RunResults]) -> list[dict[int, RunResults]]:
    """Results of at least two seeds that are otherwise alike, by seed."""
    return group(everything, lambda r: (r.backbone, r.family, r.layer), lambda r: r.seed, 2)


def seeds_table(by_seed: Mapping[int, RunResults]) -> pd.DataFrame:
    """Each seed with its interval over targets, and the spread over seeds; held out, ``corrected``, centred."""
    return over_seeds(
        {row.title: {s: (r.column(row.file, "corrected"), row.cen) for s, r in by_seed.items()} for row in OVER_SEEDS}
    )


def published_column(results: RunResults) -> str:
    """What tables call the published numbers beside a run: those of the paper's backbone of its family."""
    return f"{PUBLISHED}{TITLES[results.counterpart]}"


def _side_by_side(shown: Iterable[tuple[Row, str]], results: RunResults, title=with_kind) -> pd.DataFrame:
    """Published · as published · corrected, of each row and kind."""
    table = []
    for row, kind in shown:
        digits = {MU_NORM: 1, NULL_SIZE: 0}.get(row, 3)
        ours = [with_interval(results.column(row.file, p), row.at(kind), digits) for p in PROTOCOLS]
        table.append((title(row, kind), number(stated(row, kind, results.counterpart), digits), *ours))
    columns = ["row", published_column(results), "as published", "corrected"]
    return pd.DataFrame(table, columns=columns).set_index("row")


def headline_table(results: RunResults) -> pd.DataFrame:
    """The numbers of §11's summary."""
    return _side_by_side(HEADLINE, results)


def kind_table(shown: Sequence[Row], kind: str, results: RunResults) -> pd.DataFrame:
    """Published · as published · corrected, of one kind."""
    return _side_by_side(((row, kind) for row in shown), results, lambda row, _: row.title)


def both_kinds_table(shown: Sequence[Row], results: RunResults) -> pd.DataFrame:
    """Published · as published · corrected, each raw and centred. Of tails, probes and other controls the paper prints
    nothing."""
    raw, cen = (kind_table(shown, kind, results) for kind in KINDS)
    if rows.CONSTANT_MU in shown:
        # Centred, μ is the zero vector, which has no direction.
        cen.loc[rows.CONSTANT_MU.title] = number(None)
    columns = {c: c.split(", ")[0] for c in raw}
    pairs = [
        of[c].rename(f"{name}, {word}") for c, name in columns.items() for of, word in ((raw, "raw"), (cen, "centred"))
    ]
    return pd.concat(pairs, axis=1)


def rerank_table(results: RunResults) -> pd.DataFrame:
    """Cheap reranks and Spearman (PROTOCOL.md §6)."""
    return kind_table(rows.RERANKS, "cen", results)


def rho_table(results: RunResults) -> pd.DataFrame:
    """ρ_cen; ``corrected`` divides by a ceiling drawn as often as the row."""
    printed = {row: number(stated(row, name=results.counterpart), 2) for row in rows.RHO}
    table = [(row.title, printed[row], *(rho(results, p, row) for p in PROTOCOLS)) for row in rows.RHO]
    columns = ["row", published_column(results), "as published", "corrected"]
    return pd.DataFrame(table, columns=columns).set_index("row")


def rho(results: RunResults, protocol: str, row: Row) -> str:
    """ρ with its interval; a dash where there is none, or where ceiling − floor, between the ends of their intervals,
    may be zero."""
    intervals = results.column(rows.CEILING_FILE, protocol)["ci95"]
    equal_counts = rows.PARAPHRASE_ALL if row in rows.RHO_OF_ONE else rows.PARAPHRASE
    divisor = (rows.RHO_CEILINGS[results.spec.ceiling] if protocol == "published" else equal_counts).cen
    may_be_zero = intervals[divisor][0] <= intervals[rows.FLOOR.cen][1]
    return number(None) if may_be_zero else with_interval(results.column(row.file, protocol), row.key, 2)


def k_curve_table(results: RunResults) -> pd.DataFrame:
    """Centred K-curve: published · first-K' under ``published`` · exact under ``corrected`` · its nulls."""
    paper, corrected = (results.column(rows.RERANK_FILE, p) for p in PROTOCOLS)
    curves = (
        ("as published", paper, rows.CURVE, rows.SLOPE),
        ("control: unrelated text, as published", paper, rows.CURVE_UNRELATED, rows.SLOPE_UNRELATED),
        ("corrected", corrected, rows.CURVE, rows.SLOPE),
        ("control: unrelated text, corrected", corrected, rows.CURVE_UNRELATED, rows.SLOPE_UNRELATED),
        ("control: other targets' rollouts, corrected", corrected, rows.CURVE_OTHERS, rows.SLOPE_OTHERS),
    )
    printed = k_curve(results.counterpart)
    index = [*sorted({*printed, *paper["ks"]}), rows.SLOPE.label]
    slope_stated = number(stated(rows.SLOPE, name=results.counterpart))
    table = {published_column(results): [*(number(printed.get(k)) for k in index[:-1]), slope_stated]}
    for label, column, curve, slope in curves:
        points = column[curve.cen] | {"ci95": column["ci95"][curve.cen]}
        table[label] = [*(with_interval(points, str(k)) for k in index[:-1]), with_interval(column, slope.cen)]
    return pd.DataFrame(table, index=pd.Index(index, name="K"))


def with_released(
    make: Callable[[RunResults], pd.DataFrame], results: RunResults, released: Optional[RunResults]
) -> pd.DataFrame:
    """A run's table; right of what is published, what the AV that was released for it scores in ``released``, a run of
    ours, under the same protocol."""
    table = make(results)
    if released is None or released is results:
        return table
    theirs = make(released).reindex(table.index).fillna(number(None))
    for column in [c for c in table if c.startswith("published")]:
        kind = column.removeprefix(published_column(results)).removeprefix("published")
        table.insert(table.columns.get_loc(column) + 1, RELEASED + kind, theirs[f"as published{kind}"])
    return table


def family_columns(runs: Iterable[RunResults], printed: Callable, ours: Callable, of: str = "{r.label}") -> dict:
    """Columns family by family: what is ``printed`` of the paper's backbone, by the name of its record, then ``ours``
    of each run, called ``of``."""
    columns = {}
    for name, of_family in by_family(runs).items():
        columns |= {f"{PUBLISHED}{TITLES[name]}": printed(name)} if name else {}
        columns |= {of.format(r=r): ours(r) for r in of_family}
    return columns


def backbones_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """The published three and every run, one column each; runs under the published protocol."""

    def column(layer: int, layers: int, value: Callable[[Row, str], Optional[float]]) -> dict[str, str]:
        shown = {with_kind(row, kind): _plain(value(row, kind)) for row, kind in SIDE_BY_SIDE}
        return {"layer / blocks": f"{layer} / {layers}"} | shown

    def printed(name: str) -> dict[str, str]:
        record = published(name)
        return column(record["layer"], record["num_layers"], lambda row, kind: stated(row, kind, name))

    def ours(r: RunResults) -> dict[str, str]:
        return column(r.layer, r.targets["num_layers"], lambda row, kind: r.value(row, kind, "published"))

    return pd.DataFrame(family_columns(everything, printed, ours, "{r.title}, as published"))


def _plain(value: Optional[float]) -> str:
    if isinstance(value, int):
        return str(value)
    return number(value, 1 if value is not None and abs(value) >= 2 else 3)


def published_null_table(released: Mapping[str, RunResults]) -> pd.DataFrame:
    """The paper's best of K beside the best of as many unrelated texts, interpolated from the paper's own rows; right
    of them, measured by us under the published protocol, runs of a ``released`` AV, by the name of its record."""
    table = [
        {
            "backbone": c.title,
            "K": str(c.k),
            "best of K rollouts": number(c.best[c.k]),
            "best of K unrelated texts": "at least " * c.at_least + number(null_at(c.null, c.k)),
            "difference": "at most " * c.at_least + number(c.margin, sign="+"),
        }
        for c in published_curves()
    ]
    made = pd.DataFrame(table).set_index("backbone")
    for name, results in released.items():
        column = results.column(rows.EVALUATION_FILE, "published")
        best, null = (with_interval(column, row.cen) for row in (rows.BEST, rows.UNRELATED))
        made.loc[TITLES[name], RELEASED] = f"{best} against {null}, K = {column['K']}"
    return made.fillna(number(None))


def bits_cell(value: Optional[float], ci95: Optional[Sequence[float]], k: int, p: int) -> str:
    """Bits with their interval. Beyond what P texts can tell there is a bound, ``> 5.0``; ``°`` marks a figure within
    two bits of the most that they can tell: there a few of them decide it."""
    if value is None:
        return number(None)
    least, most = metrics.limits_of_bits(k, p)

    def one(bits: float) -> str:
        return ("> " if bits > most - 1e-9 else "< " if bits < least + 1e-9 else "") + f"{bits:.1f}"

    thin = "°" if most - 2 < value <= most - 1e-9 else ""
    return one(value) + thin + (f" [{', '.join(map(one, ci95))}]" if ci95 else "")


def _bits_at(k_max: int) -> Iterator[tuple[rows.Bits, str, int]]:
    """The figures in bits, what each is called, and the k of it."""
    for figure in rows.BITS:
        at = "" if figure.k == "K" else f", at {figure.k}"
        yield figure, figure.of.label + at, figure.k if at else k_max


def bits_of(column: Mapping) -> dict[str, str]:
    """The figures in bits of a column that has them, the best of K by rank too."""
    k, p = column["K"], column["unrelated_text_pool_size"]
    shown = [(label, figure.row.cen, at) for figure, label, at in _bits_at(k)]
    shown.append((rows.BITS_BEST.by_rank.label, rows.BITS_BEST.by_rank.key, k))
    return {label: bits_cell(column[key], column["ci95"].get(key), at, p) for label, key, at in shown}


def has_bits(results: RunResults) -> bool:
    """Whether the run kept scores per text, from which bits have an interval."""
    return rows.BITS_BEST.row.cen in results.of(rows.BEST)


def bits_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """Bits at K, held out, corrected, family by family; published curves first. ``≈`` marks what has no evidence, and
    so no interval."""
    table, runs = {}, by_family(everything)
    for name in (*BACKBONES, None):
        for c in (c for c in published_curves() if FAMILIES.get(c.family) == name):
            best = "at most " * c.at_least + bits_cell(c.bits[c.k], None, c.k, max(c.null))
            numbers = {"K": str(c.k), "unrelated texts": f"{max(c.null):,}", rows.BEST.label: best}
            table[f"{c.title}, published"] = numbers
        for r in runs.get(name, ()):
            column, p = r.of(rows.BEST), r.bits_curve[2]
            found = bits_of(column) if has_bits(r) else {}
            for figure, label, k in _bits_at(column["K"]):
                score = r.value(figure.of)
                if label not in found and score is not None:
                    found[label] = f"≈ {bits_cell(r.interpolated_bits(score, k), None, k, p)}"
            table[r.title] = {"K": str(column["K"]), "unrelated texts": f"{p:,}"} | found
    made = pd.DataFrame.from_dict(table, orient="index").fillna(number(None)).rename_axis("backbone")
    return made.drop(columns=f"{rows.SAMPLED.label}, at 1", errors="ignore")


def rows_by_run(shown: Sequence[Row], runs: Sequence[RunResults], kinds: Mapping[str, str]) -> pd.DataFrame:
    """Rows of several runs, held out and corrected: a column for each run and each of ``kinds``, ``{kind: name}``."""
    table = {
        (f"{r.label}, {name}" if name else r.label): {
            row.title: with_interval(r.of(row), row.at(kind), 4 if row in rows.P_VALUES else 3)
            for row in shown
            if kind in row.kinds
        }
        for r in runs
        for kind, name in kinds.items()
    }
    return pd.DataFrame(table).fillna(number(None)).rename_axis("row")


def null_mismatch(results: RunResults) -> float:
    """How far the null that is read off NN-in-pool and NN-retrieval, as of the paper's rows, lies above the measured
    best of K unrelated texts that are encoded as rollouts are: centred, published protocol."""
    scale, column = (results.column(name, "published") for name in (rows.CEILING_FILE, rows.EVALUATION_FILE))
    points = {results.sizes["M"] - 1: scale[rows.NN_IN_POOL.cen], results.sizes["pool"]: column[rows.RETRIEVAL.cen]}
    return null_at(points, column["K"]) - column[rows.UNRELATED.cen]


def null_encoding(results: RunResults) -> float:
    """How much higher the best of K unrelated texts scores behind BOS than without it, on the same held-out targets,
    centred."""
    protocols = ("corrected", "published_on_held_out")
    behind, without = (results.column(rows.EVALUATION_FILE, p)[rows.UNRELATED.cen] for p in protocols)
    return behind - without


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
    "§": r"\S{}",
    "→": r"$\rightarrow$",
    "½": r"$\frac12$",
    "#": r"\#",
    "\u00a0": "~",
    "“": "``",
    "”": "''",
    "λ": r"$\lambda$",
    "Δ": r"$\Delta$",
    "…": r"\ldots{}",
    "±": r"$\pm$",
    "≈": r"$\approx$",
    "×": r"$\times$",
    "°": r"$^\circ$",
    "τ": r"$\tau$",
}


def tex(text: object) -> str:
    """Plain text for LaTeX, in ASCII; `code` becomes typewriter."""
    # An interval is not broken over two lines.
    text = re.sub(r"\[([-+\d.]+), ([-+\d.]+)\]", "[\\1,\u00a0\\2]", str(text))
    return re.sub("`([^`]*)`", r"\\texttt{\1}", text).translate(str.maketrans(TEX))


def share_along_mu(results: RunResults) -> str:
    return number(results.targets["mean_square_share_along_mu"])


def _validation(results: RunResults) -> Optional[float]:
    """Ours is ½(1 + cos); what the authors wrote into their checkpoints is a plain cosine already."""
    value = results.training["best_val_fve_nrm"]
    return value if value is None or results.training.get("released") else 2 * value - 1


# Label, path in a published record, digits (None for a count), and ours, corrected where a protocol matters.
FACTS: tuple[tuple[str, str, Optional[int], Callable[[RunResults], Optional[float]]], ...] = (
    ("extraction layer", "layer", None, lambda r: r.layer),
    ("blocks", "num_layers", None, lambda r: r.targets["num_layers"]),
    ("hidden size", "hidden_size", None, lambda r: r.targets["hidden_size"]),
    ("trainable parameters", "av.trainable_params", None, lambda r: r.training["trainable_params"]),
    ("targets", "targets.n", None, lambda r: r.sizes["N"]),
    ("pairs within the token budget", "targets.pairs", None, lambda r: r.training["pairs"]),
    ("pairs over it, skipped", "targets.skipped", None, lambda r: r.training["skipped_pairs"]),
    ("training pairs", "targets.train_pairs", None, lambda r: r.training["train_pairs"]),
    ("steps", "training.steps", None, lambda r: r.training["steps"]),
    ("step that was kept", "training.best_step", None, lambda r: r.training["best_step"]),
    ("its validation score, plain cosine", "training.best_val_fve_nrm", 4, _validation),
    ("‖μ‖, of the pool", "centred_eval.mu_norm", 1, lambda r: r.targets["mu_norm"]),
    (
        "‖μ‖, of the evaluated targets",
        "ceilings.mu_norm",
        1,
        lambda r: r.column(rows.CEILING_FILE, "published")["mu_norm"],
    ),
    ("share of the mean square along μ", "", 3, lambda r: r.targets["mean_square_share_along_mu"]),
    ("raw floor of the evaluation", "centred_eval.random_floor.raw", 3, lambda r: r.value(rows.POOL_FLOOR, "raw")),
    ("paraphrase − floor, raw", "ceilings.gap_raw", 3, lambda r: r.value(rows.GAP, "raw")),
    ("paraphrase − floor, centred", "ceilings.gap_cen", 3, lambda r: r.value(rows.GAP)),
    ("slope per doubling of K", "k_curve.stated_slope_per_doubling_cen", 3, lambda r: r.value(rows.SLOPE)),
)


def facts_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """What the paper says of its backbones and trainings, and the same of ``runs``, family by family."""
    columns = family_columns(
        runs,
        lambda name: {label: _fact(look_up(published(name), path), digits) for label, path, digits, _ in FACTS},
        lambda r: {label: _fact(ours(r), digits) for label, _, digits, ours in FACTS},
    )
    return pd.DataFrame(columns).rename_axis("fact")


def _fact(value: Optional[float], digits: Optional[int]) -> str:
    if value is None or digits is not None:
        return number(value, digits, ",")
    return f"{value:,}" if value >= 10_000 else str(value)


def slips_table(runs: Sequence[RunResults]) -> pd.DataFrame:
    """What the card says, and what its own numbers, the paper's and ours say of it."""
    gemma, llama, said = published(SECTION_11), published("llama32_3b")["ceilings"], card()["statements"]
    nn_gap = llama["nn_in_pool"]["cen"] - llama["random_floor"]["cen"]
    cosine, greedy = gemma["training"]["best_val_fve_nrm"], gemma["centred_eval"]["greedy"]["raw"]
    floors = [gemma[table]["random_floor"]["raw"] for table in ("ceilings", "centred_eval")]
    other, own = (f"{floor:.3f} ({greedy - floor:+.3f})" for floor in floors)
    # ‖μ‖ and the raw floor, which is anisotropy, do not order backbones alike.
    anchors = {TITLES[n]: published(n)["ceilings"] for n in (SECTION_11, "gpt_oss_20b")}
    anchors["gemma-4-31B-it"] = published("gemma4_31b")["it"]["ceilings"]
    theirs = ", ".join(f"{t} {a['mu_norm']:,.0f} and {a['random_floor']['raw']:.3f}" for t, a in anchors.items())
    ours = ", ".join(f"{r.name} {r.targets['mu_norm']:,.0f} and {share_along_mu(r)}" for r in runs)
    found = {
        "“How to load”: the checkpoint goes to `load_state_dict(state, strict=False)`": (
            "The file holds the tensors one level down, under `trainable`. No key fits, `strict=False` says nothing, "
            "and the AV stays as it was initialised: who follows the card evaluates an untrained AV."
        ),
        f"The ceiling–floor gap is {said['gap']} on Gemma and {said['gap_llama']} on Llama": (
            f"Gemma's is paraphrase − floor, Llama's is NN-in-pool − floor ({nn_gap:.3f}). Paraphrase − floor is "
            f"{llama['gap_cen']:.3f} on Llama."
        ),
        f"Validation fve_nrm {said['validation']}": (
            f"It is a plain cosine. As ½(1 + cos), the card's own measure, it is {(1 + cosine) / 2:.3f}."
        ),
        f"Raw, greedy text ({greedy:.3f}) lies below the raw random floor ({floors[0]:.3f})": (
            f"That floor is of another table, with other pairs: {other}. In greedy's own table the floor is {own}."
        ),
        f"‖μ‖ of {said['mu_norm']} makes Gemma-2 the backbone of the highest anisotropy": (
            "By the raw floor, which is anisotropy, the order of the paper's three is right, but ‖μ‖ is no reason for "
            "it: it grows with the activations' scale. ‖μ‖ and raw floor, with later ports: "
            f"{theirs}." + (f" Ours, ‖μ‖ and the share of the mean square along μ: {ours}." if ours else "")
        ),
    }
    return pd.DataFrame({"what is wrong": found}).rename_axis("the card")


def moves(r: RunResults) -> dict[str, str]:
    """By slip, what it moves in a run, as text; an arrow leads from the published value to the one with this slip
    corrected."""
    targets, training, ablation = r.targets, r.training, r.data[rows.EVALUATION_FILE]["ablation"]
    corrected = r.column(rows.EVALUATION_FILE, "corrected")
    alone, in_order = ablation["alone"], ablation["in_order"]
    curves = r.column(rows.RERANK_FILE, "corrected")
    first, exact = (curves[f"kcurve_{way}_cen"] for way in ("first", "exact"))
    margin, trained_on = rows.IN_SAMPLE_GREEDY.key, training["in_sample_trained_on"]
    low, high = corrected["ci95"][margin]
    undecided = ", not decided" if low <= 0 <= high else ""
    changed = "{changed_pairs} of {pairs} texts come back as other ids, {skipped_pairs} skipped".format(**training)

    def arrow(before: float, after: float) -> str:
        return f"{number(before)} → {number(after)}"

    def step(slip: str, key: str) -> str:
        """As published, and with this one slip corrected."""
        return arrow(alone["published"][key], alone[slip][key])

    def next_step(slip: str, key: str) -> str:
        """With all earlier slips corrected, and with this one too."""
        before = list(in_order)[list(in_order).index(slip) - 1]
        return arrow(in_order[before][key], in_order[slip][key])

    def pair(row: Row) -> str:
        return arrow(*(r.value(row, protocol=p) for p in PROTOCOLS))

    def value(row: Row) -> str:
        return number(r.value(row))

    return {
        "bos": f"replay {step('bos', 'replay')}, greedy {step('bos', 'greedy')}",
        "left_pad": f"replay {step('left_pad', 'replay')}, paraphrase {step('left_pad', 'paraphrase_bestof8')}",
        "eos_text": f"{targets['ended_share']:.1%} end in EOS; replay alone {step('eos_text', 'replay')}, in order "
        f"{next_step('eos_text', 'replay')}. It also drops the decoding and tokenizing again, which moves padding",
        "pad_generate": f"paraphrase best-of-8 {step('pad_generate', 'paraphrase_bestof8')}",
        "in_sample": f"{'an unknown number' if trained_on is None else trained_on} of {corrected['n']} trained on. "
        f"Other targets, in order: paraphrase {next_step('in_sample', 'paraphrase_bestof8')}. Training: greedy's "
        f"margin over others', in-sample − held out, {signed(corrected, margin)}{undecided}",
        "no_null": f"best-of-{corrected['K']} {value(rows.BEST)}, as many unrelated texts {value(rows.UNRELATED)}",
        "self_mu": f"floor {step('self_mu', 'random_floor')}, paraphrase {step('self_mu', 'paraphrase_bestof8')}",
        "k_mismatch": f"ρ of best-of-K {step('k_mismatch', 'rho_bestofK')}",
        "floor_kind": f"at {r.size}: others' greedy {value(rows.OTHERS_GREEDY)}, random floor {value(rows.POOL_FLOOR)}",
        # The nearest stored vector's score: raw as published, centred alone.
        "uncentred_anchor": arrow(*(r.value(row, protocol="published") for row in (rows.ANCHOR, rows.RETRIEVAL))),
        "logp_embeds": f"all slips corrected, other targets: mean token log-probability {pair(rows.MEAN_LOGP)}, "
        f"Spearman {pair(rows.SPEARMAN)}",
        "top_k": "kept in both protocols: it defines the distribution of targets and rollouts",
        "first_k": f"largest difference along the curve {max(abs(first[k] - exact[k]) for k in exact):.4f}",
        "raw_select": _checkpoints(training),
        "retokenize": "not trained here" if training["pairs"] is None else changed,
        "no_stop": f"{targets['ended_share']:.1%} of sources end, "
        f"{corrected['shorter_than_limit_share']:.1%} of rollouts",
        "inject_norm": f"‖v‖ {targets['v_norm_mean']:,.0f}, an embedding's norm {targets['embedding_norm_mean']:,.1f}",
        "one_span": f"last 4 tokens {value(rows.TAILS[4])}, last 8 tokens {value(rows.TAILS[8])}, the AV's greedy text "
        f"of all {value(rows.GREEDY)}",
    }


def _checkpoints(training: dict) -> str:
    """Which step was kept, and which ones other rules would keep."""
    validation, kept, steps = training["validation"], training["best_step"], training["steps"]
    if not validation:
        return "not trained here"
    at, interval = {v["step"]: v for v in validation}, validation[0]["step"]
    words = [f"step {kept} of {steps} kept, centred would keep {training['best_step_by_centred']}"]
    if steps != kept:
        raw, cen = (at[steps][key] - at[kept][key] for key in ("fve_nrm", "fve_nrm_cen"))
        words.append(f"on the validation targets the last step has {raw:+.3f} raw, {cen:+.3f} centred against it")
    authors = max((v for v in validation if v["step"] % interval == 0), key=lambda v: v["fve_nrm"])["step"]
    # Runs before this rule was followed may have kept their last step.
    if authors != kept:
        words.append(f"the authors, who save at multiples of {interval} alone, would keep {authors}")
    return "; ".join(words)


def audit_table(results: RunResults) -> pd.DataFrame:
    """Each slip, what it is, in which notebooks it acts, and what it moves in this run."""
    moved = moves(results)
    table = [(s.id, s.what, s.acts_in, moved[s.id]) for s in SLIPS.values()]
    return pd.DataFrame(table, columns=["slip", "what it is", "acts in", "what it moves"]).set_index("slip")


def audit_of_all(runs: Sequence[RunResults], everything: Sequence[RunResults]) -> pd.DataFrame:
    """Each slip, what it is, and what it moves in each of ``runs``. What depends on size is shown at every size that a
    backbone has in ``everything``."""
    table = {"what it is": {s.id: s.what for s in SLIPS.values()}}
    for results in runs:
        sizes = [r for r in everything if r.backbone == results.backbone and not r.corpus and not r.av]
        floors = [moves(r)["floor_kind"] for r in sorted(sizes, key=lambda r: r.sizes["N"])]
        table[results.label] = moves(results) | {"floor_kind": "; ".join(floors)}
    return pd.DataFrame(table).rename_axis("slip")


COLUMNS = ("published", RELEASED, "difference")


def released_runs(everything: Iterable[RunResults]) -> dict[str, RunResults]:
    """By the name of the published record, the largest run that evaluates the AV which the authors released for its
    backbone; a run of that AV on another backbone is none."""
    found: dict[str, RunResults] = {}
    for results in sorted(everything, key=lambda r: r.sizes["M"]):
        name = results.backbone.replace("-", "_")
        source = (results.training.get("released") or "").removeprefix("hub:").split("@")[0]
        if name in BACKBONES and source in ("released", published(name)["av"]["repo"]):
            found[name] = results
    return found


def released_table(name: str, results: RunResults) -> pd.DataFrame:
    """Published · released AV, our run (``published`` protocol) · difference, of each row that the paper prints.

    ``differs`` is written behind a difference that two samples of targets do not explain: beyond √(1 + M / the
    paper's M) times the half width of our 95 % interval on its side. Figures without an interval are not judged, nor
    those of another K.
    """
    table = []
    for row in (*rows.CEILINGS, *rows.EVALUATION, *rows.RHO, *rows.RERANKS, rows.SLOPE):
        both = "{kind}" in row.published_path
        for kind in KINDS if both else ("cen",):
            theirs, column, key = stated(row, kind, name), results.column(row.file, "published"), row.at(kind)
            if theirs is not None:
                label, part = with_kind(row, kind) if both else row.title, row.published_path.split(".")[0]
                section = published(name)["k_curve" if part == "rerank" else part]
                difference = _difference(theirs, column, key, section)
                table.append((label, number(theirs), with_interval(column, key), difference))
    return pd.DataFrame(table, columns=["row", *COLUMNS]).set_index("row")


def _difference(theirs: float, column: dict, key: str, section: dict) -> str:
    ours, k = column.get(key), column.get("K")
    if ours is None:
        return number(None)
    if section.get("K") and k != section["K"]:
        return f"not compared: K {section['K']} and {k}"
    text, (low, high) = f"{ours - theirs:+.3f}", column["ci95"].get(key) or (None, None)
    if low is None or high is None:
        return text
    half = high - ours if theirs > ours else ours - low
    return f"{text}, differs" if abs(ours - theirs) > math.sqrt(1 + column["n"] / section["M"]) * half else text
