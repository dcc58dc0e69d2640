"""Pages of the paper folder: a template filled with tables, figures and a few numbers, all from results files."""

from __future__ import annotations

import math
import os
import re
import statistics
import textwrap
import tomllib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Mapping, Optional, Sequence

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from nla_utils import rows
from nla_utils.config import ROOT
from nla_utils.errors import ConfigError
from nla_utils.report import claims, figures, tables
from nla_utils.report.claims import (
    ITERATION,
    STUDY,
    YES,
    decide,
    easy_table,
    findings_table,
    iteration_table,
    reading_table,
    study_table,
    verdict_counts,
)
from nla_utils.report.figures import styled
from nla_utils.report.results import (
    BACKBONES,
    COMMITTED,
    NAMES,
    POOL,
    SECTION_11,
    TARGETS,
    TITLES,
    RunResults,
    card,
    device_of,
    find_results,
    foremost,
    largest,
    load_results,
    published,
    published_null,
    weights_note,
    without_variants,
)
from nla_utils.report.tables import (
    audit_of_all,
    audit_table,
    facts_table,
    latex,
    markdown,
    released_runs,
    released_table,
    slips_table,
    tex,
    with_interval,
)
from nla_utils.store import atomic_write, read_record, write_record

FIGURES = ROOT / "figures"
TEMPLATES = Path(__file__).with_name("templates")


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
        return {
            "md": head + self.markdown,
            "tex": latex(self.frame, caption, f"tab:{self.stem}", self.widths, self.long),
        }


@dataclass(frozen=True)
class FigureSpec:
    """A generated figure: file stem, how it is drawn from results, what it shows."""

    stem: str
    draw: Callable[[Sequence[RunResults]], Figure]
    caption: str


def _fill(text: str) -> str:
    """Prose in lines of 140, links in one piece."""
    return textwrap.fill(cite(text), 140, break_long_words=False, break_on_hyphens=False)


def render(template: Path, **values: object) -> str:
    """A template, filled; a value that it asks for and does not get is an error."""
    loader = jinja2.FileSystemLoader(template.parent, encoding="utf-8")
    environment = jinja2.Environment(
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"tex": cite_tex, "fill": _fill}
    return environment.get_template(template.name).render(**values)


@dataclass(frozen=True)
class Page:
    """A page before it is written: ``template`` is a Jinja file, ``figures`` has the results that each is drawn from, ``values`` is what else the template may show, and ``tex_template`` the template of
    the same page for LaTeX, if it is to be printed."""

    path: Path
    template: Path
    tables: Sequence[Table]
    figures: Mapping[FigureSpec, Sequence[RunResults]]
    values: Mapping[str, object]
    tex_template: Optional[Path] = None

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
            table.append(
                {
                    "results file": f"{results.backbone}/{results.profile}/{name}.json",
                    "sha256": results.sha256(name)[:16],
                    "made from": ", ".join(f"{k} {v[:12]}" for k, v in data["made_from"].items()),
                    "git commit": (code["git_commit"] or "–")[:12] + (" + changes" if code["dirty"] else ""),
                    "written on": f"{device_of(data)}, {identity['dtype']}, torch {data['libraries']['torch']}",
                }
            )
    columns = ["results file", "sha256", "made from", "git commit", "written on"]
    return Table(
        "provenance", "Where each number comes from", pd.DataFrame(table, columns=columns).set_index(columns[0])
    )


SECTION = ROOT / "paper" / "section11.md"
FIGURE_1 = FigureSpec(
    "fig1_k_curves",
    figures.figure_1,
    "The best of K texts, centred. Above, as published: curves with their ceilings (dashed) and floors (dotted). Diamonds "
    "are the headline best of K, of another evaluation than the curve: Qwen's is of the final checkpoint, its curve of an "
    "earlier one; Llama's has fewer targets, and its ceiling is NN-in-pool, that of the others the best of eight "
    "paraphrases. Of gemma-4 only the triangles are printed. The paper prints no intervals. "
    "Below, ours, held out and corrected: the rise with K is there for texts that have nothing to do with v. Two such nulls "
    "lie close together: unrelated texts (wide pale line) and the AV's rollouts of other targets (dots). What the AV adds is "
    "its distance from them. The best of eight paraphrases and the nearest stored text are levels, not curves. Bands are "
    "95 % intervals over targets.",
)
READING = FigureSpec(
    "fig8_reading",
    figures.figure_reading,
    "What v saves the AV, in nats a token, while it is trained: against the v of another target, and against the mean μ. "
    "Above zero it reads v. Lines are validation texts; their spread was not kept, so they have no intervals. Marks with a "
    "black edge are the kept AV on the held-out targets, with 95 % intervals over targets.",
)
# Widths of a label, a published and two columns with intervals; and of a label and three pairs, raw and centred.
NARROW, WIDE = (28, 13, 25, 25), (17, 9, 9, 13, 13, 13, 13)
# The same with a column, or a pair, of the released AV.
NARROW_RELEASED, WIDE_RELEASED = (24, 10, 20, 20, 20), (13, 7, 7, 11, 11, 11, 11, 11, 11)


