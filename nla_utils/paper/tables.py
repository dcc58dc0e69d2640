"""DataFrames of published and reproduced numbers, and their Markdown and LaTeX."""

from __future__ import annotations

import re
import statistics
from typing import Callable, Mapping, Optional, Sequence

import pandas as pd

from nla_utils.paper.published import (
    BACKBONES,
    SECTION_11,
    TITLES,
    k_curve,
    later_nulls,
    look_up,
    null_at,
    published,
    published_null,
)
from nla_utils.paper.results import RunResults, group
from nla_utils.scores import rows
from nla_utils.scores.rows import Row

PUBLISHED = f"published, {TITLES[SECTION_11]}"
RELEASED = "released AV, our run"
NULL_SIZE = Row("unrelated texts to choose from, P", "unrelated_text_pool_size")
# The numbers of §11's summary.
HEADLINE = (
    (rows.REPLAY, "cen"), (rows.PARAPHRASE, "cen"), (rows.FLOOR, "raw"), (rows.FLOOR, "cen"), (rows.GREEDY, "raw"),
    (rows.GREEDY, "cen"), (rows.OTHERS_GREEDY, "cen"), (rows.PROBE[8], "cen"), (rows.BEST, "cen"), (rows.UNRELATED, "cen"),
    (NULL_SIZE, ""), (rows.OTHERS_BEST, "cen"), (rows.RETRIEVAL, "cen"), (rows.SLOPE, "cen"), (rows.SLOPE_UNRELATED, "cen"),
    (rows.LOGP_RERANK, "cen"), (rows.ANCHOR_RERANK, "cen"),
)  # fmt: skip
MU_NORM = Row("‖μ‖", "mu_norm", "centred_eval.mu_norm")
SIDE_BY_SIDE = (
    (MU_NORM, ""), (rows.FLOOR, "raw"), (rows.FLOOR, "cen"), (rows.REPLAY, "cen"), (rows.PARAPHRASE, "cen"),
    (rows.NN_IN_POOL, "cen"), (rows.GAP, "cen"), (rows.GREEDY, "cen"), (rows.BEST, "cen"),
    (Row("K", "K", "centred_eval.K"), ""), (rows.RETRIEVAL, "cen"), (rows.SLOPE, "cen"), (rows.SPEARMAN, ""),
)  # fmt: skip
# What seeds are compared by; centred, ``corrected``.
OVER_SEEDS = (rows.PARAPHRASE, rows.GREEDY, rows.GREEDY_MINUS_OTHERS, rows.BEST, rows.BEST_MINUS_UNRELATED, rows.SLOPE,
              rows.RETRIEVAL)  # fmt: skip


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
    """Published · paper protocol · corrected, of each row and kind."""
    stated, table = published(SECTION_11), []
    for row, kind in shown:
        path, digits = row.published_path.format(kind=kind), {MU_NORM.key: 1, NULL_SIZE.key: 0}.get(row.key, 3)
        label = _with_kind(row, kind) if kind_in_label else row.title
        ours = [with_interval(results.column(row.file, p), row.at(kind), digits) for p in ("paper", "corrected")]
        table.append((label, number(look_up(stated, path) if path else None, digits), *ours))
    columns = ["row", PUBLISHED, "paper protocol", "corrected"]
    return pd.DataFrame(table, columns=columns).set_index("row")


def _with_kind(row: Row, kind: str) -> str:
    return f"{row.title}, {'raw' if kind == 'raw' else 'centred'}" if kind else row.title


def ceilings_table(results: RunResults, kind: str) -> pd.DataFrame:
    """Ceilings (§11; PROTOCOL.md §5)."""
    return _side_by_side([(row, kind) for row in rows.CEILINGS], results)


def both_kinds_table(shown: Sequence[Row], results: RunResults) -> pd.DataFrame:
    """Published · paper protocol · corrected, each raw and centred. Of tails, probes and other controls the paper prints
    nothing."""
    made = {kind: _side_by_side([(row, kind) for row in shown], results) for kind in ("raw", "cen")}
    table = pd.DataFrame({
        f"{column.replace(PUBLISHED, 'published')}, {word}": made[kind][column]
        for column in made["raw"].columns for kind, word in (("raw", "raw"), ("cen", "centred"))
    })  # fmt: skip
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
        {"row": row.title, PUBLISHED: number(look_up(stated, row.published_path) if row.published_path else None, 2),
         "paper protocol": rho(results, "paper", row), "corrected": rho(results, "corrected", row)}
        for row in rows.RHO
    ]  # fmt: skip
    return pd.DataFrame(table).set_index("row")


def rho(results: RunResults, protocol: str, row: Row) -> str:
    """ρ with its interval; a dash where there is none, or where ceiling − floor, between the ends of their intervals,
    may be zero."""
    scale = results.column(rows.CEILING_FILE, protocol)
    if protocol == "paper":
        divisor = f"{results.spec.ceiling}_cen_fve_mean"
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
        table.insert(table.columns.get_loc(column) + 1, RELEASED + kind, theirs[f"paper protocol{kind}"])
    return table


