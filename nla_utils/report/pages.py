"""Pages of the paper folder: a template filled with tables, figures and a few numbers, all from results files."""

from __future__ import annotations

import math
import os
import re
import statistics
import textwrap
import tomllib
from dataclasses import dataclass, replace
from functools import cache, partial
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
from nla_utils.report.claims import ITERATION, STUDY
from nla_utils.report.results import (
    BACKBONES,
    COMMITTED,
    NAMES,
    POOL,
    PROTOCOLS,
    SECTION_11,
    TARGETS,
    TITLES,
    RunResults,
    by_family,
    card,
    device_of,
    find_results,
    largest,
    load_results,
    of_equal_size,
    published,
    published_curves,
    section_runs,
    weights_note,
    without_variants,
)
from nla_utils.report.tables import number, signed, with_interval
from nla_utils.store import atomic_write, read_record, write_record

FIGURES = ROOT / "figures"
TEMPLATES = Path(__file__).with_name("templates")
# A citation in prose: ``@[key]``, a key of ``references.toml``.
CITATION = re.compile(r"@\[(\w+)\]")


@cache
def references() -> dict[str, dict]:
    """What the section cites, by key."""
    found = tomllib.loads(Path(__file__).with_name("references.toml").read_text(encoding="utf-8"))
    return {key: dict(zip(("authors", "year", "title", "url"), work)) for key, work in found.items()}


def fill(text: str) -> str:
    """Prose for Markdown, in lines of 140: citations are links, and links are in one piece."""
    links = {key: f"([{work['authors']}, {work['year']}]({work['url']}))" for key, work in references().items()}
    text = CITATION.sub(lambda match: links[match[1]], text.strip())
    return textwrap.fill(text, 140, break_long_words=False, break_on_hyphens=False)


def fill_tex(text: str) -> str:
    """Prose for LaTeX."""
    return CITATION.sub(r"\\cite{\1}", tables.tex(text.strip()))


def render(template: Path, form: str = "md", **values: object) -> str:
    """A template, filled as Markdown (``md``) or LaTeX (``tex``); a value that it lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent, encoding="utf-8"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    paragraph = {"md": fill, "tex": fill_tex}[form]
    environment.filters |= {"tex": tables.tex, "fill": fill, "say": lambda text: paragraph(text) + "\n\n"}
    return environment.get_template(template.name).render(form=form, **values)


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
        return tables.markdown(self.frame)

    @property
    def files(self) -> dict[str, str]:
        """What its files hold, by their ending."""
        caption = f"{self.caption}. {self.of}" if self.of else self.caption
        head = f"*{caption}*\n\n" if self.of else ""
        latex = tables.latex(self.frame, caption, f"tab:{self.stem}", self.widths, self.long)
        return {"md": head + self.markdown, "tex": latex}


@dataclass(frozen=True)
class FigureSpec:
    """A generated figure: file stem, how it is drawn from results, what it shows."""

    stem: str
    draw: Callable[[Sequence[RunResults]], Figure]
    caption: str


@dataclass(frozen=True)
class Page:
    """A page before it is written: ``template`` is a Jinja file, ``figures`` has the results that each is drawn from,
    ``values`` is what else the template may show, ``forms`` are ``md`` and, if it is to be printed, ``tex``."""

    path: Path
    template: Path
    tables: Sequence[Table]
    figures: Mapping[FigureSpec, Sequence[RunResults]]
    values: Mapping[str, object]
    forms: Sequence[str] = ("md",)

    def text(self, path: Optional[Path] = None, figure_folder: Path = FIGURES, form: str = "md") -> str:
        """The page; figures are named relative to ``path``. LaTeX reads its tables from ``tables`` beside it."""
        where = Path(os.path.relpath(figure_folder, (path or self.path).parent))
        end = {"md": "png", "tex": "pdf"}[form]
        shown = [(spec.caption, (where / f"{spec.stem}.{end}").as_posix()) for spec in self.figures]
        return render(self.template, form, figures=shown, **self.values)

    def write(self, path: Optional[Path] = None, figure_folder: Path = FIGURES) -> list[Path]:
        """Write the page, its tables (Markdown and LaTeX, in ``tables`` beside it) and its figures (PNG and PDF).

        Returns what was written, the page first.
        """
        path = path or self.path
        pictures = [
            p for spec, shown in self.figures.items() for p in save_figure(spec.draw(shown), figure_folder, spec.stem)
        ]
        texts = {path.with_suffix(f".{form}"): self.text(path, figure_folder, form) for form in self.forms}
        for table in self.tables:
            texts |= {path.parent / "tables" / f"{table.stem}.{end}": text for end, text in table.files.items()}
        for file, text in texts.items():
            atomic_write(file, text.encode())
        return [path, *pictures, *list(texts)[1:]]


@figures.styled
def save_figure(fig: Figure, folder: Path, name: str) -> list[Path]:
    """Write PNG to look at and PDF for LaTeX, without dates, so that equal figures are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png", folder / f"{name}.pdf"]
    # Laid out once for both.
    fig.draw_without_rendering()
    fig.set_layout_engine("none")
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
            code = data["code"]
            table.append(
                {
                    "results file": f"{results.backbone}/{results.profile}/{name}.json",
                    "sha256": results.sha256(name)[:16],
                    "made from": ", ".join(f"{k} {v[:12]}" for k, v in data["made_from"].items()),
                    "git commit": (code["git_commit"] or "–")[:12] + (" + changes" if code["dirty"] else ""),
                    "written on": f"{device_of(data)}, {data['identity']['dtype']}, torch {data['libraries']['torch']}",
                }
            )
    columns = ["results file", "sha256", "made from", "git commit", "written on"]
    frame = pd.DataFrame(table, columns=columns).set_index(columns[0])
    return Table("provenance", "Where each number comes from", frame)


