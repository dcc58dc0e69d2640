"""Released targets: packs of either layout, told apart by shape, checked against the backbone, never held in memory."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CORPUS
from hub_server import Hub
from test_hub import in_a_process

from nla_utils.config import ROOT
from nla_utils.packs import find_columns, read_released
from nla_utils.store import ArtefactError, RunFolder
from nla_utils.targets import make_targets
from nla_utils.training import describe, train_av

N = 40


def every_position(run, ids):
    """(T + 1, d) of token ids behind the start token."""
    with torch.inference_mode():
        return run.backbone.hidden_at_layer(input_ids=torch.tensor([[run.backbone.start_id, *ids]]))[0].float()


def lists(run, targets):
    return [every_position(run, targets.sequence(i)) for i in range(N)]


def dense(run, targets):
    """Rows of one length: what stands behind a text's end is another text's activations, not zeros."""
    width = targets.ids.shape[1] + 1
    out = torch.randn(N, width, run.backbone.d)
    for i, h in enumerate(lists(run, targets)):
        out[i, : len(h)] = h
    return out


def padded_ids(run, targets):
    ids = torch.full((N, targets.ids.shape[1] + 1), run.backbone.pad_id)
    ids[:, 0] = run.backbone.start_id
    for i in range(N):
        ids[i, 1 : targets.lengths[i] + 1] = torch.tensor(targets.sequence(i))
    return ids


def texts(run, targets):
    return [run.backbone.decode_text(targets.sequence(i)) for i in range(N)]


def with_start(run, targets):
    return [[run.backbone.start_id, *targets.sequence(i)] for i in range(N)]


LAYOUTS = {
    "lists with ids": lambda r, t: {"hidden": lists(r, t), "tokens": with_start(r, t), "text": texts(r, t)},
    "lists, ids without start": lambda r, t: {"h": lists(r, t), "x": [torch.tensor(t.sequence(i)) for i in range(N)]},
    "lists, padded ids": lambda r, t: {"h": lists(r, t), "ids": padded_ids(r, t)},
    "lists without the start's activation": lambda r, t: {"h": [h[1:] for h in lists(r, t)], "ids": with_start(r, t)},
    "records": lambda r, t: [{"acts": h, "ids": i} for h, i in zip(lists(r, t), with_start(r, t))],
    "nested records": lambda r, t: {"layer": 3, "samples": [{"a": h, "i": i} for h, i in
                                                            zip(lists(r, t), with_start(r, t))]},
    "dense with mask": lambda r, t: {"h": dense(r, t), "ids": padded_ids(r, t),
                                     "mask": torch.arange(t.ids.shape[1] + 1) <= torch.tensor(t.lengths[:N])[:, None]},
    "dense with lengths": lambda r, t: {"h": dense(r, t), "ids": padded_ids(r, t),
                                        "n": torch.tensor(t.lengths[:N].astype(np.int64) + 1)},
    "dense, ends at EOS": lambda r, t: {"h": dense(r, t).half().float(), "ids": padded_ids(r, t)},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_either_layout_gives_the_targets_it_was_made_of(tiny_run, tmp_path, layout):
    run, targets = tiny_run
    torch.save(LAYOUTS[layout](run, targets), tmp_path / "targets.pt")
    got = read_released(tmp_path, run.backbone, N)
    np.testing.assert_array_equal(got["lengths"], targets.lengths[:N])
    for i in range(N):
        assert got["ids"][i, : got["lengths"][i]].tolist() == targets.sequence(i)
    np.testing.assert_allclose(got["v"], targets.v[:N], atol=2e-2 if "EOS" in layout else 2e-4)
    assert got["ids"].dtype == np.int32 and got["v"].dtype == np.float32


def test_a_pack_of_texts_is_tokenized(tiny_run, tmp_path):
    run, targets = tiny_run
    words = CORPUS.read_text().split()
    lines = [" ".join(words[i : i + 5]) for i in range(N)]
    ids = [run.backbone.tokenize_text(x) for x in lines]
    torch.save({"activation": [every_position(run, x) for x in ids], "text": lines}, tmp_path / "targets.pt")
    got = read_released(tmp_path, run.backbone, N)
    np.testing.assert_allclose(got["v"], run.backbone.encode(ids, start=True), atol=2e-4)
    assert got["ids"][3, : got["lengths"][3]].tolist() == ids[3]


def test_a_pack_of_another_layer_is_refused(gemma_run, tmp_path):
    run, targets = gemma_run
    torch.save(LAYOUTS["lists with ids"](run, targets), tmp_path / "targets.pt")
    other = dataclasses.replace(run.backbone, layer=run.backbone.layer - 1)
    with pytest.raises(ArtefactError, match="re-encode to their activations at layer"):
        read_released(tmp_path, other, N)


@pytest.mark.parametrize("content, message", [
    ({"ids": torch.zeros(4, 5, dtype=torch.long)}, "0 of its fields look like activations"),
    ({"a": torch.zeros(4, 5, 32), "b": torch.zeros(4, 5, 32)}, "2 of its fields"),
    ({"a": torch.zeros(4, 5, 32)}, "neither token ids nor texts"),
    (torch.zeros(3), "expected a mapping"),
])  # fmt: skip
def test_what_cannot_be_told_apart_is_named(content, message):
    with pytest.raises(ArtefactError, match=message):
        find_columns(content, 32, "pack.pt")


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
    torch.save(LAYOUTS["lists with ids"](run, targets), tmp_path / "targets.pt")
    with pytest.raises(ArtefactError, match="--set n_targets=40"):
        read_released(tmp_path, run.backbone, 41)


def test_a_run_takes_released_targets_and_says_what_it_does_not_know(scored_run, tmp_path):
    run, targets, *_ = scored_run
    released = tmp_path / "released"
    released.mkdir()
    (released / "targets.safetensors").write_bytes(run.folder.file("targets.safetensors").read_bytes())
    changes = {"released_targets": str(released), "av": str(run.folder.file("av")), "out": str(tmp_path)}
    config = dataclasses.replace(run.config, **changes)
    folder = RunFolder.of(config, run.backbone.name, run.folder.identity)
    taken = make_targets(config, run.backbone, folder)
    np.testing.assert_array_equal(taken.v, targets.v)
    assert folder.load("targets").sidecar["released"] == str(released) and "targets-released" in folder.path.name
    facts = describe(train_av(config, run.backbone, taken, folder), taken)
    assert facts["in_sample_trained_on"] is None and facts["held_out_trained_on"] is None


def test_a_large_pack_is_mapped_not_held(tmp_path):
    """A pack of 250 MB costs a fraction of that in memory."""
    h = [torch.zeros(65, 2304) for _ in range(420)]
    torch.save({"h": h, "ids": [list(range(65))] * 420}, tmp_path / "targets.pt")
    program = (
        "import sys, resource, pathlib, numpy as np, types; import nla_utils.packs as p\n"
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
        "import json, sys; from nla_utils.sources import fetch_targets\n"
        "folder = fetch_targets('hub:org/targets'); print(json.dumps([p.name for p in folder.glob('*.*')]))"
    )
    done = in_a_process(hub, tmp_path, program)
    hub.server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "targets.pt" in json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "hub" / "datasets--org--targets").is_dir()
