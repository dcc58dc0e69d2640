"""Results files of our runs, with what they were made from, and the figures that the paper prints."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Optional

import numpy as np

from nla_utils import metrics, rows
from nla_utils.config import DATA, PROFILES, ROOT, RunConfig, source_name
from nla_utils.lm import weights
from nla_utils.store import read_json, read_record, sha256_file

COMMITTED = ROOT / "paper" / "results"
# Results from before the corpus's name was recorded have it in the run's name alone.
CORPUS = re.compile(r"-corpus-(.+)$")
# The files of §11; a run that lacks one is not shown. What extensions write beside them is optional.
NAMES = ("targets", "training", "oracle_ceiling", "centered_eval", "rerank_eval")
PROTOCOLS = ("published", "corrected")


@dataclass(frozen=True)
class RunResults:
    """The results files of one run: ``data`` by name, all of them in ``folder``."""

    backbone: str
    profile: str
    data: dict[str, dict]
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.backbone} · {self.profile}"

    @property
    def stem(self) -> str:
        """The title as the beginning of file names."""
        return f"{self.backbone}-{self.profile}"

    @property
    def spec(self) -> weights.BackboneSpec:
        """The registry's entry of the backbone, or one that knows its name alone."""
        name = self.backbone
        return weights.REGISTRY.get(name.partition("@")[0]) or weights.BackboneSpec(name, name)

    @property
    def name(self) -> str:
        """The backbone as its makers write it."""
        return self.spec.title or self.backbone

    @property
    def targets(self) -> dict:
        return self.data["targets"]

    @property
    def training(self) -> dict:
        return self.data["training"]

    @property
    def sizes(self) -> dict[str, int]:
        return self.targets["sizes"]

    @property
    def layer(self) -> int:
        return self.targets["identity"]["layer"]

    @property
    def seed(self) -> int:
        return self.targets["identity"]["seed"]

    @property
    def corpus(self) -> Optional[str]:
        """The name of the corpus that the targets are from; ``None`` for the model's own samples."""
        older = CORPUS.search(self.profile) if "corpus_sha256" in self.targets else None
        return self.targets.get("corpus", older and older[1])

    @property
    def av(self) -> Optional[str]:
        """The AV that the run was given, by its hub id or its folder's name; ``None`` where it trained its own."""
        given = self.training.get("released")
        return given and source_name(given).removeprefix("hub:").split("@")[0]

    @property
    def size(self) -> str:
        """How many targets, of which corpus and whose AV if they were given: ``30,000 targets``."""
        corpus, av = f" of {self.corpus}" if self.corpus else "", f", AV {self.av}" if self.av else ""
        return f"{self.sizes['N']:,} targets{corpus}{av}"

    @property
    def label(self) -> str:
        """What tables and figures call the run: ``Gemma-3-270M (base, Q4), 30,000 targets``."""
        return f"{self.spec.shown}, {self.size}"

    @property
    def counterpart(self) -> str:
        """The published record that the run is shown beside: of the paper's backbone of its family, else §11's."""
        return FAMILIES.get(self.spec.family, SECTION_11)

    @property
    def family(self) -> str:
        """Runs of one family differ in layer and seed alone: their sizes are the same, and what they were given."""
        given = [self.targets.get(k) for k in ("corpus_sha256", "released_targets")]
        return json.dumps([self.sizes, [*given, self.training.get("av_sha256")]])

    @property
    def undertrained(self) -> bool:
        """Whether the run's AV was trained on fewer targets than the paper's."""
        return self.sizes["N"] < PROFILES["full"].n_targets

    @property
    def is_variant(self) -> bool:
        """Whether the run is one of a sweep, of another layer than the backbone's own or another seed than 1."""
        depth = self.targets.get("num_layers")
        own = self.spec.layer or (round(0.73 * depth) if depth else self.layer)
        return (self.layer, self.seed) != (own, 1)

    @property
    def source_loss(self) -> Optional[dict]:
        """What v is worth to the AV in nats of the sources; ``None`` in results from before it was measured."""
        return self.data["centered_eval"].get("source_loss")

    @property
    def bits_curve(self) -> tuple[dict[int, float], Optional[dict[int, list[float]]], int]:
        """(bits at each K, their intervals, P), held out, corrected. Without evidence there is no interval, and the
        null is read off lines between its points up to K and NN-retrieval."""
        column, key = self.of(rows.CURVE), rows.CURVE_BITS.cen
        if key in column:
            found, ends = ({int(k): x for k, x in of[key].items()} for of in (column, column["ci95"]))
            return found, ends, column["unrelated_text_pool_size"]
        return (
            {int(k): self.interpolated_bits(x, int(k)) for k, x in column[rows.CURVE.cen].items()},
            None,
            self.sizes["pool"],
        )

    def interpolated_bits(self, score: float, k: int) -> float:
        """Bits at k of a centred score where there is no evidence."""
        null = {int(n): x for n, x in self.of(rows.CURVE)[rows.CURVE_UNRELATED.cen].items()}
        null[self.sizes["pool"]] = self.value(rows.RETRIEVAL)
        return metrics.bits(score, list(null), np.array(list(null.values())), k)

    def column(self, name: str, protocol: str) -> dict:
        """One protocol's numbers in a results file."""
        return self.data[name]["protocols"][protocol]

    def of(self, row: rows.Row, protocol: str = "corrected") -> dict:
        """The column that has a row; without any rows where it was not measured."""
        if row in (*rows.NATS, *rows.NATS_GAINED, *rows.OF_ENDS):
            return self.source_loss or {"ci95": {}}
        return self.column(row.file, protocol)

    def value(self, row: rows.Row, kind: str = "cen", protocol: str = "corrected") -> Optional[float]:
        """A row's value, ``raw`` or ``cen``; ``None`` where it was not measured."""
        return self.of(row, protocol).get(row.at(kind))

    def optional(self, name: str) -> Optional[dict]:
        """A results file that not every run has; ``None`` without it."""
        path = self.folder / f"{name}.json"
        return read_record(path) if path.exists() else None

    def sha256(self, name: str) -> str:
        return sha256_file(self.folder / f"{name}.json")


