"""Renames the line of a run's own AV in ``training_study.json``: no corner of the learning curve. No number changes.

    python paper/migrations/rename_own_variant.py RESULTS

RESULTS is the run's folder of results. The curve's corners are measured at the last step, the run's own AV at the step that
validation kept. The file says so under ``migrated``: this script, and the sha256 of the file it was made from.
"""

import hashlib
import sys
from pathlib import Path

from nla_utils.artefacts import read_record, write_record

OLD = {"part": "learning curve", "label": "all pairs, all steps: the run's own"}
NEW = {"part": "the run's own", "label": "the AV that validation kept"}


def rename(path: Path) -> None:
    """Rename the line of one results file."""
    record = read_record(path)
    record["variants"] = [{**v, **NEW} if OLD.items() <= v.items() else v for v in record["variants"]]
    made_from = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    write_record(path, {**record, "migrated": {"by": "paper/migrations/rename_own_variant.py", "from": made_from}})


if __name__ == "__main__":
    rename(Path(sys.argv[1]) / "training_study.json")
