"""Released targets: named fields, checked against the backbone, never held in memory."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import with_out
from hub_server import Hub
from test_hub import in_a_process

from nla_utils.config import ROOT
from nla_utils.errors import ArtefactError
from nla_utils.stages.released import FIELDS, read_released
from nla_utils.stages.targets import make_targets
from nla_utils.stages.training import describe, train_av

N = 40


def every_position(run, ids):
    """(T + 1, d) of token ids behind the start token."""
    with torch.inference_mode():
        return run.backbone.hidden_at_layer(input_ids=torch.tensor([[run.backbone.start_id, *ids]]))[0].float()


def hidden(run, targets):
    return [every_position(run, targets.sequence(i)) for i in range(N)]


def padded_hidden(run, targets):
    """Rows of one length: what stands behind a text's end is another text's activations, not zeros."""
    out = torch.randn(N, targets.ids.shape[1] + 1, run.backbone.d)
    for i, h in enumerate(hidden(run, targets)):
        out[i, : len(h)] = h
    return out


def ids(run, targets):
    return [[run.backbone.start_id, *targets.sequence(i)] for i in range(N)]


def padded_ids(run, targets):
    out = torch.full((N, targets.ids.shape[1] + 1), run.backbone.pad_id)
    for i, row in enumerate(ids(run, targets)):
        out[i, : len(row)] = torch.tensor(row)
    return out


def lengths(run, targets):
    return torch.tensor(targets.lengths[:N].astype(np.int64) + 1)


LAYOUTS = {
    "lists": lambda r, t: {"hidden": hidden(r, t), "ids": ids(r, t), "text": ["not read"] * N},
    "records": lambda r, t: [{"hidden": h, "ids": i} for h, i in zip(hidden(r, t), ids(r, t))],
    "padded": lambda r, t: {"hidden": padded_hidden(r, t), "ids": padded_ids(r, t), "lengths": lengths(r, t)},
    "lists, padded ids": lambda r, t: {"hidden": hidden(r, t), "ids": padded_ids(r, t), "lengths": lengths(r, t)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_targets_it_was_made_of(tiny_run, tmp_path, layout):
    run, targets = tiny_run
    torch.save(LAYOUTS[layout](run, targets), tmp_path / "targets.pt")
    got = read_released(tmp_path, run.backbone, N)
    np.testing.assert_array_equal(got["lengths"], targets.lengths[:N])
    for i in range(N):
        assert got["ids"][i, : got["lengths"][i]].tolist() == targets.sequence(i)
    np.testing.assert_allclose(got["v"], targets.v[:N], atol=2e-4)
    assert got["ids"].dtype == np.int32 and got["v"].dtype == np.float32


def test_a_pack_of_another_layer_is_refused(gemma_run, tmp_path):
    run, targets = gemma_run
    torch.save(LAYOUTS["lists"](run, targets), tmp_path / "targets.pt")
    other = dataclasses.replace(run.backbone, layer=run.backbone.layer - 1)
    with pytest.raises(ArtefactError, match="re-encode to their activations at layer"):
        read_released(tmp_path, other, N)


@pytest.mark.parametrize("content, message", [
    ({"activations": torch.zeros(4, 5, 32), "ids": [[2]]}, r"holds \['activations', 'ids'\]"),
    ({"hidden": torch.zeros(4, 5, 32), "ids": torch.zeros(4, 5)}, "so it needs 'lengths'"),
    ({"hidden": [torch.zeros(2, 32)] * 4, "ids": [[7, 8]] * 4}, "begin with the start token"),
    ({"hidden": [torch.zeros(1, 32)] * 4, "ids": [[2, 8]] * 4}, "each valid id has an activation"),
    (torch.zeros(3), "holds Tensor"),
])  # fmt: skip
def test_what_has_other_fields_is_named(gemma_run, tmp_path, content, message):
    torch.save(content, tmp_path / "targets.pt")
    with pytest.raises(ArtefactError, match=message) as refused:
        read_released(tmp_path, gemma_run[0].backbone, 4)
    assert "targets.pt" in str(refused.value) and ("holds" not in message or all(f in str(refused.value) for f in FIELDS))


def test_a_pickle_is_not_run(gemma_run, tmp_path):
    run, _ = gemma_run
    torch.save({"code": subprocess.run}, tmp_path / "t.pt")
    with pytest.raises(ArtefactError, match="more than tensors and plain values"):
        read_released(tmp_path, run.backbone, 4)
    (tmp_path / "t.pt").write_bytes((tmp_path / "t.pt").read_bytes()[:-200])
    with pytest.raises(ArtefactError, match="broken"):
        read_released(tmp_path, run.backbone, 4)


def test_too_few_or_none_are_said_with_what_to_do(gemma_run, tmp_path):
    run, targets = gemma_run
    with pytest.raises(ArtefactError, match="exactly one .pt"):
        read_released(tmp_path, run.backbone, 4)
    torch.save(LAYOUTS["lists"](run, targets), tmp_path / "targets.pt")
    with pytest.raises(ArtefactError, match="--set n_targets=40"):
        read_released(tmp_path, run.backbone, 41)


def test_a_run_takes_released_targets_and_says_what_it_does_not_know(scored_run, tmp_path):
    run, targets, *_ = scored_run
    released = tmp_path / "released"
    released.mkdir()
    (released / "targets.safetensors").write_bytes(run.folder.file("targets.safetensors").read_bytes())
    other = with_out(run, tmp_path, released_targets=str(released), av=str(run.folder.file("av")))
    taken = make_targets(other)
    np.testing.assert_array_equal(taken.v, targets.v)
    folder = other.folder
    assert folder.load("targets").sidecar["released"] == str(released) and "targets-released" in folder.path.name
    facts = describe(train_av(other, taken), taken)
    assert facts["in_sample_trained_on"] is None and facts["held_out_trained_on"] is None


def test_a_large_pack_is_mapped_not_held(tmp_path):
    """A pack of 250 MB costs a fraction of that in memory."""
    h = [torch.zeros(65, 2304) for _ in range(420)]
    torch.save({"hidden": h, "ids": [list(range(65))] * 420}, tmp_path / "targets.pt")
    program = (
        "import sys, resource, pathlib, numpy as np, types; import nla_utils.stages.released as p\n"
        "p._check = lambda *a: None\n"
        "b = types.SimpleNamespace(d=2304, start_id=0, eos_ids=(), pad_id=0)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "got = p.read_released(pathlib.Path(sys.argv[1]), b, 420)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, got['v'].shape)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    grown_kb, shape = done.stdout.split(" ", 1)
    assert (tmp_path / "targets.pt").stat().st_size > 250e6 and shape.strip() == "(420, 2304)"
    assert int(grown_kb) < 100_000


def test_released_targets_come_from_a_dataset_of_the_hub(tmp_path):
    hub = Hub()
    hub.files["org/targets"] = {"targets.pt": b"x" * 5000, "notes.md": b"n"}
    hub.endpoint = hub.start()
    program = (
        "import json, sys; from nla_utils.lm.registry import fetch_targets\n"
        "folder = fetch_targets('hub:org/targets'); print(json.dumps([p.name for p in folder.glob('*.*')]))"
    )
    done = in_a_process(hub, tmp_path, program)
    hub.server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "targets.pt" in json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "hub" / "datasets--org--targets").is_dir()
