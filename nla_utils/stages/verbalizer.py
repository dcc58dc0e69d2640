"""The activation verbalizer (AV): a linear map and P prefix vectors in front of a frozen backbone."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path
from typing import Callable, Optional

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from nla_utils import workers
from nla_utils.artefacts import atomic_write, write_json
from nla_utils.config import AVConfig
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.backbone import Backbone

ARTEFACT = "best_av"


class ActivationVerbalizer(nn.Module):
    """``proj`` (d×d, no bias, identity at first) and ``prefix_embeds`` (P, d, BOS embedding at first).

    Both are float32 and cast to the backbone's dtype where they enter it (PROTOCOL.md §2).
    """

    def __init__(self, config: AVConfig, d: int, start_embedding_d: Tensor):
        super().__init__()
        if config.d_vector not in (None, d):
            raise ConfigError(f"d_vector is {config.d_vector}, the backbone's hidden size is {d}")
        self.config = config
        self.proj = nn.Linear(d, d, bias=False)
        nn.init.eye_(self.proj.weight)
        start_d = start_embedding_d.detach().float().cpu()
        self.prefix_embeds = nn.Parameter(start_d.repeat(config.num_prefix_tokens, 1))
        expected = d * d + config.num_prefix_tokens * d
        actual = sum(p.numel() for p in self.parameters())
        assert actual == expected, f"{actual} trainable parameters, d² + P·d = {expected}"

    @classmethod
    def fresh(
        cls, backbone: Backbone, max_new_tokens: int = 64, span: Optional[int] = None, inject_norm: Optional[float] = None
    ) -> "ActivationVerbalizer":
        """An untrained AV for a backbone, on its device; ``span``: it is to write the last n tokens alone;
        ``inject_norm``: v is rescaled to this norm."""
        config = AVConfig(
            backbone_id=backbone.spec.name,
            backbone_dtype=str(backbone.dtype).removeprefix("torch."),
            extraction_layer=backbone.layer,
            num_prefix_tokens=backbone.spec.num_prefix_tokens,
            max_new_tokens=min(max_new_tokens, span or max_new_tokens),
            target_span=f"last:{span}" if span else "full",
            inject_norm=inject_norm,
        )
        return cls.of(config, backbone)

    @classmethod
    def of(cls, config: AVConfig, backbone: Backbone) -> "ActivationVerbalizer":
        """An untrained AV of a configuration, on the backbone's device."""
        with torch.no_grad():
            start = backbone.embed(torch.tensor([backbone.start_id]))[0]
        return cls(config, backbone.d, start).to(backbone.device)

    def forward(self, v_Bd: Tensor, dtype: torch.dtype) -> Tensor:
        """Input embeddings ``[proj(v), prefix]`` (B, 1 + P, d) in the backbone's dtype."""
        v_Bd = v_Bd.float()
        if self.config.inject_norm is not None:
            v_Bd = nn.functional.normalize(v_Bd, dim=-1) * self.config.inject_norm
        slot_B1d = self.proj(v_Bd)[:, None].to(dtype)
        prefix_BPd = self.prefix_embeds.to(dtype).expand(len(v_Bd), -1, -1)
        return torch.cat([slot_B1d, prefix_BPd], dim=1)

    def trainable(self) -> dict[str, Tensor]:
        """The authors' names for the parameters, on the CPU in float32."""
        return {
            "proj.weight": self.proj.weight.detach().float().cpu().clone(),
            "prefix_embeds": self.prefix_embeds.detach().float().cpu().clone(),
        }

    def load_trainable(self, tensors: dict[str, Tensor], source: str) -> "ActivationVerbalizer":
        """Take parameters; raises ``ArtefactError`` that names ``source`` if names or shapes differ."""
        own = {"proj.weight": self.proj.weight, "prefix_embeds": self.prefix_embeds}
        if set(tensors) != set(own):
            raise ArtefactError(f"{source} holds {sorted(tensors)}, an AV has {sorted(own)}")
        for name, p in own.items():
            if tuple(tensors[name].shape) != tuple(p.shape):
                raise ArtefactError(
                    f"{source}: {name} is {tuple(tensors[name].shape)}, this backbone's AV has "
                    f"{tuple(p.shape)}; it was trained on another backbone or prefix length"
                )
            if not tensors[name].is_floating_point() or not torch.isfinite(tensors[name]).all():
                raise ArtefactError(f"{source}: {name} holds what is no finite number")
            p.data.copy_(tensors[name])
        return self


