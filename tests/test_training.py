"""The head's loss, the verbalizer's formats, training, resume."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_config, with_out

from nla_utils.config import AVConfig
from nla_utils.errors import ArtefactError, ConfigError, SourceError
from nla_utils.lm.backbone import head_cross_entropy, head_logprobs
from nla_utils.run import open_run
from nla_utils.store import atomic_write
from nla_utils.targets import make_targets
from nla_utils.training import Recipe, Trainer, describe, make_split, padded_loss, pair_loss, train_av
from nla_utils.verbalizer import ActivationVerbalizer, av_hash, export_av, import_av, load_av


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("rows", [5, 300])
def test_head_loss_and_gradient_equal_autograd_through_full_logits(cap, rows):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, 16, generator=generator)
    weight = torch.randn(90, 16, generator=generator)
    y = torch.randint(0, 90, (rows,), generator=generator)
    a, b = h.clone().requires_grad_(), h.clone().requires_grad_()
    ours = head_cross_entropy(a, weight, y, cap)
    logits = b @ weight.T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    reference = F.cross_entropy(logits, y)
    (ours * 3).backward()
    (reference * 3).backward()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    expected = torch.log_softmax(logits.detach(), 1)[torch.arange(rows), y]
    torch.testing.assert_close(head_logprobs(h, weight, y, cap), expected, rtol=1e-4, atol=1e-5)


def test_pair_loss_and_its_gradient_equal_the_models_own(tiny_run):
    run, targets = tiny_run
    backbone = run.backbone
    av = ActivationVerbalizer.fresh(backbone)
    texts = [[5, 6, 7, 8], [9, 10]]
    v = torch.from_numpy(targets.v[:2])
    ours = pair_loss(backbone, av, v, texts)
    ours.backward()
    grads = [p.grad.clone() for p in av.parameters()]
    av.zero_grad()
    losses = []
    for i, ids in enumerate(texts):
        inputs = torch.cat([av(v[i : i + 1], backbone.dtype), backbone.embed(torch.tensor([ids]))], 1)
        logits = backbone.model(inputs_embeds=inputs).logits[0]
        n_prefix = inputs.shape[1] - len(ids)
        losses.append(F.cross_entropy(logits[n_prefix - 1 : -1], torch.tensor(ids), reduction="sum"))
    reference = sum(losses) / sum(map(len, texts))
    reference.backward()
    assert ours.item() == pytest.approx(reference.item(), rel=1e-5)
    for ours_grad, p in zip(grads, av.parameters()):
        torch.testing.assert_close(ours_grad, p.grad, rtol=1e-3, atol=1e-6)


def test_fresh_av_passes_v_through_and_starts_from_the_start_token(tiny_run):
    run, targets = tiny_run
    backbone = run.backbone
    av = ActivationVerbalizer.fresh(backbone)
    out = av(torch.from_numpy(targets.v[:3]), backbone.dtype)
    np.testing.assert_array_equal(out[:, 0].detach().numpy(), targets.v[:3])
    start = backbone.embed(torch.tensor([backbone.start_id]))[0]
    torch.testing.assert_close(out[0, 1].detach(), start)
    assert sum(p.numel() for p in av.parameters()) == 32 * 32 + 1 * 32


def test_gemma_2b_av_has_the_published_number_of_parameters():
    config = AVConfig(backbone_id="google/gemma-2-2b", extraction_layer=19, num_prefix_tokens=1)
    av = ActivationVerbalizer(config, 2304, torch.zeros(2304))
    assert sum(p.numel() for p in av.parameters()) == 5_310_720


def test_a_padded_batch_has_the_loss_and_the_gradient_of_its_valid_tokens(tiny_run):
    """What a GPU replays: the shape is fixed, and what is padding counts nothing."""
    run, targets = tiny_run
    av = ActivationVerbalizer.fresh(run.backbone)
    texts, v = [[5, 6, 7, 8], [9, 10]], torch.from_numpy(targets.v[:4])
    expected = pair_loss(run.backbone, av, v[:2], texts)
    expected.backward()
    grads = [p.grad.clone() for p in av.parameters()]
    av.zero_grad()
    ids_BT = torch.full((4, 7), run.backbone.pad_id)
    share_BT = torch.zeros(4, 7)
    for i, ids in enumerate(texts):
        ids_BT[i, : len(ids)] = torch.tensor(ids)
        share_BT[i, : len(ids)] = 1 / 6
    loss = padded_loss(run.backbone, av, v, ids_BT, share_BT)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for grad, p in zip(grads, av.parameters()):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-6)


def test_a_recipe_says_how_many_pairs_steps_and_at_what_norm(gemma_run, tmp_path):
    run, targets = with_out(gemma_run[0], tmp_path), gemma_run[1]
    trainer = Trainer(run, targets, Recipe(pairs=20, steps=3, inject_norm=2.0))
    trainer.train()
    assert (len(trainer.split.train), trainer.step) == (20, 3)
    slot_Bd = ActivationVerbalizer.fresh(run.backbone, inject_norm=2.0)(torch.from_numpy(targets.v[:3]), torch.float32)[
        :, 0
    ]
    torch.testing.assert_close(slot_Bd.norm(dim=-1), torch.full((3,), 2.0))
    with pytest.raises(ArtefactError, match="made with recipe = .*, this run has recipe = .*to train anew"):
        Trainer(run, targets)


def weights_of(backbone):
    return {n: p.clone() for n, p in backbone.model.named_parameters()}


def test_training_lowers_the_loss_and_leaves_the_backbone_alone(gemma_run):
    run, targets = gemma_run
    before = weights_of(run.backbone)
    trainer = Trainer(run, targets, Recipe(learning_rate=3e-3))
    trainer.total_steps = 10 * trainer.steps_per_epoch
    trainer.train()
    trainer.state_file.unlink()
    n = trainer.steps_per_epoch
    assert np.mean(trainer.history.loss[-n:]) < np.mean(trainer.history.loss[:n])
    for name, p in run.backbone.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_killed_training_resumes_to_the_same_av(tiny_folders, tmp_path, monkeypatch):
    runs = []
    for name in ("whole", "cut"):
        run = open_run(tiny_config(tiny_folders["tiny-llama"], tmp_path / name))
        runs.append((run, make_targets(run)))
    whole, cut = runs
    train_av(*whole)
    step = Trainer._train_step

    assert whole[0].folder.load("best_av").sidecar["steps"] > 2

    def killed_after_two_steps(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "_train_step", killed_after_two_steps)
    with pytest.raises(KeyboardInterrupt):
        train_av(*cut)
    assert not cut[0].folder.has("best_av")
    monkeypatch.setattr(Trainer, "_train_step", step)
    resumed = Trainer(*cut)
    assert resumed.step == 2
    train_av(*cut)
    files = [r.folder.file("best_av.safetensors").read_bytes() for r, _ in runs]
    assert files[0] == files[1]
    assert not cut[0].folder.file("training.partial.safetensors").exists()


def test_split_is_five_per_cent_and_never_holds_held_out_targets(tiny_run):
    run, targets = tiny_run
    split = make_split(run, targets)
    used = {split.pairs.rows[i] for i in (*split.train, *split.validation)}
    assert not used & set(targets.held_out)
    assert len(split.validation) == max(2, round(0.05 * len(split.pairs.rows)))
    assert not set(split.train) & set(split.validation)


@pytest.mark.parametrize("drop", ["best_av.pt", "best_av.safetensors"])
def test_both_formats_round_trip(gemma_run, tmp_path, drop):
    backbone = gemma_run[0].backbone
    av = ActivationVerbalizer.fresh(backbone)
    torch.nn.init.normal_(av.proj.weight)
    export_av(av, tmp_path, 0.5, 7)
    state = torch.load(tmp_path / "best_av.pt", weights_only=True)
    assert set(state) == {"trainable", "val_fve_nrm", "step"}
    assert set(state["trainable"]) == {"proj.weight", "prefix_embeds"}
    (tmp_path / drop).unlink()
    torch.testing.assert_close(import_av(tmp_path, backbone).proj.weight, av.proj.weight)


def test_av_of_another_backbone_is_refused(gemma_run, tmp_path):
    backbone = gemma_run[0].backbone
    av = ActivationVerbalizer.fresh(backbone)
    with pytest.raises(ArtefactError, match=r"proj.weight is \(8, 8\)"):
        av.load_trainable({"proj.weight": torch.eye(8), "prefix_embeds": torch.zeros(1, 32)}, "x.pt")
    with pytest.raises(ArtefactError, match="holds"):
        av.load_trainable({"weight": torch.eye(8)}, "x.pt")
    export_av(av, tmp_path, 0.5, 7)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"extraction_layer": 3', '"extraction_layer": 2'))
    with pytest.raises(ArtefactError, match="layer 2"):
        import_av(tmp_path, backbone)
    (tmp_path / "config.json").write_text(text.replace('"num_prefix_tokens"', '"prefix_tokens"'))
    with pytest.raises(ConfigError, match="num_prefix_tokens"):
        import_av(tmp_path, backbone)


def test_trained_av_loads_back(scored_run):
    run = scored_run[0]
    av = load_av(run)
    imported = import_av(run.folder.file("av"), run.backbone)
    torch.testing.assert_close(av.proj.weight, imported.proj.weight)


def test_a_last_n_verbalizer_is_trained_on_the_end_and_says_so(tiny_run, tmp_path):
    run, targets = tiny_run
    split = make_split(run, targets, 3)
    assert split.pairs.sequence(5) == targets.sequence(split.pairs.rows[5])[-3:]
    av = ActivationVerbalizer.fresh(run.backbone, 64, 3)
    assert (av.config.max_new_tokens, av.config.target_span) == (3, "last:3")
    export_av(av, tmp_path, 0.5, 1)
    assert import_av(tmp_path, run.backbone).config.target_span == "last:3"


@pytest.mark.parametrize("kept", ["best_av.pt", "best_av.safetensors"])
def test_a_released_av_is_taken_as_it_is(scored_run, tmp_path, kept):
    run, targets, *_ = scored_run
    released = tmp_path / "released"
    released.mkdir()
    for name in ("config.json", kept):
        (released / name).write_bytes(run.folder.file(f"av/{name}").read_bytes())
    other = with_out(run, tmp_path, av=str(released))
    for name in ("targets.safetensors", "targets.safetensors.json"):
        atomic_write(other.folder.file(name), run.folder.file(name).read_bytes())
    sidecar = train_av(other, targets)
    assert sidecar["released"] == "released" and sidecar["loss"] == [] and "av-" in other.folder.path.name
    # Its name and its hash, of tensors and config, but no path.
    facts = describe(sidecar, targets)
    assert facts["released"] == "released" and facts["av_sha256"] == av_hash(released)
    assert str(tmp_path) not in other.folder.file("best_av.safetensors.json").read_text()
    assert (sidecar["best_step"] is None) == (kept != "best_av.pt")
    assert torch.equal(load_av(run).proj.weight, load_av(other).proj.weight)
    # A run of this seed may have trained it on these very targets.
    assert facts["in_sample_trained_on"] is None and facts["held_out_trained_on"] is None


@pytest.mark.parametrize(
    "av, message",
    [
        ("hub:no-slash", "write it as hub:org/name"),
        ("/absent/folder", "neither a folder"),
        (".", "an AV is config.json with"),
    ],
)
def test_what_is_no_av_is_refused(tiny_run, tmp_path, av, message):
    run, targets = tiny_run
    with pytest.raises(SourceError, match=message):
        train_av(with_out(run, tmp_path, av=av), targets)


def test_an_av_of_another_backbone_is_refused(scored_run, tmp_path):
    run, targets, *_ = scored_run
    wide = ActivationVerbalizer(AVConfig("other", run.backbone.layer, 1), 48, torch.zeros(48))
    export_av(wide, tmp_path / "wide", 0.5, 1)
    with pytest.raises(ArtefactError, match="trained on another backbone"):
        train_av(with_out(run, tmp_path, av=str(tmp_path / "wide")), targets)
