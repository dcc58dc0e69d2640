"""The three released systems end to end, on stand-ins: a hub on loopback with the authors' repositories, files and layouts
over tiny random backbones of the three families. It shows that the real command works, nothing of the real numbers."""

import io
import json
import sys

import numpy as np
import pytest
import torch
import warm
from conftest import PUBLISHED_AV, SHAPE, build_tokenizer, save_tiny
from hub_server import Hub
from test_released import every_position, sayable
from tokenizers import AddedToken, Tokenizer, models
from transformers import Gemma2Config, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from nla_utils.config import ROOT, RunConfig
from nla_utils.lm.sampling import row_streams
from nla_utils.lm.weights import REGISTRY
from nla_utils.run import open_run
from nla_utils.targets import draw_sequences, target_settings

N, M, K, POOL, LONGEST = 60, 6, 4, 32, 12
SIZES = [
    f"--set={name}={value}" for name, value in (("n_targets", N), ("n_eval", M), ("n_rollouts", K), ("pool_size", POOL))
]
LATER = {"use_layer_embed": False, "inject_norm": "none", "use_rotor": False}


def qwen_tokenizer():
    """Its <|endoftext|> has the real one's id; no token has the ids between it and the others."""
    plain = json.loads(build_tokenizer("right", True, False).backend_tokenizer.to_str())
    vocabulary = {k: v for k, v in plain["model"]["vocab"].items() if k not in ("<eos>", "<bos>")}
    vocabulary["<|endoftext|>"] = REGISTRY["qwen25-7b"].start_id
    tokenizer = Tokenizer.from_str(json.dumps({**plain, "added_tokens": []}))
    tokenizer.model = models.BPE(vocab=vocabulary, merges=[tuple(m) for m in plain["model"]["merges"]])
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True), AddedToken("<pad>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<|endoftext|>")


# Layers as the real ones have them, so that the registry's layer is one of them.
def backbone_of(name, folder):
    shape = SHAPE | {"num_hidden_layers": 26 if name == "gemma2-2b" else 28, "initializer_range": 0.1}
    if name == "gemma2-2b":
        more = dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=64)
        return save_tiny(folder, lambda ids: Gemma2Config(**shape, **ids, **more), build_tokenizer("left", False, True))
    if name == "llama32-3b":
        return save_tiny(folder, lambda ids: LlamaConfig(**shape, **ids), build_tokenizer("right", False, True))
    ids = {"vocab_size": 151_936, "bos_token_id": None}
    return save_tiny(folder, lambda own: Qwen2Config(**shape, **(own | ids)), qwen_tokenizer(), quiet=True)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def pack_of(name, spec, run, rows, hidden):
    """The targets repository's files, in the layout that the authors' card gives."""
    start, stated = run.backbone.start_id, {"layer": spec.layer, "seed": 1}
    ids = [torch.tensor([start, *row]) for row in rows]
    if name == "gemma2-2b":
        about = {
            "backbone_id": spec.source,
            "extraction_layer": spec.layer,
            "d": 32,
            "seed": 1,
            "temperature": 1.0,
            "top_p": 1.0,
        }
        content = {"activations": hidden, "sequences": ids, "meta": about}
    elif name == "llama32-3b":
        dense, dense_ids = (
            torch.zeros(len(rows), LONGEST + 1, 32),
            torch.zeros(len(rows), LONGEST + 1, dtype=torch.long),
        )
        for i, (h, x) in enumerate(zip(hidden, ids)):
            dense[i, : len(h)], dense_ids[i, : len(x)] = h, x
        content = {
            "activations": dense.bfloat16(),
            "sequences": dense_ids,
            "d": 32,
            "bos_token_id": start,
            "meta": {"backbone": spec.source, **stated},
        }
    else:
        texts = [run.backbone.decode_text(row) for row in rows]
        texts[1] += " and more"  # one of the evaluated targets does not give its tokens back
        content = {
            "activations": [h.bfloat16() for h in hidden],
            "texts": texts,
            "attn_masks": [torch.ones(len(h), dtype=torch.long) for h in hidden],
            "meta": {"backbone": spec.source, **stated},
        }
    files = {spec.targets_file: saved(content), "README.md": b"card"}
    if name == "qwen25-7b":
        files[spec.targets_file.replace(".pt", "_pool.pt")] = saved(torch.stack([h[-1] for h in hidden]).bfloat16())
    return files