def text_hidden(backbone: Backbone, prefix_BPd: Tensor, text_BTd: Tensor) -> Tensor:
    """Final hidden states (B, T, d) from which the tokens of texts behind a prefix are predicted."""
    hidden_BSd = backbone.last_hidden(inputs_embeds=torch.cat([prefix_BPd, text_BTd], dim=1))
    # The last prefix position predicts the first token.
    return hidden_BSd[:, prefix_BPd.shape[1] - 1 : -1]


@torch.inference_mode()
def text_logprobs(
    backbone: Backbone, prefix_BPd: Tensor, ids_BT: Tensor, text_BTd: Tensor, valid_BT: Tensor
) -> Tensor:
    """log p of each valid token of texts behind a prefix (B, T), 0 elsewhere; ``text_BTd`` are their embeddings."""
    hidden_nd = text_hidden(backbone, prefix_BPd, text_BTd)[valid_BT]
    logp_BT = torch.zeros(ids_BT.shape, device=backbone.device)
    logp_BT[valid_BT] = backbone.logprobs(hidden_nd, ids_BT[valid_BT])
    return logp_BT


def export_av(av: ActivationVerbalizer, folder: Path, val_fve_nrm: float, step: int) -> None:
    """Write ``best_av.safetensors``, the authors' ``best_av.pt`` and ``config.json`` into ``folder``."""
    if not workers.leads():
        return workers.wait()
    trainable = av.trainable()
    atomic_write(folder / "best_av.safetensors", save(trainable))
    buffer = io.BytesIO()
    torch.save({"trainable": trainable, "val_fve_nrm": val_fve_nrm, "step": step}, buffer)
    atomic_write(folder / "best_av.pt", buffer.getvalue())
    write_json(folder / "config.json", asdict(av.config))
    workers.wait()


def checkpoint_record(folder: Path) -> dict:
    """``val_fve_nrm`` and ``step`` of a checkpoint folder, ``None`` where only the safetensors file is there."""
    path = folder / "best_av.pt"
    if not path.exists():
        return {"val_fve_nrm": None, "step": None}
    state = _read_pt(path)
    return {k: state[k] for k in ("val_fve_nrm", "step")}


def import_av(folder: Path, backbone: Backbone) -> ActivationVerbalizer:
    """Load an AV from a folder with ``config.json`` and either checkpoint format.

    A ``.pt`` is read with ``weights_only=True``. Raises ``ArtefactError`` if it does not fit.
    """
    config = AVConfig.from_json(folder / "config.json")
    if config.extraction_layer != backbone.layer:
        reads, extracts = config.extraction_layer, backbone.layer
        raise ArtefactError(f"{folder}: the AV reads layer {reads}, this run extracts layer {extracts}")
    av = ActivationVerbalizer.of(config, backbone)
    path = folder / "best_av.safetensors"
    tensors = _read(path, load_file) if path.exists() else _read_pt(path := folder / "best_av.pt")["trainable"]
    return av.load_trainable(tensors, str(path))


def _read_pt(path: Path) -> dict:
    state = _read(path, lambda p: torch.load(p, map_location="cpu", weights_only=True))
    if not isinstance(state, dict) or not {"trainable", "val_fve_nrm", "step"} <= set(state):
        raise ArtefactError(f"{path} is no AV checkpoint: it holds no trainable, val_fve_nrm and step")
    return state


def _read(path: Path, read: Callable[[Path], dict]) -> dict:
    try:
        return read(path)
    # Each format has errors of its own for a file that is empty, cut, altered or unsafe.
    except Exception as error:
        raise ArtefactError(f"{path} was not read ({error or type(error).__name__}); fetch it again") from None
