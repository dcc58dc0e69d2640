"""The reference path, written plainly from PROTOCOL.md §1-§5: what the measurement costs without care.

The library's ``generate`` at batch 16, a second full forward with all hidden states and the head, every
position kept in float32, and rollouts drawn once for notebook 04 and again for notebook 05.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nla_utils.lm.backbone import Backbone, pad
from nla_utils.verbalizer import ActivationVerbalizer

BATCH = 16
NEW_TOKENS = 64


def generate(backbone: Backbone, top_p: float = 1.0, **prompt: Tensor) -> Tensor:
    """New token ids (B, ≤ 64) by ``model.generate`` with the paper's arguments."""
    ids = backbone.model.generate(
        **prompt,
        do_sample=True,
        temperature=1.0,
        top_p=top_p,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=list(backbone.eos_ids),
        pad_token_id=backbone.pad_id,
    )
    return ids[:, prompt["input_ids"].shape[1] :] if "input_ids" in prompt else ids


@torch.no_grad()
def sample_and_extract(backbone: Backbone, n: int) -> tuple[Tensor, Tensor]:
    """Ids and the activations of every position (n, T + 1, d) float32, in batches of 16."""
    all_ids, all_h = [], []
    for _ in range(0, n, BATCH):
        start = torch.full((BATCH, 1), backbone.start_id, device=backbone.device)
        ids = generate(backbone, input_ids=start, attention_mask=torch.ones_like(start))
        ids = F.pad(ids, (0, NEW_TOKENS - ids.shape[1]), value=backbone.pad_id)
        all_ids.append(ids)
        all_h.append(every_position(backbone, torch.cat([start, ids], dim=1)))
    return torch.cat(all_ids), torch.cat(all_h)


@torch.no_grad()
def every_position(backbone: Backbone, ids_BT: Tensor) -> Tensor:
    """``hidden_states[ℓ]`` (B, T, d) float32 from a full forward, all blocks and the head."""
    out = backbone.model(ids_BT.to(backbone.device), output_hidden_states=True, use_cache=False)
    return out.hidden_states[backbone.layer].float()


@torch.no_grad()
def encode(backbone: Backbone, ids_NT: Tensor) -> Tensor:
    """Activation of the last position (N, d), in batches of 16."""
    return torch.cat([every_position(backbone, b)[:, -1] for b in ids_NT.split(BATCH)])


def train_step(backbone: Backbone, av: ActivationVerbalizer, v_Bd: Tensor, ids_BT: Tensor) -> float:
    """Loss and gradient of one batch through the logits of all positions."""
    prefix_BPd, ids_BT = av(v_Bd.to(backbone.device), backbone.dtype), ids_BT.to(backbone.device)
    inputs = torch.cat([prefix_BPd, backbone.embed(ids_BT)], dim=1)
    logits_BSV = backbone.model(inputs_embeds=inputs, use_cache=False).logits
    logits_BTV = logits_BSV[:, prefix_BPd.shape[1] - 1 : -1].float()
    loss = F.cross_entropy(logits_BTV.reshape(-1, logits_BTV.shape[-1]), ids_BT.reshape(-1))
    for p in av.parameters():
        p.grad = None
    loss.backward()
    return loss.item()


@torch.no_grad()
def roll_out_and_score(backbone: Backbone, av: ActivationVerbalizer, v_Md: Tensor, k: int) -> Tensor:
    """Re-encoded rollouts (M·K, d) of one notebook: drawn, encoded, and their log-probabilities computed."""
    h = []
    for v_d in v_Md.to(backbone.device):
        for first in range(0, k, BATCH):
            prompt_BPd = av(v_d.expand(min(BATCH, k - first), -1), backbone.dtype)
            mask = torch.ones(prompt_BPd.shape[:2], dtype=torch.long, device=backbone.device)
            ids = generate(backbone, inputs_embeds=prompt_BPd, attention_mask=mask)
            h.append(every_position(backbone, ids)[:, -1])
            logits = backbone.model(inputs_embeds=torch.cat([prompt_BPd, backbone.embed(ids)], dim=1)).logits
            torch.log_softmax(logits[:, prompt_BPd.shape[1] - 1 : -1].float(), dim=-1).gather(2, ids[..., None])
    return torch.cat(h)


@torch.no_grad()
def paraphrase_and_encode(backbone: Backbone, prompts: list[list[int]]) -> int:
    """One paraphrase a prompt, prompts padded on the left, each re-encoded alone; returns the tokens written."""
    tokens = 0
    for first in range(0, len(prompts), BATCH):
        padded = pad(prompts[first : first + BATCH], backbone.pad_id, "left")
        ids, mask = (x.to(backbone.device) for x in padded)
        written = generate(backbone, 0.95, input_ids=ids, attention_mask=mask)
        every_position(backbone, written)
        tokens += written.numel()
    return tokens


def store(path: Path, ids: Tensor, h_NTd: Tensor) -> int:
    """Bytes on disk of every position in float32."""
    torch.save({"ids": ids.cpu(), "hidden": h_NTd.cpu()}, path)
    return path.stat().st_size
