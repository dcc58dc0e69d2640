"""What was found: rows with intervals, bits and p-values, as a table, JSON, Parquet, a page and a picture."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import jinja2
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from nla_extensions.scoring.page import cell
from nla_utils import metrics
from nla_utils.report.tables import bits_cell
from nla_utils.store import atomic_write

LEVEL = 0.05
# p-values by their null: what it is called, and what its number of texts or writers is.
NULLS = {"law": ("rank among unrelated texts", "P"), "writer": ("texts of other vectors", "J")}
# The key of what is said once, among the metadata of the Parquet file.
RECORD = b"nla_scores"


@dataclass(frozen=True)
class Measured:
    """A row of the table: numbers per vector (M,), and of what they stand beside; ``key`` is the name in JSON."""

    key: str
    label: str
    own_M: np.ndarray
    against: str = ""
    other_M: Optional[np.ndarray] = None

    def record(self) -> dict:
        """Means with their 95 % intervals over vectors, and of the paired difference."""
        found = {"label": self.label, "against": self.against or None} | _mean("value", self.own_M)
        if self.other_M is not None:
            found |= _mean("null", self.other_M) | _mean("difference", self.own_M - self.other_M)
        return found


def _mean(name: str, values_M: np.ndarray) -> dict:
    value, ends = metrics.mean(values_M) if np.isfinite(values_M).any() else (np.nan, [np.nan, np.nan])
    # One vector has no interval.
    known = len(values_M) > 1 and np.isfinite(ends).all()
    return {name: float(value) if np.isfinite(value) else None, f"{name}_ci95": ends if known else None}


@dataclass
class Scores:
    """What :func:`score` found: ``rows`` of the table; ``bits`` at ``k`` (value, interval, by rank), ``None`` where
    texts were searched for; the exact curve ``curve`` (J, 2) at ``ks``, of the texts and of unrelated ones; ``texts``,
    a row each; ``vectors``, a row each, with p-values; ``notes``: what a reader should know of them."""

    method: str
    about: dict
    provenance: dict
    k: int
    counts: list[int]
    rows: list[Measured]
    bits: Optional[dict]
    ks: list[int]
    curve: np.ndarray
    curve_ci95: np.ndarray
    texts: pd.DataFrame
    vectors: pd.DataFrame
    discoveries: dict
    notes: list[str] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """Rows with their nulls and paired differences, 95 % intervals over vectors in brackets."""
        rows = [row.record() for row in self.rows]
        shown = {"value": "value", "null": "beside it", "difference": "difference"}
        cells = [{name: cell(row, which) for which, name in shown.items()} for row in rows]
        made = pd.DataFrame(cells, index=pd.Index([row["label"] for row in rows], name=self.method))
        return made.assign(**{"which is": [row["against"] or "–" for row in rows]})

    def record(self) -> dict:
        """All of it but texts and provenance, as JSON holds it."""
        return {
            "method": self.method,
            **self.about,
            "K": self.k,
            "uneven": len(set(self.counts)) > 1,
            "rows": {row.key: row.record() for row in self.rows},
            "bits": self.bits,
            "curve": {"k": self.ks, "texts": self.curve[:, 0].tolist(), "unrelated": self.curve[:, 1].tolist()},
            "vectors": self.vectors.to_dict("list"),
            "discoveries": self.discoveries,
            "notes": self.notes,
        }

    def to_parquet(self, path: str | Path) -> None:
        """One row a text, with its vector's p-values; what is said once is JSON among the file's metadata. Raises
        ``ArtefactError`` where it cannot be written, as :meth:`to_html` does."""
        table = pa.Table.from_pandas(self.texts.merge(self.vectors, on="id"), preserve_index=False)
        record = json.dumps(self.provenance | self.record(), ensure_ascii=False, allow_nan=False)
        buffer = io.BytesIO()
        pq.write_table(table.replace_schema_metadata({**table.schema.metadata, RECORD: record}), buffer)
        atomic_write(Path(path), buffer.getvalue())

    def to_html(self, path: str | Path) -> None:
        """One self-contained page: the table, the curve, and texts of the worst vector, the best and five others."""
        picture = io.StringIO()
        self.plot().savefig(picture, format="svg")
        best = self.texts[self.texts["best"]]
        order = best["score"].to_numpy().argsort()
        others = np.random.default_rng(0).permutation(order[1:-1])[:5]
        chosen = {"the worst": order[:1], "the best": order[-1:], "at random": others}
        shown = [(why, best.iloc[i].to_dict()) for why, at in chosen.items() for i in at[: len(order)]]
        source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
        values = {"table": self.table().to_html(border=0), "bits": self.bits_line(), "plot": picture.getvalue()}
        page = jinja2.Template(source, autoescape=True).render(scores=self, shown=shown, **values)
        atomic_write(Path(path), page.encode())

    def bits_line(self) -> str:
        """Bits at k, pool P, and what they can at most be, in one line."""
        if self.bits is None:
            return "the texts were searched for: no bits, no p-values"
        p, b = self.about["P"], self.bits
        by_rank = "" if b["by_rank"] is None else f", {b['by_rank']:.1f} by rank"
        said = bits_cell(b["value"], b["ci95"], self.k, p)
        return f"bits at {self.k}, {p:,} unrelated texts: {said}{by_rank}; at most {b['limits'][1]:.1f}"

    def p_lines(self) -> list[str]:
        """How many vectors have a text that is not chance, and how large the null would have to be for one."""
        lines = []
        for name, found in self.discoveries.items():
            null, what = NULLS[name]
            counts = f"{found['BH']} (Benjamini–Hochberg), {found['BY']} (Benjamini–Yekutieli)"
            lines.append(
                f"p by {null}: {counts} of {self.about['M']} at a false discovery rate of {LEVEL}; the smallest p is "
                f"{found['smallest']:.2g}, a single discovery needs {what} ≥ {found[f'{what}_for_one']:,}"
            )
        return lines

    def plot(self):
        """The K-curve beside that of unrelated texts, as a matplotlib figure."""
        from nla_utils.report import figures as of

        @of.styled
        def draw():
            fig, ax = of.plt.subplots(figsize=(of.WIDTH / 2, 2.6), layout="constrained")
            for j, (label, color) in enumerate(((self.method, of.COLOURS["gemma3-270m"]), ("unrelated", of.NULL_GREY))):
                ax.plot(self.ks, self.curve[:, j], "o-", color=color)
                ax.fill_between(self.ks, *self.curve_ci95[:, j].T, color=color, alpha=0.2, lw=0)
                ax.annotate(label, (self.ks[-1], self.curve[-1, j]), xytext=(4, 0), textcoords="offset points")
            of.log2_k_axis(ax, self.ks)
            of.style(ax, "K", "centred score, best of K")
            of.plt.close(fig)
            return fig

        return draw()
