"""A run compared with the committed run of the same name: each row, its difference, and whether the two agree.

Two values agree if they differ by at most 2√2 times the row's standard deviation over seeds, or by less than tables show:
a replay that is 1 for every seed has no spread, and another CPU gives 0.99999. That deviation is data: measured once, kept
in ``paper/seed_spread.json`` with the runs that it is of. A row without one is not judged.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Optional, Sequence

import pandas as pd

from nla_utils.artefacts import atomic_write, read_record, write_record
from nla_utils.config import ROOT
from nla_utils.errors import ConfigError
from nla_utils.paper.pages import render
from nla_utils.paper.results import COMMITTED, NAMES, RunResults, load_results
from nla_utils.paper.tables import markdown, with_interval
from nla_utils.scores import rows

SPREAD = ROOT / "paper" / "seed_spread.json"
# The difference of two independent draws has √2 times the deviation of one; twice that is allowed.
ALLOWED = 2 * math.sqrt(2)
# Half of the last digit that tables show.
SHOWN = 0.0005
NATS = "nats a token"
# The rows of the section's tables, centred, under both protocols; of the K-curve its slope and its last point.
COMPARED = {
    "ceilings": (*rows.CEILINGS, rows.GAP, rows.PARAPHRASE_MINUS_UNRELATED),
    "evaluation": (*rows.EVALUATION, rows.CONSTANT_MU, rows.IDENTIFIED),
    "difference": rows.DIFFERENCES,
    "ρ": rows.RHO,
    "rerank": (rows.LOGP_RERANK, rows.LOGP_MINUS_GREEDY, rows.ANCHOR_RERANK, rows.ANCHOR_MINUS_GREEDY, rows.ANCHOR,
               rows.MEAN_LOGP, rows.SPEARMAN),
    "best of K": (rows.SLOPE, rows.SLOPE_UNRELATED, rows.SLOPE_OTHERS, rows.SLOPE_MINUS_UNRELATED),
    NATS: (*rows.NATS, *rows.NATS_GAINED),
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One row of two runs. ``difference`` is ``None`` where this run lacks the row; ``allowed`` is how much the two may
    differ, ``None`` where that was not measured."""

    label: str
    committed: str
    here: str
    difference: Optional[float]
    allowed: Optional[float]

    @property
    def agrees(self) -> Optional[bool]:
        """Whether the difference is allowed; ``None`` where that cannot be judged."""
        return None if None in (self.difference, self.allowed) else abs(self.difference) <= self.allowed

    @property
    def cells(self) -> dict[str, str]:
        """The row as a table shows it."""
        difference = "–" if self.difference is None else f"{self.difference:+.2g}"
        allowed = "–" if self.allowed is None else f"{self.allowed:.2g}"
        return {"row": self.label, "committed": self.committed, "here": self.here, "difference": difference,
                "allowed": allowed, "agrees": {None: "–", True: "yes", False: "no"}[self.agrees]}  # fmt: skip


def columns(results: RunResults) -> dict[tuple[str, str], tuple[str, dict]]:
    """By (protocol, key) of each compared row that the results have: its label, and the column that holds it."""
    found = {}
    for group, of_group in COMPARED.items():
        for row in of_group:
            for protocol in ("paper", "corrected"):
                column = (results.source_loss or {}) if group == NATS else results.column(row.file, protocol)
                if column.get(row.cen) is not None and column["protocol"] == protocol:
                    found[protocol, row.cen] = f"{group}: {row.label} ({protocol})", column
    return found


def compare(own: RunResults, kept: RunResults, deviations: Mapping[str, Mapping[str, float]]) -> list[Compared]:
    """The committed run's rows; ``deviations`` is ``{protocol: {key: standard deviation over seeds}}``."""
    here, made = columns(own), []
    for (protocol, key), (label, column) in columns(kept).items():
        mine, deviation = here.get((protocol, key), ("", {}))[1], deviations.get(protocol, {}).get(key)
        difference = mine[key] - column[key] if mine else None
        allowed = None if deviation is None else max(ALLOWED * deviation, SHOWN)
        made.append(Compared(label, with_interval(column, key), with_interval(mine, key), difference, allowed))
    return made