def tables_of_run(results: RunResults, released: Optional[RunResults] = None) -> dict[str, Table]:
    """The tables of §11 and the scorecard for one run, by name; with ``released``, our run of the AV that was released for
    §11's backbone, its numbers stand beside the published ones."""
    evaluated = (*rows.EVALUATION, rows.CONSTANT_MU)
    beside = released is not None and released is not results
    narrow, wide = (NARROW_RELEASED, WIDE_RELEASED) if beside else (NARROW, WIDE)
    curve = (8, 8, 15, 15, 15, 15, 15) if beside else (12, 10, 16, 17, 16, 17)

    def shown(make: Callable[[RunResults], pd.DataFrame]) -> pd.DataFrame:
        return tables.with_released(make, results, released)

    made = {
        "ceilings": ("Table 1. Ceilings", shown(partial(tables.both_kinds_table, rows.CEILINGS)), wide),
        "evaluation": ("Table 2. Evaluation", shown(partial(tables.both_kinds_table, evaluated)), wide),
        "rho-short": ("Table 3. The same as ρ, centred", shown(tables.rho_table), narrow),
        "k-curve": ("Table 4. The best of K, centred", shown(tables.short_k_curve_table), curve),
        "reranks": ("Table 5. Cheap reranks, centred", shown(tables.rerank_table), narrow),
        "verdicts": ("Scorecard", claims.short_scorecard(results), (29, 11, 11, 19, 19)),
    }
    return {key: Table(f"{results.stem}-{key}", *what, of=results.label) for key, what in made.items()}


def shared_tables(
    shown: Sequence[RunResults], about: Sequence[RunResults], released: Mapping[str, RunResults]
) -> dict[str, Table]:
    """The tables over all backbones, by name."""

    def shared(width: float) -> tuple[float, ...]:
        """A width for the columns of our backbones together."""
        return tuple(width / len(about) for _ in about)

    # A question, ours, its notebook; the label, three published backbones, ours; a slip, what it is, ours.
    found, facts, audit = (26, *shared(55), 8), (15, 9, 9, 9, *shared(42)), (15, 18, *shared(58))
    return {
        "findings": Table("findings", "What was found", findings_table(shown), found),
        "facts": Table("facts", "The backbones and the trainings", facts_table(about), facts),
        "null": Table(
            "published-null",
            "The published best of K beside the null that the paper itself prints",
            tables.published_null_table(released),
            (14, 5, 12, 14, 14, 26) if released else (20, 6, 18, 24, 20),
        ),
        "card": Table("card", "What the card says, and what is wrong with it", slips_table(about), (34, 60)),
        "audit": Table("audit", "Audit: what each slip moves", audit_of_all(about, shown), audit, long=True),
        "reading": Table("reading", "What the AV takes from v", reading_table(shown), (15, 6, 6, 14, 14, 14, 14)),
    }


def _reading_runs(measured: list[RunResults]) -> str:
    """The runs whose own v makes a source more likely than another's; their verdicts are one family."""
    gained = rows.NATS_GAINED[0].key
    words = decide({r.label: claims.claimed(r.source_loss, gained, low=0) for r in measured})
    return ", ".join(label for label, word in words.items() if word == YES)


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _how_made(results: RunResults) -> str:
    sizes = results.data["targets"]["sizes"]
    training = results.data["training"]
    machine = "a CPU" if device_of(training) == "cpu" else "a GPU"
    made = f"trained on {machine} and kept at step {training['best_step']} of {training['steps']}"
    if training.get("released"):
        made = "a released AV"
    return f"{results.name} ({results.size}, {made}, M = {sizes['M']} held-out targets with K = {sizes['K']} rollouts each)"