SECTION = ROOT / "paper" / "section11.md"
FIGURE_1 = FigureSpec(
    "fig1_k_curves",
    figures.figure_1,
    "The best of K texts, centred, family by family. Left, as published: curve and headline best of K (diamond), of "
    "another evaluation than the curve: Qwen's is of the final checkpoint, its curve of an earlier one; Llama's has "
    "fewer targets. The null (dashed) is a line through the paper's NN-in-pool and NN-retrieval, an extension below "
    "199 texts, where it lies too high. Later ports (triangles) are with their family, gpt-oss with the first. The "
    "paper prints no intervals. Right, ours, smaller, with quantized weights and one training each, held out and "
    "corrected; AVs trained on fewer targets than the paper's 30,000 are undertrained. The rise with K is there for "
    "texts that have nothing to do with v. Two such nulls lie close together: unrelated texts (wide pale line) and the "
    "AV's rollouts of other targets (dots). What the AV adds is its distance from them. The best of eight paraphrases "
    "and the nearest stored text are levels, not curves. Bands are 95 % intervals over targets.",
)
BITS = FigureSpec(
    "fig10_bits",
    figures.figure_bits,
    "What the best of K is worth, in doublings of K unrelated texts (bits at K), family by family. Published "
    "(diamonds, dashed): the null is a line through NN-in-pool and NN-retrieval; above a pool of 2,000 texts nothing "
    "can be said (arrows); of gpt-oss, shown with the first family, and gemma-4 there is only a bound (open). Ours, "
    "with quantized weights and one training each, held out and corrected: with a 95 % band over targets and pool if "
    "the run has evidence, dotted and without one where it has none; AVs trained on fewer targets than the paper's "
    "30,000 are undertrained, and one that is named was given to the run. Below 199 texts the published line is an "
    "extension, which makes bits too few if anything. Grey lines: the most that a pool can tell at each K.",
)
READING = FigureSpec(
    "fig8_reading",
    figures.figure_reading,
    "What v saves the AV, in nats a token, while it is trained: against the v of another target, and against the mean "
    "μ. Above zero it reads v. Lines are validation texts; their spread was not kept, so they have no intervals. Marks "
    "with a black edge are the kept AV on the held-out targets, with 95 % intervals over targets.",
)
# Widths of a label, a published and two columns with intervals; of a label and three pairs, raw and centred; of the
# K-curve. The same with a column, or a pair, of the released AV.
WIDTHS = ((28, 13, 25, 25), (17, 9, 9, 13, 13, 13, 13), (8, 8, 14, 14, 14, 15, 15))
WIDTHS_RELEASED = ((24, 10, 20, 20, 20), (13, 7, 7, 11, 11, 11, 11, 11, 11), (7, 7, 12, 12, 12, 12, 12, 12))


