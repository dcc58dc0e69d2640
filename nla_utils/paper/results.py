"""Results files: the numbers of runs as JSON, in the authors' key names, with what they were made from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Optional

from nla_utils.artefacts import read_record, sha256_file
from nla_utils.config import PROFILES, ROOT, RunConfig
from nla_utils.lm import registry

COMMITTED = ROOT / "paper" / "results"
# Results from before the corpus's name was recorded have it in the run's name alone.
CORPUS = re.compile(r"-corpus-(.+)$")
# The files of §11; a run that lacks one is not shown. What extensions write beside them is optional.
NAMES = ("targets", "training", "oracle_ceiling", "centered_eval", "rerank_eval")


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
    def spec(self) -> registry.BackboneSpec:
        """The registry's entry of the backbone, or one that knows its name alone."""
        return registry.REGISTRY.get(self.backbone.partition("@")[0]) or registry.BackboneSpec(self.backbone, self.backbone)

    @property
    def name(self) -> str:
        """The backbone as its makers write it."""
        return self.spec.title or self.backbone

    @property
    def size(self) -> str:
        """How many targets, and of which corpus if it has one: ``30,000 targets``."""
        return f"{self.data['targets']['sizes']['N']:,} targets" + (f" of {self.corpus}" if self.corpus else "")

    @property
    def corpus(self) -> Optional[str]:
        """The name of the corpus that the targets are from; ``None`` for the model's own samples."""
        facts = self.data["targets"]
        older = CORPUS.search(self.profile) if "corpus_sha256" in facts else None
        return facts.get("corpus", older and older[1])

    @property
    def label(self) -> str:
        """What tables and figures call the run: ``Gemma-3-270M (base, 4-bit), 30,000 targets``."""
        return f"{self.spec.shown}, {self.size}"

    @property
    def stem(self) -> str:
        """The title as the beginning of file names."""
        return f"{self.backbone}-{self.profile}"

    @property
    def layer(self) -> int:
        return self.data["targets"]["identity"]["layer"]

    @property
    def seed(self) -> int:
        return self.data["targets"]["identity"]["seed"]

    @property
    def family(self) -> str:
        """Runs of one family differ in layer and seed alone: their sizes are the same, and what they were given."""
        facts, training = self.data["targets"], self.data["training"]
        given = [facts.get("corpus_sha256"), facts.get("released_targets"), training.get("av_sha256")]
        return json.dumps([facts["sizes"], given])

    @property
    def undertrained(self) -> bool:
        """Whether the run's AV was trained on fewer targets than the paper's."""
        return self.data["targets"]["sizes"]["N"] < PROFILES["paper"].n_targets

    @property
    def is_variant(self) -> bool:
        """Whether the run is one of a sweep, of another layer than the backbone's own or another seed than 1, and not to be
        shown on its own."""
        depth = self.data["targets"].get("num_layers")
        own = self.spec.layer or (round(0.73 * depth) if depth else self.layer)
        return (self.layer, self.seed) != (own, 1)

    def column(self, name: str, protocol: str) -> dict:
        """One protocol's numbers in a results file."""
        return self.data[name]["protocols"][protocol]

    @property
    def source_loss(self) -> Optional[dict]:
        """What v is worth to the AV in nats of the sources; ``None`` in results from before it was measured."""
        return self.data["centered_eval"].get("source_loss")

    def optional(self, name: str) -> Optional[dict]:
        """A results file that not every run has; ``None`` without it."""
        path = self.folder / f"{name}.json"
        return read_record(path) if path.exists() else None

    def sha256(self, name: str) -> str:
        return sha256_file(self.folder / f"{name}.json")


def load_results(folder: Path) -> Optional[RunResults]:
    """Results in ``folder`` (``…/<backbone>/<profile>``, files there or under ``results/``); ``None`` if
    not all files of §11 exist yet."""
    inner = folder / "results" if (folder / "results").is_dir() else folder
    if not all((inner / f"{n}.json").exists() for n in NAMES):
        return None
    data = {n: read_record(inner / f"{n}.json") for n in NAMES}
    return RunResults(data["targets"]["identity"]["backbone"], data["targets"]["profile"], data, inner)


def find_results(roots: Iterable[Path] = (COMMITTED,)) -> list[RunResults]:
    """Results of complete runs below the roots, sorted by backbone and profile; a later root wins over an earlier."""
    found: dict[tuple[str, str], RunResults] = {}
    for root in roots:
        for folder in sorted(p for p in Path(root).glob("*/*") if p.is_dir()):
            results = load_results(folder)
            if results is not None:
                found[results.backbone, results.profile] = results
    return [found[k] for k in sorted(found)]


def device_of(record: dict) -> str:
    """The device that a results file was computed on; older ones have it in their identity."""
    return record.get("device") or record["identity"]["device"]


def weights_note(everything: Iterable[RunResults]) -> str:
    """What the weights of the runs' backbones are, one sentence each, as the registry has it."""
    return registry.weights_note(r.backbone for r in everything)


def without_variants(
    everything: Iterable[RunResults], own: Optional[tuple[str, str]] = None
) -> list[RunResults]:
    """The results to show on their own: no variants of a sweep, but always ``own`` (backbone, profile)."""
    return [r for r in everything if not r.is_variant or (r.backbone, r.profile) == own]


def largest(everything: Iterable[RunResults]) -> list[RunResults]:
    """The results with the most targets of each backbone, the largest first."""
    best: dict[str, RunResults] = {}
    for results in everything:
        size = results.data["targets"]["sizes"]["N"]
        if results.backbone not in best or size > best[results.backbone].data["targets"]["sizes"]["N"]:
            best[results.backbone] = results
    return sorted(best.values(), key=lambda r: -r.data["targets"]["sizes"]["N"])


def foremost(everything: Iterable[RunResults], own: Optional[tuple[str, str]] = None) -> Optional[RunResults]:
    """The run that a section is about: ``own``, else the largest one of the default backbone, else of the first."""
    shown = list(everything)
    for results in shown:
        if (results.backbone, results.profile) == own:
            return results
    return max(largest(shown), key=lambda r: r.backbone == RunConfig.backbone, default=None)


def group(everything: Iterable[RunResults], alike, varied, least: int) -> list[dict[int, RunResults]]:
    """Results that agree in ``alike`` by what ``varied`` gives of them, where there are at least ``least`` of them."""
    groups: dict[tuple, dict[int, RunResults]] = {}
    for results in everything:
        groups.setdefault(alike(results), {})[varied(results)] = results
    return [dict(sorted(g.items())) for _, g in sorted(groups.items()) if len(g) >= least]