def said(about: Sequence[RunResults]) -> dict[str, object]:
    """The numbers of the section's sentences, as text; those of runs one after the other, always in the same order."""

    def each(text: Callable[[RunResults], str], runs: Sequence[RunResults] = about) -> str:
        found = [text(r) for r in runs]
        return listed(found[:1] if len(set(found)) == 1 else found)

    def of(row: rows.Row, protocol: str = "corrected", kind: str = "cen", show=None) -> str:
        show = show or (lambda column, key: tables.number(column[key]))
        return each(lambda r: show(r.column(row.file, protocol), row.at(kind)))

    stated, later = published(SECTION_11), published("gemma4_31b")
    nulls = {TITLES[name]: published_null(name, published(name)["centred_eval"]["K"]) for name in BACKBONES}
    least = min(best - null for null, best in nulls.values())
    read = [r for r in about if r.source_loss]
    # Whose null is read off the same points as the published one.
    same = [
        r for r in about if (r.data["targets"]["sizes"]["M"], r.data["targets"]["sizes"]["pool"]) == (TARGETS, POOL)
    ]
    return {
        "names": each(lambda r: r.name),
        "shown": each(lambda r: r.spec.shown),
        "small": all(r.spec.weights for r in about),
        "card": card(),
        "K": stated["centred_eval"]["K"],
        "margins": ", ".join(f"{best - null:+.3f} on {title}" for title, (null, best) in nulls.items()),
        "retrieval": ", ".join(
            f"{tables.number(r['best_of_k']['cen'])} against {tables.number(r['nn_retrieval']['cen'])} on {TITLES[name]}"
            for name, r in ((name, published(name)["centred_eval"]) for name in BACKBONES)
        ),
        "later": later,
        "replay": of(rows.REPLAY, "published"),
        "replay_corrected": of(rows.REPLAY),
        "best": of(rows.BEST),
        "unrelated": of(rows.UNRELATED),
        "gained": of(rows.BEST_MINUS_UNRELATED, show=tables.signed),
        "greedy": of(rows.GREEDY_MINUS_OTHERS, show=tables.signed),
        "nearest": of(rows.GREEDY_MINUS_RETRIEVAL, show=tables.signed),
        "nats": each(lambda r: tables.signed(r.source_loss, rows.NATS_GAINED[0].key), read),
        "within": bool(same) and all(0 < least < tables.null_mismatch(r) for r in same),
        "same": each(lambda r: r.name, same),
        "mismatch": each(lambda r: f"{tables.null_mismatch(r):.3f}", same),
        "encoding": each(lambda r: f"{tables.null_encoding(r):.3f}", same),
        "steps": each(lambda r: str(r.data["training"]["best_step"])),
        "undertrained": listed([r.name for r in about if r.undertrained]),
        "ks": each(lambda r: str(r.data["targets"]["sizes"]["K"])),
        "made": each(_how_made),
        "held_out": each(lambda r: str(r.data["targets"]["sizes"]["M"])),
        "mu": of(rows.CONSTANT_MU, kind="raw"),
        "best_raw": of(rows.BEST, kind="raw"),
    }


def section_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The section of the results below ``roots``: of the largest run of each backbone, or of ``own`` (backbone, profile) in
    its backbone's place, and first."""
    shown = without_variants(find_results(roots), own)
    main = foremost(shown, own)
    about = [main, *(r for r in largest(shown) if r.backbone != main.backbone)] if main else []
    of_released = released_runs(shown)
    shared = shared_tables(shown, about, of_released)
    of_runs = {r.label: tables_of_run(r, of_released.get(SECTION_11)) for r in about}
    easy = easy_table(shown)
    if not easy.empty:
        shared["easy"] = Table("easy", "Where reading is easy", easy, (22, 14, 15, 14, 14, 9))
    released = {
        name: Table(
            f"{name}-released",
            f"The released AV on {TITLES[name]}, run here",
            released_table(name, r),
            (30, 12, 28, 24),
            of=r.label,
        )
        for name, r in of_released.items()
    }
    read = [r for r in largest(shown) if r.source_loss]
    drawn = {FIGURE_1: shown} | ({READING: shown} if read else {})
    values = {
        **shared,
        "of_runs": of_runs,
        "released": released,
        "claims": [c for c in claims.CLAIMS if c.where != "control"],
        "counts": {r.label: verdict_counts(r) for r in about},
        "reads": _reading_runs(read),
        "said": said(about),
        "weights": weights_note(shown),
        "references": references(),
    }
    made = [*shared.values(), *released.values(), *(t for tables_ in of_runs.values() for t in tables_.values())]
    return Page(SECTION, TEMPLATES / "section11.md.j2", made, drawn, values, TEMPLATES / "section11.tex.j2")