def tables_of_run(results: RunResults, released: Optional[RunResults] = None) -> dict[str, Table]:
    """All tables of one run by name: the scorecard, those of §11 and what they show when slips are corrected, and what
    extensions measured. With ``released``, our run of the AV that was released for the published backbone, its numbers
    stand beside the published ones."""
    beside = released is not None and released is not results
    narrow, wide, curve = WIDTHS_RELEASED if beside else WIDTHS
    ceilings = partial(tables.both_kinds_table, rows.CEILINGS)
    evaluation = partial(tables.both_kinds_table, (*rows.EVALUATION, rows.CONSTANT_MU))

    def shown(make: Callable[[RunResults], pd.DataFrame]) -> pd.DataFrame:
        return tables.with_released(make, results, released)

    made = {
        "scorecard": ("Scorecard", claims.scorecard(results), (29, 11, 11, 19, 19)),
        "headline": ("Headline of §11", tables.headline_table(results)),
        "ceilings": ("Table 1. Ceilings", shown(ceilings), wide),
        "evaluation": ("Table 2. Evaluation", shown(evaluation), wide),
        "rho": ("Table 3. The same as ρ, centred", shown(tables.rho_table), narrow),
        "k-curve": ("Table 4. The best of K, centred", shown(tables.k_curve_table), curve),
        "reranks": ("Table 5. Cheap reranks, centred", shown(tables.rerank_table), narrow),
        "slips": ("Audit: what each slip moves", tables.audit_table(results)),
    }
    if results.value(rows.NULL_SD, "cen1") is not None:
        both = tables.rows_by_run(ALL_ROWS, [results], CENTRED_BY)
        both.columns = [f"centred by {name}" for name in CENTRED_BY.values()]
        made["direction"] = ("All rows with one direction out, corrected", both)
    if results.optional(STUDY):
        caption = "Training in other ways, measured at the last step; the run's own AV at the step that was kept, "
        made["study"] = (f"{caption}{results.training['best_step']}", claims.study_table(results))
    if results.optional(ITERATION):
        made["iteration"] = ("Search made into a policy", claims.iteration_table(results))
    return {key: Table(f"{results.stem}-{key}", *what, of=results.label) for key, what in made.items()}


def shared_tables(
    shown: Sequence[RunResults], about: Sequence[RunResults], released: Mapping[str, RunResults]
) -> dict[str, Table]:
    """The tables over all backbones, by name, but for those that no run has."""

    def ours(width: float, printed: float = 0) -> tuple[float, ...]:
        """Widths of our backbones' columns, together ``width``, and of the published ones in front of each family."""
        of_family = [
            (printed,) * bool(name) + (width / max(1, len(about)),) * len(r) for name, r in by_family(about).items()
        ]
        return tuple(width for widths in of_family for width in widths if width)

    def label_and(n: int) -> tuple[float, ...]:
        """Widths of a label and n equal columns, with what stands between them."""
        return (22, *((76 - 1.7 * n) / n for _ in range(n)))

    # A question or claim, each family, its notebook or verdict; the label, each family; a slip, what it is, ours.
    found = (15.5, *ours(39.3, 8.1), 7.2)
    facts, audit = (15, *ours(42, 9)), (15, 18, *ours(58))
    nulls = (14, 5, 12, 14, 14, 26) if released else (20, 6, 18, 24, 20)
    best = "The published best of K beside the null that the paper itself prints"
    measured = [r for r in shown if tables.has_bits(r) and not r.av]
    own = largest(r for r in measured if not r.corpus)
    ends = len(claims.ends_table(shown).columns)
    made = {
        "bits": Table(
            "bits", "What the best of K is worth, in bits", tables.bits_table(shown), (16, 4, 8.5, *[8.8] * 6)
        ),
        "sign": Table(
            "sign",
            "The sign of log-probability",
            tables.rows_by_run(SIGN, measured, {"cen": ""}),
            label_and(len(measured)),
        ),
        "direction": Table(
            "direction",
            "Centred by μ, and by μ and one direction",
            tables.rows_by_run(SHARPER, own, CENTRED_BY) if own else pd.DataFrame(),
            label_and(2 * len(own)),
        ),
        "ends": Table("ends", "What v saves at the ends of a text", claims.ends_table(shown), label_and(ends)),
        "findings": Table("findings", "What was found", claims.findings_table(shown), found, long=True),
        "scorecard": Table("scorecard", "Scorecard", claims.families_table(about), found, long=True),
        "facts": Table("facts", "The backbones and the trainings", tables.facts_table(about), facts),
        "null": Table("published-null", best, tables.published_null_table(released), nulls),
        "card": Table("card", "What the card says, and what is wrong with it", tables.slips_table(about), (34, 60)),
        "audit": Table("audit", "Audit: what each slip moves", tables.audit_of_all(about, shown), audit, long=True),
        "reading": Table("reading", "What the AV takes from v", claims.reading_table(shown), (15, 6, 6, *[14] * 4)),
        "easy": Table("easy", "Where reading is easy", claims.easy_table(shown), (22, 14, 15, 14, 14, 9)),
    }
    return {name: table for name, table in made.items() if len(table.frame)}


