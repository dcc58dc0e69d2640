"""Released AVs of every generation: nested or flat, each part computed as the authors do, nothing left unfilled."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import PUBLISHED_AV, with_out
from torch import nn

from nla_utils.config import AVConfig
from nla_utils.encoding import Texts
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.sampling import SamplingSettings
from nla_utils.training import train_av
from nla_utils.verbalizer import (
    NESTED,
    ActivationVerbalizer,
    check_av,
    checkpoint_record,
    export_av,
    import_av,
    make_rollouts,
    source_loss,
)

D = 32
# config.json as the authors' first generation has it, and what later ones add to it.
FIRST = {**PUBLISHED_AV, "backbone_id": "google/gemma-2-2b", "extraction_layer": 3, "num_prefix_tokens": 2}
STATIC = {"proj.weight": (D, D), "prefix_embeds": (2, D)}
MLP = {
    "prefix_mlp.0.weight": (8, D),
    "prefix_mlp.0.bias": (8,),
    "prefix_mlp.2.weight": (2 * D, 8),
    "prefix_mlp.2.bias": (2 * D,),
}
GENERATIONS = {
    "first": ({}, STATIC),
    "no prefix": ({"num_prefix_tokens": 0}, {"proj.weight": (D, D)}),
    "no prefix, an empty one": ({"num_prefix_tokens": 0}, {"proj.weight": (D, D), "prefix_embeds": (0, D)}),
    "later": ({"use_layer_embed": False, "inject_norm": "none"}, STATIC),
    "at an embedding's norm": ({"inject_norm": "embed"}, STATIC),
    "prefix made of v": ({"prefix_mode": "mlp", "prefix_mlp_hidden": 8}, {"proj.weight": (D, D), **MLP}),
    "three slots, told the layer": (
        {"num_inject_slots": 3, "use_layer_embed": True},
        {**STATIC, "proj_extra.0.weight": (D, D), "proj_extra.1.weight": (D, D), "layer_embed.weight": (5, D)},
    ),
}


def tensors_of(shapes):
    made = torch.Generator().manual_seed(3)
    return {name: 0.3 * torch.randn(shape, generator=made) for name, shape in shapes.items()}


def release(folder, config, content, name="best_av.pt"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**FIRST, **config}))
    torch.save(content, folder / name)
    return folder


def naive(config, t, v_Bd, embed_norm):
    """The authors' verbalizer, written down from their names and shapes."""
    if config.get("inject_norm") == "embed":
        v_Bd = v_Bd / v_Bd.norm(dim=-1, keepdim=True) * embed_norm
    slots = [v_Bd @ t["proj.weight"].T]
    slots += [v_Bd @ t[f"proj_extra.{i}.weight"].T for i in range(config.get("num_inject_slots", 1) - 1)]
    if config.get("use_layer_embed"):
        slots = [slot + t["layer_embed.weight"][3] for slot in slots]
    prefix = [row.expand(len(v_Bd), -1) for row in t.get("prefix_embeds", [])]
    if config.get("prefix_mode") == "mlp":
        hidden = nn.functional.gelu(v_Bd @ t["prefix_mlp.0.weight"].T + t["prefix_mlp.0.bias"])
        made = hidden @ t["prefix_mlp.2.weight"].T + t["prefix_mlp.2.bias"]
        prefix = [made[:, :D], made[:, D:]]
    return torch.stack([*slots, *prefix], dim=1)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_gives_what_its_parts_say(gemma_run, tmp_path, generation):
    (config, shapes), (run, targets) = GENERATIONS[generation], gemma_run
    t, v = tensors_of(shapes), torch.from_numpy(targets.v[:3])
    release(tmp_path, config, {"trainable": t, "val_fve_nrm": 0.33, "step": 4500})
    av = import_av(tmp_path, run.backbone)
    norm = run.backbone.model.get_input_embeddings().weight.norm(dim=1).mean()
    torch.testing.assert_close(av(v, torch.float32), naive(config, t, v, norm), rtol=1e-5, atol=1e-5)
    assert set(av.trainable()) == {k for k, x in t.items() if x.numel()}
    assert check_av(tmp_path, 3, D, 4).num_prefix_tokens == av.config.num_prefix_tokens
    # What is kept of it in a run is the same again.
    export_av(av, tmp_path / "kept", 0.33, 4500)
    torch.testing.assert_close(import_av(tmp_path / "kept", run.backbone)(v, torch.float32), av(v, torch.float32))


@pytest.mark.parametrize("generation", ["no prefix", "prefix made of v", "three slots, told the layer"])
def test_the_source_is_predicted_behind_every_generation(gemma_run, tmp_path, generation):
    (config, shapes), (run, targets) = GENERATIONS[generation], gemma_run
    av = import_av(release(tmp_path, config, tensors_of(shapes)), run.backbone)
    pairs = Texts.of("source", [0, 1, 2], [[5, 6], [7, 8, 9], [10]])
    loss = source_loss(run.backbone, av, targets, pairs, 2).per_target
    assert all(np.isfinite(loss[c]).all() for c in ("own", "other", "mean"))
    assert np.isfinite(loss["none"]).all() == (generation != "no prefix")


@pytest.mark.parametrize("key", [*NESTED, None])
def test_a_checkpoint_is_found_wherever_the_authors_keep_it(gemma_run, tmp_path, key):
    t = tensors_of(STATIC)
    release(tmp_path, {}, {key: t, "step": 7, "optimizer": {"lr": 1.0}} if key else t)
    av = import_av(tmp_path, gemma_run[0].backbone)
    torch.testing.assert_close(av.proj.weight, t["proj.weight"])
    assert checkpoint_record(tmp_path) == {"val_fve_nrm": None, "step": 7 if key else None}


