"""Pages of the paper folder: a template filled with tables, figures and a few numbers, all from results files."""

from __future__ import annotations

import os
import re
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Mapping, Optional, Sequence

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from nla_utils.artefacts import atomic_write
from nla_utils.config import ROOT
from nla_utils.paper.draw import styled
from nla_utils.paper.results import RunResults, device_of
from nla_utils.paper.tables import latex, markdown, tex

FIGURES = ROOT / "figures"


# A citation in prose: ``@[key]``, a key of ``references.toml``.
CITATION = re.compile(r"@\[(\w+)\]")


def references() -> dict[str, dict]:
    """What the section cites, by key."""
    return tomllib.loads(Path(__file__).with_name("references.toml").read_text(encoding="utf-8"))


def cite(text: str) -> str:
    """Citations of a text as Markdown links."""
    found = references()

    def link(match: re.Match) -> str:
        work = found[match[1]]
        return f"([{work['authors']}, {work['year']}]({work['url']}))"

    return CITATION.sub(link, text)


def cite_tex(text: str) -> str:
    """Plain text for LaTeX, its citations as ``\\cite``."""
    return CITATION.sub(r"\\cite{\1}", tex(text))


@dataclass(frozen=True)
class Table:
    """A generated table: file stem, caption, contents, the widths of its columns where it has to wrap in print, the
    run that it is of, which its files name, and whether it may be longer than a page."""

    stem: str
    caption: str
    frame: pd.DataFrame
    widths: tuple[float, ...] = ()
    of: str = ""
    long: bool = False

    @property
    def markdown(self) -> str:
        return markdown(self.frame)

    @property
    def files(self) -> dict[str, str]:
        """What its files hold, by their ending."""
        caption = f"{self.caption}. {self.of}" if self.of else self.caption
        head = f"*{caption}*\n\n" if self.of else ""
        return {"md": head + self.markdown, "tex": latex(self.frame, caption, f"tab:{self.stem}", self.widths, self.long)}


@dataclass(frozen=True)
class FigureSpec:
    """A generated figure: file stem, how it is drawn from results, what it shows."""

    stem: str
    draw: Callable[[Sequence[RunResults]], Figure]
    caption: str


def _fill(text: str) -> str:
    """Prose in lines of 140, links in one piece."""
    return textwrap.fill(cite(text), 140, break_long_words=False, break_on_hyphens=False)


def render(template: str, **values: object) -> str:
    """A file of ``paper/templates`` of the package, filled; a value that it asks for and does not get is an error."""
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"), encoding="utf-8")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
                                     undefined=jinja2.StrictUndefined)  # fmt: skip
    environment.filters |= {"tex": cite_tex, "fill": _fill}
    return environment.get_template(template).render(**values)


@dataclass(frozen=True)
class Page:
    """A page before it is written: ``template`` names a file in ``paper/templates`` of the package, ``figures`` has the
    results that each is drawn from, ``values`` is what else the template may show, and ``tex_template`` the template of
    the same page for LaTeX, if it is to be printed."""

    path: Path
    template: str
    tables: Sequence[Table]
    figures: Mapping[FigureSpec, Sequence[RunResults]]
    values: Mapping[str, object]
    tex_template: Optional[str] = None

    def text(self, path: Optional[Path] = None, figure_folder: Path = FIGURES) -> str:
        """The page as Markdown; figures are named relative to ``path``."""
        where = Path(os.path.relpath(figure_folder, (path or self.path).parent))
        shown = [(spec.caption, (where / f"{spec.stem}.png").as_posix()) for spec in self.figures]
        return render(self.template, figures=shown, **self.values)

    def tex(self, path: Path, figure_folder: Path = FIGURES) -> str:
        """The page for LaTeX: tables are read from ``tables`` beside it, figures from their folder as PDF."""
        where = Path(os.path.relpath(figure_folder, path.parent)).as_posix()
        return render(self.tex_template, figures=self.figures, figure_folder=where, **self.values)

    def write(self, path: Optional[Path] = None, figure_folder: Path = FIGURES) -> list[Path]:
        """Write the page, its tables (Markdown and LaTeX, in ``tables`` beside it) and its figures (PNG and PDF).

        Returns what was written, the page first.
        """
        path = path or self.path
        written = [path]
        for table in self.tables:
            for end, text in table.files.items():
                written.append(path.parent / "tables" / f"{table.stem}.{end}")
                atomic_write(written[-1], text.encode())
        for spec, shown in self.figures.items():
            written += save_figure(spec.draw(shown), figure_folder, spec.stem)
        atomic_write(path, self.text(path, figure_folder).encode())
        if self.tex_template:
            written.append(path.with_suffix(".tex"))
            atomic_write(written[-1], self.tex(path, figure_folder).encode())
        return written


@styled
def save_figure(fig: Figure, folder: Path, name: str) -> list[Path]:
    """Write PNG to look at and PDF for LaTeX, without dates, so that equal figures are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    fig.savefig(paths[0], dpi=160, metadata={"Software": None})
    fig.savefig(paths[1], metadata={"CreationDate": None, "Producer": None, "Creator": None})
    plt.close(fig)
    return paths


def provenance(everything: Sequence[RunResults], names: Sequence[str]) -> Table:
    """Which file each number comes from, what that was made from, and the commit of the code that wrote it."""
    table = []
    for results in everything:
        for name in names:
            data = results.optional(name)
            if data is None:
                continue
            identity, code = data["identity"], data["code"]
            table.append({
                "results file": f"{results.backbone}/{results.profile}/{name}.json",
                "sha256": results.sha256(name)[:16],
                "made from": ", ".join(f"{k} {v[:12]}" for k, v in data["made_from"].items()),
                "git commit": (code["git_commit"] or "–")[:12] + (" + changes" if code["dirty"] else ""),
                "written on": f"{device_of(data)}, {identity['dtype']}, torch {data['libraries']['torch']}",
            })  # fmt: skip
    columns = ["results file", "sha256", "made from", "git commit", "written on"]
    return Table("provenance", "Where each number comes from", pd.DataFrame(table, columns=columns).set_index(columns[0]))