# What says whether the sign of log-probability is the AV's; by which rows two ways of centring are compared.
SIGN = (rows.SPEARMAN, *rows.SPREAD, *rows.GAINS)
CENTRED_BY = {"cen": "μ", "cen1": "μ and one direction"}
SHARPER = (
    *(rows.NULL_SD, rows.UNRELATED, rows.GREEDY, rows.GREEDY_MINUS_OTHERS, rows.BEST, rows.BEST_MINUS_UNRELATED),
    *(rows.PARAPHRASE, rows.RETRIEVAL, rows.LONGEST_PROBE, rows.LOGP_RERANK, rows.SPEARMAN),
    *(replace(figure.row, label=f"{figure.of.label}, bits") for figure in rows.BITS),
)
ALL_ROWS = (*rows.CEILINGS, rows.GAP, *rows.EVALUATION, rows.NULL_SD, *rows.PAIRED, *rows.SLOPES)


def _reading_runs(measured: Sequence[RunResults]) -> str:
    """The runs whose own v makes a source more likely than another's; their verdicts are one family."""
    row = rows.NATS_OTHER_MINUS_OWN
    words = claims.decide({r.label: claims.claimed(r.of(row), row.key, low=0) for r in measured})
    return ", ".join(label for label, word in words.items() if word == claims.YES)


def _listed_verdicts(row: rows.Row, shown: Sequence[RunResults]) -> str:
    """What runs say of "above 0", with figures; one family."""
    claim = claims.Claim("", "", row, low=0)
    cells = claims.judge({r.label: (claim, r.of(row)) for r in shown if r.value(row) is not None})
    return listed([f"{label}: {cell}" for label, cell in cells.items()])


def _sharper(shown: Sequence[RunResults]) -> str:
    """How far apart unrelated texts score under the two ways of centring, by run."""
    pairs = {r.label: [r.value(rows.NULL_SD, kind) for kind in CENTRED_BY] for r in shown if not r.corpus}
    return listed([f"{a:.3f} and {b:.3f} on {label}" for label, (a, b) in pairs.items() if b is not None])


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _how_made(results: RunResults) -> str:
    training, sizes = results.training, results.sizes
    machine = "a CPU" if device_of(training) == "cpu" else "a GPU"
    made = f"trained on {machine} and kept at step {training['best_step']} of {training['steps']}"
    if training.get("released"):
        made = f"the AV {results.av}, which it was given"
    evaluated = f"M = {sizes['M']} held-out targets with K = {sizes['K']} rollouts each"
    return f"{results.name} ({results.size}, {made}, {evaluated})"


