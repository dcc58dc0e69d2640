"""A backbone spread over devices: blocks that lie elsewhere, moved by hooks, change no result.

The tests have one device; blocks offloaded to disk go through the same hooks as blocks on another card.
"""

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from nla_utils.encoding import read
from nla_utils.errors import BackboneError
from nla_utils.lm import checks
from nla_utils.lm.checks import check_backbone
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.sampling import SamplingSettings, row_streams
from nla_utils.protocol import PROTOCOLS
from nla_utils.training import pair_loss
from nla_utils.verbalizer import ActivationVerbalizer

ARCHITECTURES = ("tiny-gemma2", "tiny-llama", "tiny-qwen2")


def offloaded(backbone, folder):
    """The same backbone, every second block on disk."""
    model = backbone.model
    blocks = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(backbone.n_layers)}
    rest = {f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"}
    dispatch_model(
        model,
        {**blocks, **rest, "lm_head": "cpu"},
        main_device="cpu",
        offload_dir=folder,
        skip_keys=model._skip_keys_device_placement,
        force_hooks=True,
    )
    assert any(p.device.type == "meta" for p in model.parameters())
    return backbone


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_that_lie_elsewhere_change_nothing(tiny_folders, tmp_path, name, monkeypatch):
    config = tiny_config(tiny_folders[name], tmp_path)
    whole, split = load_backbone(config), offloaded(load_backbone(config), tmp_path / "offloaded")
    rng = np.random.default_rng(0)
    texts = [rng.integers(3, 40, size=n).tolist() for n in (3, 9, 6)]
    np.testing.assert_array_equal(whole.encode(texts, start=True), split.encode(texts, start=True))
    v_Md, found = torch.randn(2, whole.d, generator=torch.Generator().manual_seed(0)), []
    for backbone in (whole, split):
        torch.manual_seed(0)
        av = ActivationVerbalizer.fresh(backbone)
        loss = pair_loss(backbone, av, v_Md, texts[:2])
        loss.backward()
        rolled = av.write(backbone, v_Md.numpy(), 3, SamplingSettings(6), row_streams(1, "t", range(len(v_Md)), 4))
        found.append({"loss": loss.detach(), "slope": av.proj.weight.grad, **read(backbone, rolled, *PROTOCOLS).arrays})
    for key, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][key], err_msg=key)
    check_backbone(split)
    monkeypatch.setattr(checks, "N_SAMPLES", 8)
    judged = {found.name: found.passed for found in checks.run_checks(split)}
    assert False not in judged.values() and judged["replay"] and judged["dtype against float32"] is None


def test_split_loads_through_the_librarys_device_map(tiny_folders, tmp_path, monkeypatch):
    asked, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k.get("device_map")) or load(*a, **k)
    )
    folder = tiny_folders["tiny-llama"]
    split = load_backbone(tiny_config(folder, tmp_path, device="split"))
    whole = load_backbone(tiny_config(folder, tmp_path, device="auto"))
    assert asked == ["auto", None]
    assert split.identity() == whole.identity()


def test_a_head_without_room_is_refused(tiny_folders, tmp_path, monkeypatch):
    load = AutoModelForCausalLM.from_pretrained
    nowhere = lambda *a, **_: (load(*a).to("meta"), load(*a, output_loading_info=True)[1])  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", nowhere)
    with pytest.raises(BackboneError, match="no room on the cards"):
        load_backbone(tiny_config(tiny_folders["tiny-llama"], tmp_path, device="split"))