def headline_table(results: RunResults) -> pd.DataFrame:
    """The numbers of §11's summary."""
    return _side_by_side([(MU_NORM, ""), *HEADLINE], results, kind_in_label=True)


def k_curve_table(results: RunResults) -> pd.DataFrame:
    """Centred K-curve: published · first-K' under ``paper`` · exact under ``corrected`` · its nulls."""
    stated = k_curve(SECTION_11)
    paper, corrected = results.column("rerank_eval", "paper"), results.column("rerank_eval", "corrected")
    columns = (
        ("paper protocol", paper, rows.CURVE, rows.SLOPE),
        ("control: unrelated text, paper protocol", paper, rows.CURVE_UNRELATED, rows.SLOPE_UNRELATED),
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
    """The published three beside every run, one column each; runs under the paper protocol."""
    table: dict[str, dict[str, str]] = {}
    labels = {(row, kind): _with_kind(row, kind) for row, kind in SIDE_BY_SIDE}
    for name in BACKBONES:
        record = published(name)
        table[f"{TITLES[name]}, published"] = {"layer / blocks": f"{record['layer']} / {record['num_layers']}"} | {
            label: _plain(look_up(record, row.published_path.format(kind=kind))) for (row, kind), label in labels.items()
        }
    for results in everything:
        blocks = {"layer / blocks": f"{results.layer} / {results.data['targets']['num_layers']}"}
        table[f"{results.title}, paper protocol"] = blocks | {
            label: _plain(results.column(row.file, "paper").get(row.at(kind))) for (row, kind), label in labels.items()
        }
    return pd.DataFrame(table)


def published_null_table(released: Mapping[str, RunResults]) -> pd.DataFrame:
    """The paper's best of K beside the best of as many unrelated texts, interpolated from the paper's own rows; right of them,
    measured by us under the paper protocol, where there is a run of a ``released`` AV, by the name of its published record."""
    k_of = {name: published(name)["centred_eval"]["K"] for name in BACKBONES}
    found = [(TITLES[name], k, *published_null(name, k), "") for name, k in k_of.items()]
    found += [(*later, "at most ") for later in later_nulls()]
    table = [
        {"backbone": title, "K": str(k), "best of K rollouts": number(rollouts),
         "best of K unrelated texts": ("at least " if bound else "") + number(null),
         "difference": f"{bound}{rollouts - null:+.3f}"}
        for title, k, null, rollouts, bound in found
    ]  # fmt: skip
    made = pd.DataFrame(table).set_index("backbone")
    for name, results in released.items():
        column = results.column(rows.EVALUATION_FILE, "paper")
        best, null = (with_interval(column, row.cen) for row in (rows.BEST, rows.UNRELATED))
        made.loc[TITLES[name], RELEASED] = f"{best} against {null}, K = {column['K']}"
    return made.fillna(number(None))


def null_mismatch(results: RunResults) -> float:
    """How far the null that is read off NN-in-pool and NN-retrieval, as of the paper's rows, lies above the measured best of
    K unrelated texts that are encoded as rollouts are: centred, paper protocol."""
    scale, column = (results.column(name, "paper") for name in (rows.CEILING_FILE, rows.EVALUATION_FILE))
    sizes = results.data["targets"]["sizes"]
    points = {sizes["M"] - 1: scale[rows.NN_IN_POOL.cen], sizes["pool"]: column[rows.RETRIEVAL.cen]}
    return null_at(points, column["K"]) - column[rows.UNRELATED.cen]


def null_encoding(results: RunResults) -> float:
    """How much higher the best of K unrelated texts scores behind BOS than without it, on the same held-out targets, centred."""
    behind, without = (results.column(rows.EVALUATION_FILE, p)[rows.UNRELATED.cen] for p in ("corrected", "paper_on_held_out"))
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
    "&": r"\&", "%": r"\%", "_": r"\_", "<": "$<$", ">": "$>$", "‖": r"$\|$", "μ": r"$\mu$", "ρ": r"$\rho$",
    "−": "$-$", "–": "--", "·": r"$\cdot$", "²": "$^2$", "₂": "$_2$", "§": r"\S{}", "’": "'",
    "→": r"$\rightarrow$", "½": r"$\frac12$", "ĥ": r"$\hat h$", "×": r"$\times$", "≤": r"$\leq$", "#": r"\#",
    "\u00a0": "~", "“": "``", "”": "\'\'", "λ": r"$\lambda$", "Δ": r"$\Delta$", "…": r"\ldots{}", "±": r"$\pm$", "ℓ": r"$\ell$",
}  # fmt: skip


def tex(text: object) -> str:
    """Plain text for LaTeX, in ASCII; `code` becomes typewriter."""
    # An interval is not broken over two lines.
    parts = re.sub(r"\[([-+\d.]+), ([-+\d.]+)\]", "[\\1,\u00a0\\2]", str(text)).split("`")
    escaped = ["".join(TEX.get(c, c) for c in part) for part in parts]
    return "".join(rf"\texttt{{{part}}}" if i % 2 else part for i, part in enumerate(escaped))