def verdict(compared: Sequence[Compared]) -> str:
    """``31 of 33 rows agree; 2 differ: …``, and how many more are not judged."""
    judged = [c for c in compared if c.agrees is not None]
    differ = [c.label for c in judged if not c.agrees]
    said = [f"{len(judged) - len(differ)} of {len(judged)} rows agree"] if judged else []
    if differ:
        said.append(f"{len(differ)} differ{'s' if len(differ) == 1 else ''}: {', '.join(differ)}")
    if len(judged) < len(compared):
        said.append(f"{len(compared) - len(judged)} not judged: no spread over seeds was measured, or this run lacks the row")
    return "; ".join(said)


def made_differently(own: RunResults, kept: RunResults) -> list[str]:
    """What differs in how the two runs were made, as their records say: hardware, identity, libraries, code."""
    there, here = (
        {"hardware": r.get("hardware", "not recorded"), **r["identity"], **r["libraries"], "code": r["code"]["git_commit"]}
        for r in (kept.data["centered_eval"], own.data["centered_eval"])
    )
    return [f"{name} {there.get(name)} → {value}" for name, value in here.items() if there.get(name) != value]


def write_reproduction(folder: Path) -> Optional[str]:
    """Write ``reproduction.md`` into a run's folder; returns its text, or ``None`` where there is nothing to compare."""
    own, kept = load_results(folder), load_results(COMMITTED / folder.parent.name / folder.name)
    if own is None or kept is None:
        return None
    spread = read_record(SPREAD) if SPREAD.exists() else {}
    measured = (spread.get("backbone"), spread.get("profile")) == (kept.backbone, kept.profile)
    compared = compare(own, kept, spread["deviations"] if measured else {})
    table = markdown(pd.DataFrame([c.cells for c in compared]).set_index("row"))
    text = render("reproduction.md.j2", title=own.title, table=table,
                  seeds=len(spread["seeds"]) if measured else 0, differ=any(c.agrees is False for c in compared),
                  reasons="; ".join(made_differently(own, kept)), verdict=verdict(compared))  # fmt: skip
    atomic_write(folder / "reproduction.md", text.encode())
    return text


def write_spread(runs: Sequence[RunResults], path: Path) -> Path:
    """Write each row's standard deviation (of n − 1) over runs of as many seeds, the committed run first.

    Raises ``ConfigError`` unless these are three runs or more that differ in the seed alone.
    """
    identities = [r.data["targets"]["identity"] for r in runs]
    # Of what all of them record: older ones have the device in their identity, and no format.
    keys = set.intersection(*map(set, identities)) - {"seed", "device"}
    alike = [[{k: identity[k] for k in keys}, r.family] for identity, r in zip(identities, runs)]
    if len({r.seed for r in runs}) != len(runs) or len(runs) < 3 or any(a != alike[0] for a in alike):
        titles = ", ".join(r.title for r in runs)
        raise ConfigError(f"{titles}: a spread needs three runs or more, alike but for the seed")
    found = [columns(r) for r in runs]
    deviations: dict[str, dict[str, float]] = {}
    for protocol, key in found[0]:
        if all((protocol, key) in f for f in found):
            values = [f[protocol, key][1][key] for f in found]
            deviations.setdefault(protocol, {})[key] = statistics.stdev(values)
    seeds = [
        {k: r.data["centered_eval"].get(k) for k in ("identity", "hardware", "libraries", "code")}
        | {"sha256": {name: r.sha256(name) for name in NAMES}}
        for r in runs
    ]
    record = {"backbone": runs[0].backbone, "profile": runs[0].profile, "seeds": seeds, "deviations": deviations}
    write_record(path, record)
    return path