APPENDIX = ROOT / "paper" / "appendix.md"
FIGURE_SPECS = (
    FigureSpec(
        "figA_k_curves_by_run",
        figures.figure_by_run,
        "K-curves of every run under both protocols, with floor, "
        "ceiling and controls, all on one scale. The two controls often coincide: dots on the wide pale line. Bands "
        "are 95 % intervals over targets.",
    ),
    FigureSpec(
        "fig2_mu_and_floor",
        figures.figure_2,
        "The score of unrelated pairs, raw (filled) and centred (open), "
        "published protocol. Left, ours: the raw one is ½ (1 + the share of the mean square that lies along μ). Right: by "
        "‖μ‖, which grows with the scale of the activations, backbones come in another order; the paper prints ‖μ‖ "
        "but not the share, and no intervals. Ours have 95 % intervals over targets.",
    ),
    FigureSpec(
        "fig3_replay_ladder",
        figures.figure_3,
        "Replay of the same targets: as published, with the last "
        "token found from the mask, and from there with the sampled ids, with BOS, or with both. The rows are no path "
        "along which one slip after another is corrected, so no line joins them. Bars are 95 % intervals over targets.",
    ),
    FigureSpec(
        "fig4_slip_by_slip",
        figures.figure_4,
        "The paper's procedure on the left, each step to the right corrects "
        "one more of its slips; the last is the corrected protocol. In the last step of ρ the numerator becomes the best "
        "of as many rollouts as there are paraphrases below it, so no line joins it to the others. Bars are 95 % "
        "intervals over targets.",
    ),
)


def runs_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """What each run is."""
    table = []
    for r in everything:
        facts, training, s = r.data["targets"], r.data["training"], r.data["targets"]["sizes"]
        table.append(
            {
                "run": r.title,
                "layer": f"{r.layer} of {facts['num_layers']}",
                "d": facts["hidden_size"],
                "N": s["N"],
                "training pairs": training["train_pairs"],
                "steps": training["steps"],
                "M": s["M"],
                "K": s["K"],
                "pool": s["pool"],
            }
        )
    columns = ["run", "layer", "d", "N", "training pairs", "steps", "M", "K", "pool"]
    return pd.DataFrame(table, columns=columns).set_index("run").map(lambda x: "–" if x is None else str(x))


def keys_table() -> pd.DataFrame:
    """Each row of the tables, its key in the results file, and its key in the published one."""
    parts = (("ceilings", rows.CEILINGS), ("evaluation", rows.EVALUATION), ("ρ", rows.RHO), ("reranks", rows.RERANKS))
    table = [
        {
            "table": name,
            "row": row.title,
            "JSON key": f"`{row.key}`",
            "results file": f"{row.file}.json",
            "published key": f"`{row.published_path}`" if row.published_path else "–",
        }
        for name, registered in parts
        for row in registered
    ]
    return pd.DataFrame(table).set_index("table")


def appendix_tables_of_run(results: RunResults) -> list[Table]:
    """All tables of §11 for one run, beside the published numbers of §11's backbone."""
    made = [("scorecard", "Scorecard", claims.scorecard(results))]
    made.append(("headline", "Headline of §11", tables.headline_table(results)))
    for kind, word in (("cen", "centred"), ("raw", "raw")):
        made.append((f"ceilings-{kind}", f"Ceilings, {word} fve_nrm", tables.ceilings_table(results, kind)))
        made.append((f"evaluation-{kind}", f"Evaluation, {word} fve_nrm", tables.evaluation_table(results, kind)))
    made += [
        ("rho", "ρ_cen", tables.rho_table(results)),
        ("k-curve-all", "K-curve, centred fve_nrm", tables.k_curve_table(results)),
        ("reranks-cen", "Cheap reranks, centred fve_nrm", tables.rerank_table(results)),
    ]
    made.append(("slips", "Audit: what each slip moves", audit_table(results)))
    if results.optional(STUDY):
        kept = results.data["training"]["best_step"]
        caption = (
            f"Training in other ways, measured at the last step; the run's own AV at the step that was kept, {kept}"
        )
        made.append(("study", caption, study_table(results)))
    if results.optional(ITERATION):
        made.append(("iteration", "Search made into a policy", iteration_table(results)))
    return [Table(f"{results.stem}-{end}", caption, frame, of=results.label) for end, caption, frame in made]