def said(about: Sequence[RunResults]) -> dict[str, object]:
    """The numbers of the section's sentences, as text, those of runs one after the other in the same order; ``of`` and
    ``gained`` give those of a row."""

    def each(text: Callable[[RunResults], str], runs: Sequence[RunResults] = about) -> str:
        found = [text(r) for r in runs]
        return listed(found[:1] if len(set(found)) == 1 else found)

    def of(row: rows.Row, protocol: str = "corrected", kind: str = "cen") -> str:
        return each(lambda r: number(r.value(row, kind, protocol)))

    def gained(row: rows.Row) -> str:
        return each(lambda r: signed(r.of(row), row.cen), [r for r in about if row.cen in r.of(row)])

    evaluations = {name: published(name)["centred_eval"] for name in BACKBONES}
    margins = {c.title: c.margin for c in published_curves() if not c.at_least}
    # Whose null is read off the same points as the published one.
    same = [r for r in about if (r.sizes["M"], r.sizes["pool"]) == (TARGETS, POOL)]
    return {
        "names": each(lambda r: r.name),
        "shown": each(lambda r: r.spec.shown),
        "small": all(r.spec.weights for r in about),
        "card": card(),
        "K": evaluations[SECTION_11]["K"],
        "margins": ", ".join(f"{margin:+.3f} on {title}" for title, margin in margins.items()),
        "retrieval": ", ".join(
            f"{number(e['best_of_k']['cen'])} against {number(e['nn_retrieval']['cen'])} on {TITLES[name]}"
            for name, e in evaluations.items()
        ),
        "later": published("gemma4_31b"),
        "of": of,
        "gained": gained,
        "within": bool(same) and all(0 < min(margins.values()) < tables.null_mismatch(r) for r in same),
        "same": each(lambda r: r.name, same),
        "mismatch": each(lambda r: number(tables.null_mismatch(r)), same),
        "encoding": each(lambda r: number(tables.null_encoding(r)), same),
        "steps": each(lambda r: str(r.training["best_step"])),
        "undertrained": listed([r.name for r in about if r.undertrained]),
        "ks": each(lambda r: str(r.sizes["K"])),
        "made": each(_how_made),
        "held_out": each(lambda r: str(r.sizes["M"])),
    }


def section_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The section of the results below ``roots``: of the largest run of each backbone, or of ``own`` (backbone,
    profile) in its backbone's place, and first."""
    everything = find_results(roots)
    shown = without_variants(everything, own)
    about, released = section_runs(shown, own), tables.released_runs(shown)
    shared = shared_tables(shown, about, released)
    of_runs = {r.label: tables_of_run(r, released.get(r.counterpart)) for r in about}
    of_released = {}
    for name, r in released.items():
        caption, frame = f"The released AV on {TITLES[name]}, run here", tables.released_table(name, r)
        of_released[name] = Table(f"{name}-released", caption, frame, (30, 12, 28, 24), of=r.label)
    read = [r for r in largest(shown) if r.source_loss]
    values = {
        "shared": shared,
        "of_runs": of_runs,
        "released": of_released,
        "claims": [c for c in claims.CLAIMS if c.where != "control"],
        "about": about,
        "alike": of_equal_size(shown),
        "counts": claims.family_counts,
        "published": published,
        "titles": TITLES,
        "reads": _reading_runs(read),
        "said": said(about),
        "sign": _listed_verdicts(rows.GAIN_OWN_MINUS_OTHERS, [r for r in shown if not r.av]),
        "sharper": _sharper([r for r in shown if not r.av]),
        "ends": claims.at_the_ends(shown),
        "small_runs": claims.small_runs(everything),
        "rows": rows,
        "weights": weights_note(shown),
        "references": references(),
    }
    made = [*shared.values(), *of_released.values(), *(t for of_run in of_runs.values() for t in of_run.values())]
    drawn = {FIGURE_1: shown, BITS: shown} | ({READING: shown} if read else {})
    return Page(SECTION, TEMPLATES / "section11.j2", made, drawn, values, ("md", "tex"))


