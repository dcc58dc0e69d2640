"""Moves the tail reader's numbers out of §11's results files into ``tail_reader.json``. No number is changed.

Run once, from the repository's root, over results written before the tail reader had a notebook of its own:

    python paper/migrations/split_tail_reader.py

Each file that was touched says so under ``migrated``: this script, and the sha256 of the file it was made from.
"""

import hashlib
import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results"
# (file, key there, key in tail_reader.json)
MOVED = (
    ("training", "reader", "training"),
    ("centered_eval", "reader", "reader"),
    ("rerank_eval", "reader", "k_curve"),
    ("centered_eval", "compute", "compute"),
    ("centered_eval", "meaning", "meaning"),
)
PROVENANCE = ("profile", "identity", "sizes", "made_from", "code", "libraries")


def split(folder: Path) -> None:
    """Split the results files of one run."""
    whole = {name: (folder / f"{name}.json").read_bytes() for name in {file for file, _, _ in MOVED}}
    records = {name: json.loads(data) for name, data in whole.items()}
    by = {"by": "paper/migrations/split_tail_reader.py",
          "from": {f"{name}.json": hashlib.sha256(data).hexdigest() for name, data in whole.items()}}  # fmt: skip
    evaluation = records["centered_eval"]
    reader = {"name": "tail_reader", **{key: evaluation[key] for key in PROVENANCE}, "migrated": by}
    reader["made_from"] = {**evaluation["made_from"], "reader": records["training"]["made_from"].pop("reader")}
    records["rerank_eval"]["made_from"].pop("readings")
    for name, key, new in MOVED:
        reader[new] = records[name].pop(key)
        records[name]["migrated"] = {"by": by["by"], "from": {f"{name}.json": by["from"][f"{name}.json"]}}
    for name, record in {**records, "tail_reader": reader}.items():
        text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for evaluation in sorted(RESULTS.glob("*/*/centered_eval.json")):
        if not (evaluation.parent / "tail_reader.json").exists():
            split(evaluation.parent)
            print(evaluation.parent.relative_to(RESULTS))