def appendix_shared_tables(shown: Sequence[RunResults]) -> dict[str, Table]:
    """Tables over all backbones and runs, by stem."""
    made = (
        Table("runs", "The runs", runs_table(shown)),
        Table("backbones", "The backbones side by side", tables.backbones_table(shown)),
        Table("claims", "The claims and what a verdict on them means", claims.claims_table()),
        Table("gap", "Centred gap, paraphrase best-of-8 minus floor", claims.gap_table(shown)),
    )
    return {t.stem: t for t in made}


def seeds_tables(everything: Sequence[RunResults]) -> list[Table]:
    """Tables over runs that differ in their seed alone."""
    return [
        Table(f"{next(iter(g.values())).stem}-seeds", "Repeated with other seeds", tables.seeds_table(g))
        for g in tables.seed_groups(everything)
    ]


def appendix_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The appendix of the results below ``roots``; ``own`` (backbone, profile) is a run to show in any case."""
    everything = find_results(roots)
    shown = without_variants(everything, own)
    shared, seeds = appendix_shared_tables(shown), seeds_tables(everything)
    of_runs = {f"{r.label}: {r.title}": appendix_tables_of_run(r) for r in shown}
    # The floors of a sweep's layers are points of figure 2.
    drawn = {spec: everything if spec.draw is figures.figure_2 else shown for spec in FIGURE_SPECS if shown}
    values = {
        "shared": shared,
        "seeds": seeds,
        "of_runs": of_runs,
        "keys": tables.markdown(keys_table()),
        "weights": weights_note(everything),
        "provenance": provenance(everything, (*NAMES, STUDY, ITERATION)),
    }
    made = [*shared.values(), *seeds, *(t for part in of_runs.values() for t in part)]
    return Page(APPENDIX, TEMPLATES / "appendix.md.j2", made, drawn, values)


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
    "rerank": (
        rows.LOGP_RERANK,
        rows.LOGP_MINUS_GREEDY,
        rows.ANCHOR_RERANK,
        rows.ANCHOR_MINUS_GREEDY,
        rows.ANCHOR,
        rows.MEAN_LOGP,
        rows.SPEARMAN,
    ),
    "best of K": (rows.SLOPE, rows.SLOPE_UNRELATED, rows.SLOPE_OTHERS, rows.SLOPE_MINUS_UNRELATED),
    NATS: (*rows.NATS, *rows.NATS_GAINED),
}


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
        return {
            "row": self.label,
            "committed": self.committed,
            "here": self.here,
            "difference": difference,
            "allowed": allowed,
            "agrees": {None: "–", True: "yes", False: "no"}[self.agrees],
        }


def columns(results: RunResults) -> dict[tuple[str, str], tuple[str, dict]]:
    """By (protocol, key) of each compared row that the results have: its label, and the column that holds it."""
    found = {}
    for group, of_group in COMPARED.items():
        for row in of_group:
            for protocol in ("published", "corrected"):
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
        said.append(
            f"{len(compared) - len(judged)} not judged: no spread over seeds was measured, or this run lacks the row"
        )
    return "; ".join(said)


def made_differently(own: RunResults, kept: RunResults) -> list[str]:
    """What differs in how the two runs were made, as their records say: hardware, identity, libraries, code."""
    there, here = (
        {
            "hardware": r.get("hardware", "not recorded"),
            **r["identity"],
            **r["libraries"],
            "code": r["code"]["git_commit"],
        }
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
    text = render(
        TEMPLATES / "reproduction.md.j2",
        title=own.title,
        table=table,
        seeds=len(spread["seeds"]) if measured else 0,
        differ=any(c.agrees is False for c in compared),
        reasons="; ".join(made_differently(own, kept)),
        verdict=verdict(compared),
    )
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
