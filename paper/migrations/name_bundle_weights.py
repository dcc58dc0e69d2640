"""Writes into a shipped bundle's record what its backbone's weights are, as ``write_bundle`` does now. No tensor changes.

    python paper/migrations/name_bundle_weights.py bundles/gemma3-270m

The record says so under ``migrated``: this script, and the sha256 of the file it was made from.
"""

import hashlib
import sys
from pathlib import Path

from nla_utils.artefacts import read_record, write_record
from nla_utils.lm.registry import weights_note


def name_weights(path: Path) -> None:
    """Add ``weights`` to one ``bundle.json``."""
    record = read_record(path)
    made_from = {path.name: hashlib.sha256(path.read_bytes()).hexdigest()}
    record = {"identity": record.pop("identity"), "weights": weights_note([path.parent.name]), **record}
    write_record(path, {**record, "migrated": {"by": "paper/migrations/name_bundle_weights.py", "from": made_from}})


if __name__ == "__main__":
    name_weights(Path(sys.argv[1]) / "bundle.json")