def av_of(name, spec):
    made, p = torch.Generator().manual_seed(5), spec.num_prefix_tokens
    t = {
        "proj.weight": torch.eye(32) + 0.1 * torch.randn(32, 32, generator=made),
        "prefix_embeds": 0.1 * torch.randn(p, 32, generator=made),
    }
    config = {"backbone_id": spec.source, "extraction_layer": spec.layer, "num_prefix_tokens": p, **PUBLISHED_AV}
    if name == "qwen25-7b":
        config |= {**LATER, "temperature": 0.8, "top_p": 0.95}
    checkpoint = saved({"trainable": t, "val_fve_nrm": 0.33, "step": 4500})
    return {"config.json": json.dumps(config).encode(), "best_av.pt": checkpoint, "eval/centered_eval.json": b"{}"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """By backbone, a hub with what is published for it; made once, as a run with another family needs its pack too."""
    hub, root = Hub(), tmp_path_factory.mktemp("published")
    hub.endpoint = hub.start()
    for name in ("gemma2-2b", "llama32-3b", "qwen25-7b"):
        spec = REGISTRY[name]
        folder = backbone_of(name, root / name)
        hub.files[spec.source] = {p.name: p.read_bytes() for p in folder.iterdir()}
        config = RunConfig(backbone=str(folder), profile="smoke", dtype="float32", device="cpu", layer=spec.layer)
        run = open_run(config) if name != "qwen25-7b" else open_as(spec, folder, config)
        streams = (row_streams(seed, "published", range(64)) for seed in range(40))
        drawn = (draw_sequences(run.backbone, target_settings(config), s) for s in streams)
        rows = sayable(run.backbone, (s.sequence(i) for s in drawn for i in range(64)), N, LONGEST)
        hidden = [every_position(run, row) for row in rows]
        hub.files[spec.targets] = pack_of(name, spec, run, rows, hidden)
        hub.files[spec.av] = av_of(name, spec)
    yield hub
    hub.server.shutdown()


def open_as(spec, folder, config):
    """A run of a folder with the registry's start and EOS ids: a tokenizer of Qwen's kind names no BOS."""
    import dataclasses
    from unittest import mock

    from nla_utils.lm import loading

    with mock.patch.object(loading, "resolve", lambda _: dataclasses.replace(spec, source=str(folder))):
        return open_run(config)


def nla(hub, cache, out, *options, **environment):
    env = hub.environment(cache, **environment)
    command = ["reproduce", "--profile", "full", "--out", str(out), *SIZES, "--dtype", "float32", "--device", "cpu"]
    return warm.run([sys.executable, "-m", "nla_extensions.cli", *command, *options], env=env, cwd=ROOT)


def results(folder, name):
    return json.loads((folder / "results" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["gemma2-2b", "llama32-3b", "qwen25-7b"])
def test_the_released_system_is_evaluated_end_to_end(published, tmp_path, name):
    spec, out = REGISTRY[name], tmp_path / "runs"
    published.cut.add(spec.targets_file)
    # The pages, which 06 makes alike of all, once.
    until = ("--until", "6" if name == "gemma2-2b" else "5")
    command = ("--backbone", name, "--av", "released", "--targets", "released", *until)
    done = nla(published, tmp_path / "cache", out, *command)
    if done.returncode == 2 and "01_" not in done.stdout:  # cut, said in one line, and to be started again
        assert "error:" in done.stderr and "Traceback" not in done.stderr
        done = nla(published, tmp_path / "cache", out, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    print(done.stdout)
    assert not published.cut
    (folder,) = (out / name).glob("full-*-av-released-targets-released")
    first = done.stdout.index("using commit")
    assert done.stdout.index("to fetch: ") < first and done.stdout.index("memory, weights included") < first
    pinned = {p.name: p.read_text() for p in (tmp_path / "cache" / "pins").iterdir()}
    assert pinned[f"datasets--{spec.targets.replace('/', '--')}"] == published.commit(spec.targets)
    sidecar = json.loads((folder / "targets.safetensors.json").read_text())
    assert sidecar["released_from"] == published.commit(spec.targets) and sidecar["file"] == spec.targets_file
    av = json.loads((folder / "best_av.safetensors.json").read_text())
    assert av["released_from"] == published.commit(spec.av) and av["steps"] == 4500 and not av["loss"]
    column = results(folder, "centered_eval")["protocols"]["published"]
    assert column["n"] == M and np.isfinite(column["adapter_cen_greedy_mean"]) and np.isfinite(column["rho_cen_greedy"])
    replay = results(folder, "oracle_ceiling")["protocols"]["corrected"]
    assert replay["replay_cen_fve_mean"] > 0.99
    if name == "qwen25-7b":
        assert sidecar["texts"] == "tokenized again" and sidecar["texts_unmatched"] == 1
        assert (av["sampling"]["temperature"], av["sampling"]["top_p"]) == (0.8, 0.95) and "'use_rotor'" in done.stdout
    # Once fetched and pinned, it needs no network, whatever the authors push.
    again = nla(published, tmp_path / "cache", out, *command[:-1], "5", HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and again.stdout.count("cached, skipped") == 5, again.stdout + again.stderr


def test_the_pool_alone_suffices_without_ceilings(published, tmp_path):
    done = nla(
        published,
        tmp_path / "cache",
        tmp_path / "runs",
        "--backbone",
        "qwen25-7b",
        "--av",
        "released",
        "--targets",
        "pool",
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert REGISTRY["qwen25-7b"].targets_file not in published.served or "_pool.pt" in str(published.served)
    (folder,) = (tmp_path / "runs" / "qwen25-7b").glob("*-targets-pool")
    column = results(folder, "centered_eval")["protocols"]["published"]
    assert np.isfinite(column["adapter_cen_bestofK_mean"]) and column["rho_cen_greedy"] is None
    assert results(folder, "oracle_ceiling")["protocols"]["published"]["replay_cen_fve_mean"] is None
    curve = results(folder, "rerank_eval")["protocols"]["corrected"]
    assert np.isfinite(curve["kcurve_oracle_top1_cen"][str(K)])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--backbone", "llama32-3b", "--targets", "hub:RiverRider/srt-nla-targets-gemma2-2b-v1"), "its backbone is"),
        (("--backbone", "llama32-3b", "--av", "hub:RiverRider/srt-nla-av-gemma2-2b-v1"), "the AV reads layer 19"),
        (("--backbone", "gemma2-2b", "--targets", "pool"), "has no file targets_L19_seq64_30k_seed1_pool.pt"),
        (("--backbone", "gpt-oss-20b", "--targets", "released"), "none are known for gpt-oss-20b"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_notebook_runs(published, tmp_path, options, message):
    done = nla(published, tmp_path / "cache", tmp_path / "runs", *options)
    assert done.returncode == 2 and message in done.stderr, done.stdout[-2000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr and not list((tmp_path / "runs").rglob("*.ipynb"))
