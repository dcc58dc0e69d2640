"""Results files: the numbers of a run as JSON, in the authors' key names, with what they were made from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Mapping, Optional

from nla_utils.config import ROOT, RunConfig
from nla_utils.store import RunFolder, code_version, library_versions, read_json, sha256_file, write_json

VARIED = re.compile(r"(layer|seed)\d+")
NAMES = ("targets", "training", "oracle_ceiling", "centered_eval", "rerank_eval")
DEPTH = "depth"
# Results files that only some runs have.
OPTIONAL = ("reader_ablation", "reader_seeds", DEPTH)
# Keys of the differences that several tables and sentences show.
GREEDY_MINUS_RETRIEVAL = "adapter_cen_greedy_mean_minus_nn_retrieval_cen_mean"
GREEDY_MINUS_OTHERS = "adapter_cen_greedy_mean_minus_shuffled_v_cen_greedy_mean"
BEST_MINUS_UNRELATED = "adapter_cen_bestofK_mean_minus_unrelated_text_cen_bestofK_mean"
BEST_MINUS_OTHERS = "adapter_cen_bestofK_mean_minus_shuffled_v_cen_bestofK_mean"


def results_file(folder: RunFolder, name: str) -> Path:
    return folder.file(f"results/{name}.json")


def write_results(
    folder: RunFolder, run: RunConfig, name: str, values: Mapping, made_from: Mapping[str, str]
) -> Path:
    """Write ``results/{name}.json``: provenance first, then ``values``."""
    path = results_file(folder, name)
    sizes = run.sizes
    record = {
        "name": name,
        "profile": run.folder_name,
        "identity": folder.identity,
        "sizes": {"N": sizes.n_targets, "M": sizes.n_eval, "K": sizes.n_rollouts, "pool": sizes.pool_size,
                  "epochs": sizes.epochs, "T": sizes.max_new_tokens},
        "made_from": dict(made_from),
        "code": code_version(),
        "libraries": library_versions(),
        **values,
    }  # fmt: skip
    write_json(path, record)
    return path


def family_of(profile: str) -> str:
    """A run's name without what a sweep varies: its layer and its seed."""
    return "-".join(p for p in profile.split("-") if not VARIED.fullmatch(p))


@dataclass(frozen=True)
class RunResults:
    """The results files of one run, by name; ``files`` are their paths."""

    backbone: str
    profile: str
    data: dict[str, dict]
    files: dict[str, Path]

    @property
    def title(self) -> str:
        return f"{self.backbone} · {self.profile}"

    @property
    def layer(self) -> int:
        return self.data["targets"]["identity"]["layer"]

    @property
    def seed(self) -> int:
        return self.data["targets"]["identity"]["seed"]

    @property
    def family(self) -> str:
        """Runs of one family differ in layer and seed alone."""
        return family_of(self.profile)

    @property
    def is_variant(self) -> bool:
        """Whether the run is one of a sweep beside a plain run, and not to be shown on its own."""
        return self.family != self.profile

    def column(self, name: str, protocol: str) -> dict:
        return self.data[name]["protocols"][protocol]

    @property
    def everything(self) -> dict[str, dict]:
        """All results files by name, with those that not every run has."""
        return self.data | {name: found for name in OPTIONAL if (found := optional_results(self, name))}

    def sha256(self, name: str) -> str:
        return sha256_file(self.files["targets"].with_name(f"{name}.json"))


def load_run(folder: Path) -> RunResults | None:
    """Results in ``folder`` (``…/<backbone>/<profile>``, files there or under ``results/``); ``None`` if
    not all of them exist yet."""
    inner = folder / "results" if (folder / "results").is_dir() else folder
    files = {n: inner / f"{n}.json" for n in NAMES}
    if not all(f.exists() for f in files.values()):
        return None
    data = {n: read_json(f) for n, f in files.items()}
    return RunResults(data["targets"]["identity"]["backbone"], data["targets"]["profile"], data, files)


def optional_results(run: RunResults, name: str) -> Optional[dict]:
    """A results file that not every run has, beside its others; ``None`` without it."""
    path = run.files["targets"].with_name(f"{name}.json")
    return read_json(path) if path.exists() else None


def find_runs(roots: Iterable[Path]) -> list[RunResults]:
    """Complete runs below the roots, sorted by backbone and profile; a later root wins over an earlier one."""
    found: dict[tuple[str, str], RunResults] = {}
    for root in roots:
        for folder in sorted(p for p in Path(root).glob("*/*") if p.is_dir()):
            run = load_run(folder)
            if run is not None:
                found[run.backbone, run.profile] = run
    return [found[k] for k in sorted(found)]


def plain_runs(runs: Iterable[RunResults], own: Optional[tuple[str, str]] = None) -> list[RunResults]:
    """The runs to show on their own: no variants of a sweep, but always ``own`` (backbone, profile)."""
    return [r for r in runs if not r.is_variant or (r.backbone, r.profile) == own]


def largest_runs(runs: Iterable[RunResults]) -> list[RunResults]:
    """The run with the most targets of each backbone."""
    best: dict[str, RunResults] = {}
    for run in runs:
        size = run.data["targets"]["sizes"]["N"]
        if run.backbone not in best or size > best[run.backbone].data["targets"]["sizes"]["N"]:
            best[run.backbone] = run
    return list(best.values())


def committed_results() -> Path:
    return ROOT / "paper" / "results"
