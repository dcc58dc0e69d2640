"""Released targets in every published layout: read, checked against the backbone, never held in memory."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from conftest import with_out
from hub_server import Hub
from test_hub import in_a_process

from nla_utils.config import ROOT
from nla_utils.encoding import re_encode
from nla_utils.errors import ArtefactError, CollapsedTargetsError, SourceError
from nla_utils.lm.weights import REGISTRY, fetch_targets
from nla_utils.protocol import CORRECTED
from nla_utils.targets import SAMPLES_PER_OPENING, Targets, make_targets, read_released
from nla_utils.training import describe, train_av
from nla_utils.verbalizer import published_pairs

N, LONGEST = 40, 12


def every_position(run, ids):
    """(T + 1, d) of token ids behind the start token."""
    with torch.inference_mode():
        return run.backbone.hidden_at_layer(input_ids=torch.tensor([[run.backbone.start_id, *ids]]))[0].float()


def sayable(backbone, sequences, n=N, longest=LONGEST):
    """n sequences whose texts, tokenized again, give the same ids; every third is shorter and ends in an EOS."""
    found = []
    for sequence in sequences:
        ids = backbone.tokenize_text(backbone.decode_text(sequence))
        ids = [*ids[: longest - 5], backbone.eos_ids[0]] if len(found) % 3 == 1 else ids[:longest]
        fits = len(ids) == (longest - 4 if len(found) % 3 == 1 else longest)
        if fits and said(backbone, ids) == [i for i in ids if i not in backbone.eos_ids]:
            found.append(ids)
        if len(found) == n:
            return found
    raise AssertionError(f"{len(found)} of {n}")


def said(backbone, ids):
    return backbone.tokenize_text(backbone.decode_text(ids))


@pytest.fixture(scope="module")
def pack(tiny_run):
    """(run, ids behind no start token, activations at every position, v) of 40 samples of a tiny backbone."""
    run, targets = tiny_run
    rows = sayable(run.backbone, (targets.sequence(i) for i in range(len(targets.v))))
    hidden = [every_position(run, ids) for ids in rows]
    return run, rows, hidden, np.stack([h[-1].numpy() for h in hidden])


def meta(run):
    return {"backbone_id": "of a folder", "extraction_layer": run.backbone.layer, "d": 32, "seed": 1}


def behind_start(run, rows):
    return [[run.backbone.start_id, *ids] for ids in rows]


def padded(tensors, fill, width=LONGEST + 1):
    """One tensor; what follows a sample's end is another text's activations or ids, not zeros."""
    out = fill(len(tensors), width, *tensors[0].shape[1:])
    for filled, x in zip(out, tensors):
        filled[: len(x)] = x
    return out


def masks(rows, width):
    return [torch.tensor([1] * (len(ids) + 1) + [0] * (width - len(ids) - 1)) for ids in rows]


def texts_of(run, rows):
    return [run.backbone.decode_text(ids) for ids in rows]


def left_padded(tensors):
    return [torch.cat([torch.randn(LONGEST + 1 - len(h), 32), h]) for h in tensors]


def noise(*shape):
    return torch.randn(shape)


# How each is published (or written by the authors' sampler), and how it is padded where it is.
LAYOUTS = {
    "gemma, by its card": lambda run, rows, h: {
        "activations": h,
        "sequences": [torch.tensor(s) for s in behind_start(run, rows)],
        "meta": meta(run),
    },
    "gemma, by its sampler": lambda run, rows, h: {
        "activations": h,
        "sequences": texts_of(run, rows),
        "meta": meta(run),
    },
    "llama": lambda run, rows, h: {
        "activations": padded(h, noise).bfloat16(),
        "sequences": padded([torch.tensor(s) for s in behind_start(run, rows)], lambda *s: torch.full(s, 7)),
        "d": 32,
        "bos_token_id": run.backbone.start_id,
        "meta": {"backbone": "x", "layer": run.backbone.layer, "seed": 1},
    },
    "qwen": lambda run, rows, h: {
        "activations": [x.bfloat16() for x in h],
        "texts": texts_of(run, rows),
        "attn_masks": [torch.ones(len(x)) for x in h],
        "meta": meta(run),
    },
    "qwen, padded": lambda run, rows, h: {
        "activations": [x.bfloat16() for x in padded(h, noise, LONGEST + 4)],
        "texts": texts_of(run, rows),
        "attn_masks": masks(rows, LONGEST + 4),
    },
    "qwen, padded on the left": lambda run, rows, h: {
        "activations": left_padded(h),
        "texts": texts_of(run, rows),
        "attn_masks": [m.flip(0) for m in masks(rows, LONGEST + 1)],
    },
    "the sampler's today": lambda run, rows, h: {
        "activations": [x + 9 for x in h],
        "sequences": texts_of(run, rows),
        "token_ids": behind_start(run, rows),
        "activations_by_layer": {run.backbone.layer - 1: [x + 5 for x in h], run.backbone.layer: h},
    },
}


STORED_IN_BFLOAT16 = ("llama", "qwen", "qwen, padded")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_gives_the_targets_it_was_made_of(pack, tmp_path, layout):
    run, rows, hidden, v = pack
    torch.save(LAYOUTS[layout](run, rows, hidden), tmp_path / "targets.pt")
    got, facts = read_released(tmp_path / "targets.pt", run.backbone, N)
    assert facts["texts_unmatched"] == 0
    assert [got["ids"][i, : got["lengths"][i]].tolist() for i in range(N)] == rows
    stored = torch.from_numpy(v).bfloat16().float().numpy() if layout in STORED_IN_BFLOAT16 else v
    np.testing.assert_array_equal(got["v"], stored)
    assert got["ids"].dtype == np.int32 and got["v"].dtype == np.float32


@pytest.mark.parametrize("nested", [True, False])
def test_parquet_is_read_a_batch_at_a_time_at_the_runs_layer(pack, tmp_path, nested):
    run, rows, hidden, v = pack
    shaped = [list(h.numpy()) if nested else h.numpy().ravel() for h in hidden]
    texts, layer = texts_of(run, rows), run.backbone.layer
    other = pd.DataFrame({"text": texts, "activations": [x[:1] for x in shaped], "layer": layer - 1})
    own = pd.DataFrame({"text": texts, "activations": shaped, "layer": layer})
    pd.concat([other, own]).to_parquet(tmp_path / "targets.parquet")
    got, facts = read_released(tmp_path / "targets.parquet", run.backbone, N)
    np.testing.assert_array_equal(got["v"], v)
    assert facts == {"texts": "tokenized again", "texts_unmatched": 0}
    assert [got["ids"][i, : got["lengths"][i]].tolist() for i in range(N)] == rows


def test_a_text_that_does_not_give_its_tokens_back_is_counted_and_kept_as_a_vector(pack, tmp_path, capsys):
    run, rows, hidden, v = pack
    texts = texts_of(run, rows)
    texts[3], texts[5] = texts[3] + " and more", ""
    torch.save({"activations": hidden, "texts": texts}, tmp_path / "targets.pt")
    got, facts = read_released(tmp_path / "targets.pt", run.backbone, N)
    assert facts["texts_unmatched"] == 2 and np.flatnonzero(got["lengths"] == 0).tolist() == [3, 5]
    assert "2 of 40 texts, tokenized again" in capsys.readouterr().out
    np.testing.assert_array_equal(got["v"], v)
    targets = Targets(got["ids"], got["lengths"], got["v"], 4, 8, "")
    assert {3, 5}.isdisjoint(published_pairs(run.backbone, targets, np.arange(N))[0].rows)
    replay = re_encode(run.backbone, targets.sequences(np.arange(N)), CORRECTED)
    assert np.flatnonzero(np.isnan(replay).any(axis=1)).tolist() == [3, 5]
    np.testing.assert_allclose(replay[6], v[6], rtol=1e-3, atol=1e-3)


def test_vectors_alone_are_targets_without_texts(pack, tmp_path):
    run, _, _, v = pack
    torch.save(torch.from_numpy(v), tmp_path / "targets_pool.pt")
    got, facts = read_released(fetch_targets(str(tmp_path), run.backbone.spec), run.backbone, N)
    np.testing.assert_array_equal(got["v"], v)
    assert facts["texts"] == "none" and not got["lengths"].any()


# What does not fit


def saved(tmp_path, content):
    torch.save(content, tmp_path / "targets.pt")
    return tmp_path / "targets.pt"


def causes(run, rows, h):
    """Packs that are wrong in one way each, and what is said of them."""
    turned = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1)))[0]
    other = dataclasses.replace(run.backbone, layer=run.backbone.layer - 1)
    elsewhere = SimpleNamespace(backbone=other)
    return {
        "another layer": (
            [every_position(elsewhere, ids) for ids in rows],
            f"those of layer {other.layer}: add --layer",
        ),
        "other weights": ([x @ turned for x in h], "of other weights"),
        "padding": ([torch.cat([x, torch.randn(2, 32)]) for x in h], "the last one is padding"),
    }


@pytest.mark.parametrize("wrong", ["another layer", "other weights", "padding"])
def test_a_pack_whose_texts_do_not_give_its_activations_is_refused_with_the_cause(pack, tmp_path, wrong):
    run, rows, hidden, _ = pack
    activations, message = causes(run, rows, hidden)[wrong]
    masked = [torch.tensor([1] * len(ids) + [0] * (len(x) - len(ids) - 1) + [1]) for x, ids in zip(activations, rows)]
    content = {"activations": activations, "token_ids": behind_start(run, rows)}
    if wrong == "padding":
        content = {"activations": activations, "texts": texts_of(run, rows), "attn_masks": masked}
    with pytest.raises(ArtefactError, match=message):
        read_released(saved(tmp_path, content), run.backbone, N)


def test_a_collapsed_pack_is_named(pack, tmp_path):
    run, rows, hidden, _ = pack
    content = {"activations": [hidden[0][:1].expand(len(h), -1) for h in hidden], "token_ids": behind_start(run, rows)}
    with pytest.raises(CollapsedTargetsError, match="cut at the start token"):
        read_released(saved(tmp_path, content), run.backbone, N)


def test_texts_of_another_tokenizer_are_refused(pack, tmp_path):
    run, rows, hidden, _ = pack
    content = {"activations": hidden, "texts": ["of other words altogether, and longer"] * N}
    with pytest.raises(ArtefactError, match="of another tokenizer, or the activations are padded"):
        read_released(saved(tmp_path, content), run.backbone, N)


@pytest.mark.parametrize(
    "stated, message",
    [
        ({"extraction_layer": 9}, "its layer is 9"),
        ({"layer": "2"}, "its layer is '2'"),
        ({"d": 64}, "its d is 64"),
        ({"bos_token_id": 300}, "its start token is 300"),
        ({"backbone_id": "google/gemma-2-2b"}, "backbone is 'google"),
    ],
)
def test_what_a_pack_says_of_itself_is_compared_with_the_run(gemma_run, tmp_path, stated, message):
    backbone = gemma_run[0].backbone
    backbone = dataclasses.replace(backbone, spec=dataclasses.replace(backbone.spec, source="org/other@main"))
    content = {"activations": torch.zeros(4, 5, 32), "token_ids": [[2, 8, 8, 8, 8]] * 4, "meta": stated}
    with pytest.raises(ArtefactError, match=message):
        read_released(saved(tmp_path, content), backbone, 4)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"hidden": torch.zeros(4, 5, 32), "ids": [[2]]}, r"holds \['hidden', 'ids'\], no released targets"),
        ({"activations": torch.zeros(4, 5, 32), "texts": ["a"] * 4}, "it needs 'attn_masks'"),
        ({"activations": [torch.zeros(2, 32)] * 4, "token_ids": [[7, 8]] * 4}, "begin with the start token"),
        ({"activations": [torch.zeros(1, 32)] * 4, "token_ids": [[2, 8]] * 4}, "each valid one has an activation"),
        ({"activations": [torch.zeros(2, 32)] * 4, "token_ids": [[2, 8]] * 3}, "of 4 samples and ids of 3"),
        ({"activations_by_layer": {1: [torch.zeros(2, 32)] * 4}}, r"holds layers \[1\], this run reads layer 3"),
        ({"activations": [torch.zeros(2, 64)] * 4, "token_ids": [[2, 8]] * 4}, "width 64, the backbone has 32"),
        (torch.zeros(3), "holds a Tensor"),
        ({"activations": []}, "no released targets"),
    ],
)
def test_what_is_no_pack_is_named(gemma_run, tmp_path, content, message):
    with pytest.raises(ArtefactError, match=message) as refused:
        read_released(saved(tmp_path, content), gemma_run[0].backbone, 4)
    assert "targets.pt" in str(refused.value)


def test_a_pickle_is_not_run(gemma_run, tmp_path):
    path, backbone = saved(tmp_path, {"code": subprocess.run}), gemma_run[0].backbone
    with pytest.raises(ArtefactError, match="more than tensors and plain values"):
        read_released(path, backbone, 4)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ArtefactError, match="broken"):
        read_released(path, backbone, 4)
    for name in ("targets.safetensors", "targets.parquet"):
        (tmp_path / name).write_bytes(b"cut")
        with pytest.raises(ArtefactError, match="was not read"):
            read_released(tmp_path / name, backbone, 4)


def test_too_few_none_or_several_files_are_named(pack, tmp_path):
    run, rows, hidden, _ = pack
    spec = run.backbone.spec
    with pytest.raises(SourceError, match="targets are targets.safetensors"):
        fetch_targets(str(tmp_path), spec)
    path = saved(tmp_path, LAYOUTS["gemma, by its card"](run, rows, hidden))
    assert fetch_targets(str(tmp_path), spec) == fetch_targets(str(path), spec) == path
    with pytest.raises(ArtefactError, match="--set n_targets=40"):
        read_released(path, run.backbone, 41)
    torch.save([], tmp_path / "other.pt")
    with pytest.raises(SourceError, match="give the path of the one"):
        fetch_targets(str(tmp_path), spec)
    with pytest.raises(SourceError, match="authors published some for gemma2-2b"):
        fetch_targets("released", REGISTRY["smollm2-135m"])


# Runs, memory, the hub


def test_a_run_takes_our_own_released_targets_and_says_what_it_does_not_know(scored_run, tmp_path):
    run, targets, *_ = scored_run
    released = tmp_path / "released"
    released.mkdir()
    (released / "targets.safetensors").write_bytes(run.folder.file("targets.safetensors").read_bytes())
    other = with_out(run, tmp_path, released_targets=str(released), av=str(run.folder.file("av")))
    taken = make_targets(other)
    np.testing.assert_array_equal(taken.v, targets.v)
    folder = other.folder
    assert folder.load("targets").sidecar["released"] == "released" and "targets-released" in folder.path.name
    facts = describe(train_av(other, taken), taken)
    assert facts["in_sample_trained_on"] is None and facts["held_out_trained_on"] is None


def test_a_pack_of_5_gigabytes_is_read_in_less_than_one(tmp_path):
    """Samples of 65 positions, of which an eighth as many are read at one opening as of a real one; holes of a sparse
    file: read like any other, but without room on the disk."""
    path, n, d = tmp_path / "targets.pt", 1_875, 10_400
    assert n > SAMPLES_PER_OPENING / 8
    # Never touched, so never in memory; without their data, which is then a hole of the file.
    activations = [torch.empty(65, d) for _ in range(n)]
    with torch.serialization.skip_data():
        torch.save({"activations": activations, "sequences": [[0] + [7] * 64] * n}, path)
    assert path.stat().st_size > 5e9 and path.stat().st_blocks * 512 < 1e9
    program = (
        "import sys, re, pathlib, types; import nla_utils.targets as r\n"
        "from nla_utils.lm.weights import REGISTRY\n"
        f"b = types.SimpleNamespace(spec=REGISTRY['gemma2-2b'], layer=19, d={d}, start_id=0, eos_ids=(1,), pad_id=0)\n"
        "r._check = lambda *a: None\n"
        "r.SAMPLES_PER_OPENING //= 8\n"
        f"got, _ = r.read_released(pathlib.Path(sys.argv[1]), b, {n})\n"
        # Not ru_maxrss: a child starts with its parent's.
        "most = re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text()).group(1)\n"
        "print(most, got['v'].shape, got['lengths'].min())"
    )
    done = warm.run([sys.executable, "-c", program, str(path)], cwd=ROOT)
    path.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    most_kb, read = done.stdout.split(" ", 1)
    assert read.strip() == f"({n}, {d}) 64" and int(most_kb) < 0.8e6
    print(f"{int(most_kb) / 1e6:.2f} GB of memory")


def test_released_targets_come_from_a_dataset_of_the_hub(tmp_path):
    hub = Hub()
    hub.files["org/targets"] = {"targets.pt": b"x" * 5000, "notes.md": b"n"}
    hub.endpoint = hub.start()
    program = (
        "import json, sys; from nla_utils.lm.weights import REGISTRY, fetch_targets\n"
        "path = fetch_targets('hub:org/targets', REGISTRY['gemma2-2b'])\n"
        "print(json.dumps([path.name, path.parent.name]))"
    )
    done = in_a_process(hub, tmp_path, program)
    hub.server.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["targets.pt", hub.commit("org/targets")]
    assert (tmp_path / "hub" / "datasets--org--targets").is_dir()