def load_results(folder: Path) -> Optional[RunResults]:
    """Results in ``folder`` (files there or under ``results/``); ``None`` if not all files of §11 exist yet."""
    inner = folder / "results" if (folder / "results").is_dir() else folder
    if not all((inner / f"{n}.json").exists() for n in NAMES):
        return None
    data = {n: read_record(inner / f"{n}.json") for n in NAMES}
    return RunResults(data["targets"]["identity"]["backbone"], data["targets"]["profile"], data, inner)


def find_results(roots: Iterable[Path] = (COMMITTED,)) -> list[RunResults]:
    """Results of complete runs below the roots (``<backbone>/<profile>``), sorted; a later root wins."""
    folders = [folder for root in roots for folder in sorted(Path(root).glob("*/*")) if folder.is_dir()]
    found = {(r.backbone, r.profile): r for folder in folders if (r := load_results(folder))}
    return [found[k] for k in sorted(found)]


def device_of(record: dict) -> str:
    """The device that a results file was computed on; older ones have it in their identity."""
    return record.get("device") or record["identity"]["device"]


def weights_note(everything: Iterable[RunResults]) -> str:
    """What the registry says of the weights of the runs' backbones."""
    return weights.weights_note(r.backbone for r in everything)


def without_variants(everything: Iterable[RunResults], own: Optional[tuple[str, str]] = None) -> list[RunResults]:
    """The results to show on their own: no variants of a sweep, but always ``own`` (backbone, profile)."""
    return [r for r in everything if not r.is_variant or (r.backbone, r.profile) == own]


def largest(everything: Iterable[RunResults]) -> list[RunResults]:
    """The results with the most targets of each backbone, family by family; of a run that was given an AV only where
    none trained its own."""
    best: dict[str, RunResults] = {}
    for results in sorted(everything, key=lambda r: (r.av is not None, -r.sizes["N"])):
        best.setdefault(results.backbone, results)
    return [r for runs in by_family(best.values()).values() for r in runs]


def of_equal_size(everything: Iterable[RunResults]) -> list[RunResults]:
    """As :func:`largest`, at the largest sizes (N, M, K and the pool's) that every backbone has; empty where there are
    none."""

    def sizes(r: RunResults) -> tuple:
        return tuple(r.sizes[name] for name in ("N", "M", "K", "pool"))

    everything = [r for r in everything if not r.corpus and not r.av]
    held = [{sizes(r) for r in everything if r.backbone == own.backbone} for own in largest(everything)]
    most = max(set.intersection(*held), default=None) if held else None
    return largest(r for r in everything if sizes(r) == most)


def by_family(everything: Iterable[RunResults]) -> dict[Optional[str], list[RunResults]]:
    """The results by the paper's backbone that is of their family, in the order of :data:`FAMILIES`; under ``None``
    those of other families, if there are any."""
    everything = list(everything)
    found = {name: [r for r in everything if FAMILIES.get(r.spec.family) == name] for name in (*BACKBONES, None)}
    return {name: runs for name, runs in found.items() if name or runs}


def section_runs(everything: Iterable[RunResults], own: Optional[tuple[str, str]] = None) -> list[RunResults]:
    """The runs that a section is about: first ``own``, else that of the default backbone; then the largest of each
    other backbone."""
    everything = list(everything)
    found = largest(everything)
    mine = [r for r in everything if (r.backbone, r.profile) == own]
    first = mine or [r for r in found if r.backbone == RunConfig.backbone] or found[:1]
    return first + [r for r in found if r.backbone != first[0].backbone]


