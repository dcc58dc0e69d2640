"""Smoke runs of the four tiny backbones leave what the golden record holds: no change of structure moves a number."""

import json

import golden
import pytest
from conftest import TINY

RECORD = json.loads(golden.RECORD.read_text(encoding="utf-8"))
# Within one kind of machine arrays are compared to the last bit; sums over them may be taken in another order.
TIGHT, LOOSE = 1e-9, 1e-3


def differences(ours, theirs, tolerance, path=""):
    """Where two results differ, as text."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        if set(ours) != set(theirs):
            yield f"{path}: keys {sorted(set(ours) ^ set(theirs))}"
        for key in set(ours) & set(theirs):
            yield from differences(ours[key], theirs[key], tolerance, f"{path}/{key}")
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(ours) != len(theirs):
            yield f"{path}: length {len(ours)}, was {len(theirs)}"
        for i, pair in enumerate(zip(ours, theirs)):
            yield from differences(*pair, tolerance, f"{path}/{i}")
    elif isinstance(theirs, float) and isinstance(ours, (int, float)):
        if not ours == pytest.approx(theirs, rel=tolerance, abs=tolerance):
            yield f"{path}: {ours}, was {theirs}"
    elif ours != theirs:
        yield f"{path}: {ours}, was {theirs}"


# Backwards, as test_evidence.py goes forwards: two processes then make runs that both need, each another.
@pytest.mark.parametrize("name", sorted(TINY, reverse=True))
def test_arrays_and_results_are_those_of_the_record(reproduced_tiny, name):
    ours, theirs = golden.record_of(reproduced_tiny(name)[2]), RECORD["backbones"][name]
    same_machine = golden.kind_of_machine() == RECORD["kind_of_machine"]
    assert set(ours["arrays"]) == set(theirs["arrays"])
    if same_machine:
        changed = {k for k, digest in theirs["arrays"].items() if ours["arrays"][k] != digest}
        assert not changed, sorted(changed)
    found = list(differences(ours["results"], theirs["results"], TIGHT if same_machine else LOOSE))
    assert not found, "\n".join(found[:20])


def test_a_changed_number_is_found():
    theirs = RECORD["backbones"]["tiny-llama"]["results"]
    ours = json.loads(json.dumps(theirs))
    ours["centered_eval"]["protocols"]["published"]["adapter_cen_greedy_mean"] += 1e-6
    assert len(list(differences(ours, theirs, TIGHT))) == 1