def test_a_checkpoint_in_a_folder_of_its_own_is_found(gemma_run, tmp_path):
    t = tensors_of(STATIC)
    av = import_av(release(tmp_path, {}, {"trainable": t}, "best_av/best_av.pt"), gemma_run[0].backbone)
    torch.testing.assert_close(av.prefix_embeds, t["prefix_embeds"])


class Card(nn.Module):
    """A verbalizer's parameters in plain torch, as the card would have them loaded."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(D, D, bias=False)
        nn.init.eye_(self.proj.weight)
        self.prefix_embeds = nn.Parameter(torch.zeros(2, D))


def test_the_cards_own_way_of_loading_loads_nothing_and_says_nothing(gemma_run, tmp_path):
    t = tensors_of(STATIC)
    release(tmp_path, {}, {"trainable": t, "val_fve_nrm": 0.33, "step": 4500})
    card, state = Card(), torch.load(tmp_path / "best_av.pt", weights_only=True)
    said = card.load_state_dict(state, strict=False)
    assert torch.equal(card.proj.weight, torch.eye(D)) and not card.prefix_embeds.any()
    assert set(said.missing_keys) == set(STATIC) and set(said.unexpected_keys) == set(state)
    card.load_state_dict(state["trainable"], strict=True)
    assert torch.equal(card.proj.weight, import_av(tmp_path, gemma_run[0].backbone).proj.weight)


@pytest.mark.parametrize(
    "config, content, message",
    [
        ({}, {"trainable": {"weight": torch.eye(D)}}, "it fills none of the AV's parameters"),
        ({}, {"proj.weight": torch.eye(D)}, "it fills only some of the AV's parameters"),
        ({}, {"trainable": {}, "step": 1}, "no tensors there"),
        ({}, {**tensors_of(STATIC), "layer_embed.weight": torch.ones(5, D)}, "layer_embed.weight'], which its config"),
        ({"num_prefix_tokens": 0}, tensors_of(STATIC), "prefix_embeds'], which its config"),
        ({}, {"trainable": tensors_of(STATIC) | {"prefix_embeds": torch.full((2, D), torch.nan)}}, "non-finite"),
        ({"extraction_layer": 2}, tensors_of(STATIC), "the AV reads layer 2, this run extracts layer 3"),
        ({}, [1], "it holds a list"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(gemma_run, tmp_path, config, content, message):
    release(tmp_path, config, content)
    for load in (lambda: import_av(tmp_path, gemma_run[0].backbone), lambda: check_av(tmp_path, 3, D, 4)):
        with pytest.raises(ArtefactError, match=message):
            load()


@pytest.mark.parametrize(
    "key, value",
    [
        ("temperature", 0),
        ("top_p", 1.5),
        ("num_prefix_tokens", -1),
        ("num_inject_slots", 0),
        ("prefix_mode", "lstm"),
        ("inject_norm", "unit"),
        ("use_layer_embed", 1),
        ("extraction_layer", None),
        ("d_vector", 16),
        ("temperature", "1"),
    ],
)
def test_a_value_that_no_av_has_is_named_with_its_file(gemma_run, tmp_path, key, value):
    release(tmp_path, {key: value}, tensors_of(STATIC))
    with pytest.raises(ConfigError, match=f"{key} is {value!r}"):
        import_av(tmp_path, gemma_run[0].backbone)


def test_what_is_not_known_is_named_and_not_used(gemma_run, tmp_path, capsys):
    release(tmp_path, {"temprature": 0.5, "use_rotor": True}, tensors_of(STATIC) | {"rotor.weight": torch.eye(D)})
    av = import_av(tmp_path, gemma_run[0].backbone)
    said = capsys.readouterr().out
    assert "'temprature': did you mean 'temperature'?" in said and "'use_rotor'" in said and "['rotor.weight']" in said
    assert av.config.temperature == 1.0


def test_rollouts_are_sampled_as_the_avs_configuration_says(scored_run, tmp_path, capsys):
    run, targets, *_ = scored_run
    av = import_av(run.folder.file("av"), run.backbone)
    av.config = dataclasses.replace(av.config, temperature=0.7, top_p=0.9)
    export_av(av, tmp_path / "released", 0.3, 1)
    other = with_out(run, tmp_path, av=str(tmp_path / "released"))
    for name in ("targets.safetensors", "targets.safetensors.json"):
        other.folder.path.mkdir(parents=True, exist_ok=True)
        other.folder.file(name).write_bytes(run.folder.file(name).read_bytes())
    sidecar = train_av(other, targets)
    expected = SamplingSettings(run.sizes.max_new_tokens, temperature=0.7, top_p=0.9)
    assert sidecar["sampling"] == expected.record()
    cooler, plain = make_rollouts(other, targets), make_rollouts(run, targets)
    assert other.folder.load("rollouts").sidecar["sampling"] == expected.record()
    assert "temperature 0.7 and top_p 0.9" in capsys.readouterr().out
    # Greedy is the same, and what is drawn at a lower temperature is likelier.
    np.testing.assert_array_equal(cooler.ids[:, 0], plain.ids[:, 0])
    assert not np.array_equal(cooler.ids[:, 1:], plain.ids[:, 1:])


def test_a_fresh_av_is_sampled_as_the_paper_does(gemma_run):
    assert ActivationVerbalizer.fresh(gemma_run[0].backbone).sampling(64) == SamplingSettings(64)
    assert AVConfig("b", 1, 1).inject_norm is None
