"""``paper/requantized.md``: our numbers where the weights are quantized once more, from JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Iterable, Sequence

import pandas as pd

from nla_extensions.pages import page
from nla_utils import rows
from nla_utils.report.pages import Page, Table
from nla_utils.report.results import COMMITTED, RunResults, find_results
from nla_utils.report.tables import number, with_interval

# The results file of `nla requantize`.
RESULTS = "requantized"
# Kinds of GGUF that weights are rounded to once more, and what tables call them. The first is a control: nothing is
# rounded, everything is read again.
NONE = "none"
KINDS = {NONE: "as they are, read again", "Q8_0": "8 bits (Q8_0)", "Q4_0": "4 bits (Q4_0)"}
MARGINS = (
    *(rows.PARAPHRASE_MINUS_UNRELATED, rows.GREEDY_MINUS_OTHERS, rows.BEST_MINUS_OTHERS),
    *(rows.BEST_MINUS_UNRELATED, rows.GREEDY_MINUS_RETRIEVAL),
)
ROWS = (
    *(rows.REPLAY, rows.FLOOR, rows.RETRIEVAL, rows.UNRELATED, rows.UNRELATED_8, rows.PARAPHRASE),
    *(rows.GREEDY, rows.SAMPLED, rows.BEST, rows.LONGEST_PROBE, *MARGINS),
)
BITS = tuple(of.row for of in rows.BITS if of.of in (rows.GREEDY, rows.BEST, rows.LONGEST_PROBE, rows.PARAPHRASE))


def changed_sides(results: RunResults, kind: str) -> list[str]:
    """Margins whose interval holds 0 in the run and not in the requantized model, or the other way round."""
    now = results.optional(RESULTS)["kinds"][kind]
    ends = {row.label: [of["ci95"][row.cen] for of in (results.of(row), now)] for row in MARGINS}
    return [label for label, both in ends.items() if len({low <= 0 <= high for low, high in both}) > 1]


def weights_table(shown: Sequence[RunResults]) -> pd.DataFrame:
    """By backbone and kind: how far the weights and v have moved, replay, and the largest changes of scores, of margins
    and of bits."""
    table = []
    for results in shown:
        for kind, found in results.optional(RESULTS)["kinds"].items():
            weights, v = ([number(x, digits) for x in found[of].values()] for of, digits in (("weights", 3), ("v", 4)))
            largest = [
                number(max((found[f"{row.cen}_change"] for row in of), key=abs), digits, "+")
                for of, digits in (([r for r in ROWS if r not in MARGINS], 3), (MARGINS, 3), (BITS, 2))
            ]
            label, replay = f"{results.spec.shown}: {KINDS[kind]}", number(found[rows.REPLAY.cen], 4)
            sides = ", ".join(changed_sides(results, kind)) or "none"
            table.append([label, *weights, *v, replay, *largest, sides])
    columns = ["weights", "relative change, embedding", "linear maps", "all", "v against v: mean"]
    columns += ["own μ: mean", "worst", "own μ: worst", "replay"]
    columns += [f"largest change of a {of}" for of in ("score", "margin", "figure in bits")]
    columns.append("margins whose interval holds 0 in one of the two alone")
    return pd.DataFrame(table, columns=columns).set_index(columns[0])


def changes_table(results: RunResults) -> pd.DataFrame:
    """Each row as the run has it, and its change where the same texts are judged by the requantized model."""
    found = results.optional(RESULTS)["kinds"]
    table = []
    for row in (*ROWS, *BITS):
        label, digits = (f"bits, {row.label}", 2) if row in BITS else (row.title, 3)
        cells = [with_interval(of, f"{row.cen}_change", digits, "+") for of in found.values()]
        table.append([label, with_interval(results.of(row), row.cen, digits, "+" if row in MARGINS else ""), *cells])
    columns = ["held out, centred", "as in the run", *(f"change: {KINDS[kind]}" for kind in found)]
    return pd.DataFrame(table, columns=columns).set_index(columns[0])


def requantized_page(roots: Iterable[Path] = (COMMITTED,)) -> Page:
    """The page of the results below ``roots``."""
    everything = find_results(roots)
    shown = [r for r in everything if r.optional(RESULTS)]
    moved = {"moved": Table("requantized", "How far weights and v move", weights_table(shown))} if shown else {}
    caption = "What the run's numbers change by"
    of_runs = {r.label: [Table(f"{r.stem}-{RESULTS}", caption, changes_table(r), of=r.label)] for r in shown}
    return page("requantized", everything, (RESULTS,), shown, {}, moved, of_runs)
