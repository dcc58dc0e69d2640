"""A second device without a card: the meta device, on which shapes and places are computed and no numbers.

Here an operation that mixes it with the CPU raises, so these tests show that encoding, cached decoding, drawing and a
training step leave no tensor behind. They do not show that a card's kernels give the right numbers, nor that memory
suffices: whatever looks at a value (``item``, boolean masks, ``numpy``) cannot run here.
"""

import dataclasses

import pytest
import torch
from conftest import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from nla_utils.config import AVConfig
from nla_utils.lm.backbone import head_cross_entropy, head_logprobs
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.sampling import Decoder, SamplingSettings, draw
from nla_utils.verbalizer import ActivationVerbalizer

ELSEWHERE = torch.device("meta")


class OneDevice(TorchDispatchMode):
    """Raises where an operation, other than a copy, is given tensors of two devices; numbers may lie anywhere."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, torch.Tensor) and x.dim() > 0]
        if len({x.device for x in given}) > 1 and "copy" not in str(operation):
            raise RuntimeError(f"{operation} is given tensors of {sorted({str(x.device) for x in given})}")
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=["tiny-gemma2", "tiny-gemma3", "tiny-llama", "tiny-qwen2"])
def elsewhere(request, tiny_folders, tmp_path, monkeypatch):
    """A backbone of which every weight lies on the second device."""
    # The library looks at position ids for packed sequences, which needs their values.
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    backbone = load_backbone(tiny_config(tiny_folders[request.param], tmp_path))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_folders[request.param])).to(ELSEWHERE)
    model.eval().requires_grad_(False)
    with OneDevice():
        yield dataclasses.replace(backbone, model=model, head_weight=model.get_output_embeddings().weight)


def test_mixing_devices_raises():
    with OneDevice(), pytest.raises(RuntimeError, match=r"\['cpu', 'meta'\]"):
        torch.zeros(3, 3, device=ELSEWHERE) @ torch.zeros(3, 3)


def test_a_tensor_that_is_left_behind_is_found(elsewhere, monkeypatch):
    monkeypatch.setattr(type(elsewhere), "embed", lambda self, ids: torch.zeros(*ids.shape, self.d))
    with pytest.raises(RuntimeError, match="meta"):
        Decoder(elsewhere, 12, None).step(inputs_embeds=elsewhere.embed(torch.ones(1, 4, dtype=torch.long)))


def test_encoding_and_cached_decoding_stay_there(elsewhere):
    ids_BT = torch.randint(3, 200, (3, 9))
    (h_BTd,) = elsewhere.hidden_at_layers((2,), input_ids=ids_BT.to(elsewhere.device))
    assert h_BTd.device == ELSEWHERE and h_BTd.shape == (3, 9, elsewhere.d)
    decoder = Decoder(elsewhere, 12, None)
    hidden_Bd = decoder.step(inputs_embeds=elsewhere.embed(ids_BT))
    for _ in range(2):
        token_B, logp_B = draw(elsewhere.logits(hidden_Bd), SamplingSettings(temperature=0.0), None)
        assert token_B.device == logp_B.device == ELSEWHERE
        hidden_Bd = decoder.step(input_ids=token_B[:, None])
    assert hidden_Bd.device == ELSEWHERE and elsewhere.embedding_table().device == ELSEWHERE


def test_a_training_step_stays_there(elsewhere):
    config = AVConfig("b", elsewhere.layer, 2)
    av = ActivationVerbalizer(config, elsewhere.d, torch.zeros(elsewhere.d)).to(ELSEWHERE)
    prefix_BPd = av(torch.randn(2, elsewhere.d, device=ELSEWHERE), elsewhere.dtype)
    ids_BT = torch.randint(3, 200, (2, 5)).to(ELSEWHERE)
    inputs_BSd = torch.cat([prefix_BPd, elsewhere.embed(ids_BT)], dim=1)
    hidden_BTd = elsewhere.last_hidden(inputs_embeds=inputs_BSd)[:, 2:-1]
    # The mask of valid tokens is left out: all of them are.
    hidden_nd, target_n = hidden_BTd.flatten(0, 1), ids_BT.flatten()
    loss = head_cross_entropy(hidden_nd, elsewhere.head_weight, target_n, elsewhere.softcap)
    loss.backward()
    assert av.proj.weight.grad.device == av.prefix_embeds.grad.device == loss.device == ELSEWHERE
    logp_n = head_logprobs(hidden_nd.detach(), elsewhere.head_weight, target_n, elsewhere.softcap)
    assert logp_n.device == ELSEWHERE and logp_n.shape == (10,)
