"""Logit lens and Patchscope: v stands where it is said to stand, and nothing else changes."""

import numpy as np
import torch

from nla_extensions.release.verbalizers import Patchscope, lens_tokens, placed
from nla_utils.lm.sampling import SamplingSettings, sample


class SixTokens(Patchscope):
    tokens = 6


def test_the_lens_reads_the_last_blocks_output_as_the_head_does(tiny_run):
    backbone = tiny_run[0].backbone
    ids = torch.tensor([[backbone.start_id, 7, 9, 11]])
    caught = []
    handle = backbone.blocks[-1].register_forward_hook(
        lambda _module, _given, out: caught.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        logits_V = backbone.model(ids).logits[0, -1]
    handle.remove()
    assert lens_tokens(backbone, caught[0][:, -1], 5)[0].tolist() == logits_V.topk(5).indices.tolist()


def test_its_own_state_in_the_prompt_changes_nothing(tiny_run):
    """The state that the place holds anyway, put there, must leave the text as it is."""
    backbone = tiny_run[0].backbone
    scope = SixTokens(backbone, None)
    ids, (place,) = scope.ids
    assert ids[0] == backbone.start_id and backbone.tokenizer.decode(ids[place]) == "?"
    own = backbone.encode([ids[: place + 1]], start=False)
    plain = sample(backbone, backbone.embed(torch.tensor([ids])), SamplingSettings(6, temperature=0.0), None).sequence(
        0
    )
    assert scope.write(own, 0, np.array([0])).sequence(0, 0) == plain


def test_another_state_moves_the_prediction_behind_it_and_no_prompt_before_it(gemma_run):
    run, targets = gemma_run
    backbone = run.backbone
    ids = torch.tensor([[backbone.start_id, 5, 6, 7, 8]])
    plain = backbone.last_hidden(input_ids=ids)
    with placed(backbone.blocks[backbone.layer - 1], [2], lambda _: 30 * torch.from_numpy(targets.v[:1])[:, None]):
        moved = backbone.last_hidden(input_ids=ids)
    assert torch.equal(plain[:, :2], moved[:, :2]) and not torch.allclose(plain[:, 2:], moved[:, 2:])
    assert torch.equal(plain, backbone.last_hidden(input_ids=ids)), "the hook is gone"