def group(everything: Iterable[RunResults], alike, varied, least: int) -> list[dict[int, RunResults]]:
    """Results that agree in ``alike`` by what ``varied`` gives of them, where there are at least ``least`` of them."""
    groups: dict[tuple, dict[int, RunResults]] = {}
    for results in everything:
        groups.setdefault(alike(results), {})[varied(results)] = results
    return [dict(sorted(g.items())) for _, g in sorted(groups.items()) if len(g) >= least]


# The families that tables and figures set side by side, in their order, and the paper's backbone of each.
FAMILIES = {"Gemma": "gemma2_2b", "Llama": "llama32_3b", "Qwen": "qwen25_7b"}
BACKBONES = tuple(FAMILIES.values())
TITLES = {
    "qwen25_7b": "Qwen2.5-7B",
    "llama32_3b": "Llama-3.2-3B",
    "gemma2_2b": "Gemma-2-2B",
    "gpt_oss_20b": "gpt-oss-20b",
}
# Targets and pool of the published evaluations: NN-in-pool and NN-retrieval are the best of as many unrelated texts.
TARGETS, POOL = 200, 2000
# The backbone of §11, whose tables the section regenerates.
SECTION_11 = "gemma2_2b"


def published(name: str) -> dict:
    """The published figures of one backbone; raises ``ArtefactError`` if the file is missing."""
    return read_json(DATA / "paper" / "published" / f"{name}.json")


def card() -> dict:
    """§11's model card: its tables and statements as text, digit for digit."""
    return published(f"{SECTION_11}_card")


def look_up(record: dict, path: str) -> Optional[Any]:
    """Value at a dotted path, ``None`` where the paper does not give one, or the path is empty."""
    return reduce(lambda found, key: found.get(key) if isinstance(found, dict) else None, path.split("."), record)


def k_curve(name: str) -> dict[int, float]:
    """Published centred K-curve; where the paper averages two runs, so does this."""
    record = published(name)["k_curve"]
    runs = record.get("runs_cen", [record.get("cen")])
    return {int(k): sum(r[k] for r in runs) / len(runs) for k in runs[0]}


def null_at(points: Mapping[int, float], k: int) -> float:
    """The best of k unrelated texts, centred: read off the straight line against log K through ``points``,
    ``{number of texts: their best}``."""
    slope, intercept, _ = metrics.slope_per_doubling(list(points), list(points.values()))
    return slope * math.log2(k) + intercept


@dataclass(frozen=True)
class PublishedCurve:
    """What is published of one backbone's best of K texts, ``{K: centred score}``, and of its null.

    ``null``: points of the best of unrelated texts, ``{number of texts: centred score}``. NN-in-pool among 200 and
    NN-retrieval from 2,000 are the best of 199 and of 2,000. Later ports print no NN-in-pool: their line starts at the
    floor, one text. A null curve bends down against log K, so it lies above that line (``at_least``). Unlike the
    rollouts those texts are encoded behind BOS, and NN-in-pool uses the 200 targets' own mean.
    """

    title: str
    family: str
    best: dict[int, float]
    null: dict[int, float]
    at_least: bool = False

    @property
    def k(self) -> int:
        return max(self.best)

    @property
    def margin(self) -> float:
        """The best of K less the best of as many unrelated texts; with ``at_least`` at most that."""
        return self.best[self.k] - null_at(self.null, self.k)

    @property
    def bits(self) -> dict[int, float]:
        """Bits at each K, read off the null's line; none above what the larger point allows."""
        slope, intercept, _ = metrics.slope_per_doubling(list(self.null), list(self.null.values()))
        most = math.log2(max(self.null))
        return {k: min(max((y - intercept) / slope, 0), most) - math.log2(k) for k, y in self.best.items()}


def published_curves() -> Iterator[PublishedCurve]:
    """The paper's three backbones, then its later ports."""
    for family, name in FAMILIES.items():
        record = published(name)
        evaluation, pool = record["centred_eval"], record["ceilings"]["nn_in_pool"]["cen"]
        best = k_curve(name) | {evaluation["K"]: evaluation["best_of_k"]["cen"]}
        null = {TARGETS - 1: pool, POOL: evaluation["nn_retrieval"]["cen"]}
        yield PublishedCurve(TITLES[name], family, best, null)
    gemma_4 = published("gemma4_31b")
    later = {"gemma-4-31B-it": gemma_4["it"], "gemma-4-31B": gemma_4["base"]}
    for title, record in {TITLES["gpt_oss_20b"]: published("gpt_oss_20b"), **later}.items():
        anchors, best = record["ceilings"], record["k_curve"]["cen"]
        null = {1: anchors["random_floor"]["cen"], anchors["pool"]: anchors["nn_retrieval"]["cen"]}
        family = "Gemma" if record in later.values() else "other"
        yield PublishedCurve(title, family, {int(k): y for k, y in best.items()}, null, at_least=True)


def published_curve(name: str) -> PublishedCurve:
    """That of one of the paper's three backbones."""
    return next(curve for curve in published_curves() if curve.title == TITLES[name])
