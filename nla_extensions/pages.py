"""What the pages beside §11 have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Mapping, Sequence

from nla_utils.config import ROOT
from nla_utils.report.pages import FigureSpec, Page, Table, provenance
from nla_utils.report.results import RunResults, weights_note


def page(
    name: str,
    everything: Sequence[RunResults],
    files: Sequence[str],
    shown: Sequence[RunResults],
    figures: Mapping[FigureSpec, Sequence[RunResults]],
    tables: Mapping[str, Table],
    of_runs: Mapping[str, Sequence[Table]],
    **values: object,
) -> Page:
    """``paper/{name}.md`` of the runs ``shown``: ``tables`` by their name in the template, those of runs by title, the
    figures that there are results for, and where the ``files`` of ``everything`` come from."""
    values |= {**tables, "of_runs": of_runs, "weights": weights_note(shown)}
    values["provenance"] = provenance(everything, files)
    made = [*tables.values(), *(table for of_run in of_runs.values() for table in of_run)]
    drawn = {spec: results for spec, results in figures.items() if results}
    template = Path(__file__).with_name("templates") / f"{name}.md.j2"
    return Page(ROOT / "paper" / f"{name}.md", template, made, drawn, values)
