"""Gathers the records of a training study that was stopped before its end into one results file. No number is changed.

    python paper/migrations/gather_study.py STUDY RESULTS COMMIT

STUDY holds a folder with ``record.json`` for each variant that was finished, RESULTS is the run's folder of results,
COMMIT that of the code that trained them. Two keys are left out: the greedy scores of sources of 4 tokens, whose texts
that code let run to 64.
"""

import hashlib
import json
import sys
from pathlib import Path

PROVENANCE = ("profile", "identity", "sizes", "libraries")
LEFT_OUT = ("adapter_cen_greedy_mean", "shuffled_v_cen_greedy_mean",
            "adapter_cen_greedy_mean_minus_shuffled_v_cen_greedy_mean")  # fmt: skip


def variant(path: Path) -> dict:
    """The record of one variant."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if "4 tokens" in record["asked_on"]:
        for key in LEFT_OUT:
            record.pop(key)
            record["ci95"].pop(key)
    return {**record, "file_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def gather(study: Path, results: Path, commit: str) -> dict:
    """The results file of a study."""
    training = json.loads((results / "training.json").read_text(encoding="utf-8"))
    found = [variant(path) for path in sorted(study.glob("*/record.json"))]
    return {
        "name": "training_study",
        **{key: training[key] for key in PROVENANCE},
        "made_from": training["made_from"],
        "code": {"git_commit": commit, "dirty": False},
        "gathered_by": "paper/migrations/gather_study.py",
        "variants": sorted(found, key=lambda r: (r["part"], r["label"])),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    text = json.dumps(gather(Path(sys.argv[1]), folder, sys.argv[3]), indent=1, ensure_ascii=False)
    (folder / "training_study.json").write_text(text + "\n", encoding="utf-8")