APPENDIX = ROOT / "paper" / "appendix.md"
APPENDIX_FIGURES = (
    FigureSpec(
        "figA_k_curves_by_run",
        figures.figure_by_run,
        "K-curves of every run under both protocols, with floor, ceiling and controls, all on one scale. The two "
        "controls often coincide: dots on the wide pale line. Bands are 95 % intervals over targets.",
    ),
    FigureSpec(
        "fig2_mu_and_floor",
        figures.figure_2,
        "The score of unrelated pairs, raw (filled) and centred (open), published protocol. Left, ours: the raw one is "
        "½ (1 + the share of the mean square that lies along μ). Right: by ‖μ‖, which grows with the scale of the "
        "activations, backbones come in another order; the paper prints ‖μ‖ but not the share, and no intervals. Ours "
        "have 95 % intervals over targets.",
    ),
    FigureSpec(
        "fig3_replay_ladder",
        figures.figure_3,
        "Replay of the same targets: as published, with the last token found from the mask, and from there with the "
        "sampled ids, with BOS, or with both. The rows are no path along which one slip after another is corrected, so "
        "no line joins them. Bars are 95 % intervals over targets.",
    ),
    FigureSpec(
        "fig4_slip_by_slip",
        figures.figure_4,
        "The paper's procedure on the left, each step to the right corrects one more of its slips; the last is the "
        "corrected protocol. In the last step of ρ the numerator becomes the best of as many rollouts as there are "
        "paraphrases below it, so no line joins it to the others. Bars are 95 % intervals over targets.",
    ),
)


def runs_table(everything: Sequence[RunResults]) -> pd.DataFrame:
    """What each run is."""
    table = [
        (r.title, f"{r.layer} of {r.targets['num_layers']}", r.targets["hidden_size"], r.sizes["N"])
        + (r.training["train_pairs"], r.training["steps"], r.sizes["M"], r.sizes["K"], r.sizes["pool"])
        for r in everything
    ]
    columns = ["run", "layer", "d", "N", "training pairs", "steps", "M", "K", "pool"]
    return (
        pd.DataFrame(table, columns=columns, dtype=object).set_index("run").map(lambda x: "–" if x is None else str(x))
    )


def keys_table() -> pd.DataFrame:
    """Each row of the tables, its key in the results file, and its key in the published one."""
    parts = {"ceilings": rows.CEILINGS, "evaluation": rows.EVALUATION, "ρ": rows.RHO, "reranks": rows.RERANKS}
    table = [
        (name, row.title, f"`{row.key}`", f"{row.file}.json", f"`{row.published_path}`" if row.published_path else "–")
        for name, registered in parts.items()
        for row in registered
    ]
    columns = ["table", "row", "JSON key", "results file", "published key"]
    return pd.DataFrame(table, columns=columns).set_index("table")


def appendix_page(roots: Iterable[Path] = (COMMITTED,), own: Optional[tuple[str, str]] = None) -> Page:
    """The appendix of the results below ``roots``; ``own`` (backbone, profile) is a run to show in any case."""
    everything = find_results(roots)
    shown = without_variants(everything, own)
    shared = (
        Table("runs", "The runs", runs_table(shown)),
        Table("backbones", "The backbones side by side", tables.backbones_table(shown)),
        Table("claims", "The claims and what a verdict on them means", claims.claims_table()),
        Table("gap", "Centred gap, paraphrase best-of-8 minus floor", claims.gap_table(shown)),
    )
    seeds = []
    for by_seed in tables.seed_groups(everything):
        stem = f"{next(iter(by_seed.values())).stem}-seeds"
        seeds.append(Table(stem, "Repeated with other seeds", tables.seeds_table(by_seed)))
        if len(by_seed) > 2:
            seeds.append(Table(f"{stem}-verdicts", "Over trainings", claims.trainings_table(by_seed)))
    released = tables.released_runs(shown)
    of_runs = {f"{r.label}: {r.title}": tables_of_run(r, released.get(r.counterpart)) for r in shown}
    # The floors of a sweep's layers are points of figure 2.
    drawn = {spec: everything if spec.draw is figures.figure_2 else shown for spec in APPENDIX_FIGURES if shown}
    values = {
        "shared": {t.stem: t for t in shared},
        "seeds": seeds,
        "of_runs": of_runs,
        "keys": tables.markdown(keys_table()),
        "weights": weights_note(everything),
        "provenance": provenance(everything, (*NAMES, STUDY, ITERATION)),
    }
    made = [*shared, *seeds, *(table for of_run in of_runs.values() for table in of_run.values())]
    return Page(APPENDIX, TEMPLATES / "appendix.md.j2", made, drawn, values)


SPREAD = ROOT / "paper" / "seed_spread.json"
# The difference of two independent draws has √2 times the deviation of one; twice that is allowed.
ALLOWED = 2 * math.sqrt(2)
# Half of the last digit that tables show.
SHOWN = 0.0005
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
    "nats a token": (*rows.NATS, *rows.NATS_GAINED),
}


def columns(results: RunResults) -> dict[tuple[str, str], tuple[str, dict]]:
    """By (protocol, key) of each compared row that the results have: its label, and the column that holds it."""
    found = {}
    for group, of_group in COMPARED.items():
        for row in of_group:
            for protocol in PROTOCOLS:
                column = results.of(row, protocol)
                if column.get(row.cen) is not None and column["protocol"] == protocol:
                    found[protocol, row.cen] = f"{group}: {row.label} ({protocol})", column
    return found


def compare(own: RunResults, kept: RunResults, deviations: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """The committed run's rows beside this run's; ``deviations`` over seeds is ``{protocol: {key: deviation}}``.
    ``agrees`` is a dash where this run lacks the row, or its deviation was not measured."""
    here, table = columns(own), []
    for (protocol, key), (label, column) in columns(kept).items():
        mine, deviation = here.get((protocol, key), ("", {}))[1], deviations.get(protocol, {}).get(key)
        difference = mine[key] - column[key] if mine else None
        allowed = None if deviation is None else max(ALLOWED * deviation, SHOWN)
        judged = None not in (difference, allowed)
        table.append(
            {
                "row": label,
                "committed": with_interval(column, key),
                "here": with_interval(mine, key),
                "difference": "–" if difference is None else f"{difference:+.2g}",
                "allowed": "–" if allowed is None else f"{allowed:.2g}",
                "agrees": ("yes" if abs(difference) <= allowed else "no") if judged else "–",
            }
        )
    return pd.DataFrame(table).set_index("row")


def verdict(compared: pd.DataFrame) -> str:
    """``31 of 33 rows agree; 2 differ: …``, and how many more are not judged."""
    agree, differ, open_ = (list(compared.index[compared["agrees"] == word]) for word in ("yes", "no", "–"))
    said = [f"{len(agree)} of {len(agree) + len(differ)} rows agree"] if agree or differ else []
    if differ:
        said.append(f"{len(differ)} differ{'s' if len(differ) == 1 else ''}: {', '.join(differ)}")
    if open_:
        said.append(f"{len(open_)} not judged: no spread over seeds was measured, or this run lacks the row")
    return "; ".join(said)


def made_differently(own: RunResults, kept: RunResults) -> list[str]:
    """What differs in how the two runs were made, as their records say: hardware, identity, libraries, code."""
    records = (r.data["centered_eval"] for r in (kept, own))
    there, here = (
        {"hardware": r.get("hardware", "not recorded")}
        | r["identity"]
        | r["libraries"]
        | {"code": r["code"]["git_commit"]}
        for r in records
    )
    return [f"{name} {there.get(name)} → {value}" for name, value in here.items() if there.get(name) != value]


def write_reproduction(folder: Path) -> Optional[str]:
    """Write ``reproduction.md`` into a run's folder; returns its text, ``None`` where there is nothing to compare."""
    own, kept = load_results(folder), load_results(COMMITTED / folder.parent.name / folder.name)
    if own is None or kept is None:
        return None
    spread = read_record(SPREAD) if SPREAD.exists() else {}
    measured = (spread.get("backbone"), spread.get("profile")) == (kept.backbone, kept.profile)
    compared = compare(own, kept, spread["deviations"] if measured else {})
    text = render(
        TEMPLATES / "reproduction.md.j2",
        title=own.title,
        table=tables.markdown(compared),
        seeds=len(spread["seeds"]) if measured else 0,
        differ="no" in set(compared["agrees"]),
        reasons="; ".join(made_differently(own, kept)),
        verdict=verdict(compared),
    )
    atomic_write(folder / "reproduction.md", text.encode())
    return text


def write_spread(runs: Sequence[RunResults], path: Path) -> Path:
    """Write each row's standard deviation (of n − 1) over runs of as many seeds, the committed run first.

    Raises ``ConfigError`` unless these are three runs or more that differ in the seed alone.
    """
    identities = [r.targets["identity"] for r in runs]
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
