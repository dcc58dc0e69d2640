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
from nla_utils.artefacts import arrays_hash, atomic_write, json_hash, write_json
from nla_utils.config import AVConfig
from nla_utils.errors import ArtefactError, ConfigError
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.sampling import SamplingSettings

ARTEFACT = "best_av"
# What the authors' verbalizers are made of, and under which keys their scripts look for the tensors.
PARTS = ("proj", "proj_extra", "layer_embed", "prefix_embeds", "prefix_mlp")
NESTED = ("trainable", "av", "av_state_dict", "model", "state_dict")
# Where a release keeps its files: in its folder, or (gpt-oss-20b) in one of this name inside.
PLACES = ("", "best_av")


class ActivationVerbalizer(nn.Module):
    """Slots made of v, and P prefix vectors, in front of a frozen backbone (PROTOCOL.md §2).

    ``proj`` (d×d, no bias, identity at first) makes the first slot, ``proj_extra`` the further ones that some releases
    have; ``layer_embed`` adds the row of the AV's layer to each of them. ``prefix_embeds`` (P, d) is the BOS embedding at
    first; where ``prefix_mode`` is ``mlp``, ``prefix_mlp`` makes the P vectors of v. Names are the authors'. All are
    float32 and cast to the backbone's dtype where they enter it.

    Args:
        start_embedding_d: embedding of the start token.
        n_layers: L of the backbone, for ``layer_embed`` (L + 1, d).
        embed_norm: mean norm of the rows of the raw embedding table, for ``inject_norm`` ``embed``.
    """

    def __init__(
        self, config: AVConfig, d: int, start_embedding_d: Tensor, n_layers: int = 0, embed_norm: Optional[float] = None
    ):
        super().__init__()
        if config.d_vector not in (None, d):
            raise ConfigError(f"d_vector is {config.d_vector}, the backbone's hidden size is {d}")
        self.config, p = config, config.num_prefix_tokens
        self.norm = {None: None, "none": None, "embed": embed_norm}.get(config.inject_norm, config.inject_norm)
        self.proj = _identity(d)
        if config.num_inject_slots > 1:
            self.proj_extra = nn.ModuleList(_identity(d) for _ in range(config.num_inject_slots - 1))
        if config.use_layer_embed:
            self.layer_embed = nn.Embedding.from_pretrained(torch.zeros(n_layers + 1, d), freeze=False)
        self.prefix_embeds = self.prefix_mlp = None
        if p and config.prefix_mode == "mlp":
            hidden = config.prefix_mlp_hidden
            self.prefix_mlp = nn.Sequential(nn.Linear(d, hidden), nn.GELU(), nn.Linear(hidden, p * d))
        elif p:
            self.prefix_embeds = nn.Parameter(start_embedding_d.detach().float().cpu().repeat(p, 1))

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
            embed_norm = None
            if config.inject_norm == "embed":
                # The raw table, as the authors take it: without the scale that Gemma's module applies.
                table_Vd = backbone.model.get_input_embeddings().weight
                embed_norm = float(torch.cat([t.float().norm(dim=1) for t in table_Vd.split(16384)]).mean())
        return cls(config, backbone.d, start, backbone.n_layers, embed_norm).to(backbone.device)

    def forward(self, v_Bd: Tensor, dtype: torch.dtype) -> Tensor:
        """Input embeddings ``[slots, prefix]`` (B, slots + P, d) in the backbone's dtype."""
        v_Bd = v_Bd.float()
        if self.norm is not None:
            v_Bd = nn.functional.normalize(v_Bd, dim=-1) * self.norm
        slots_BSd = torch.stack([proj(v_Bd) for proj in (self.proj, *getattr(self, "proj_extra", ()))], dim=1)
        if self.config.use_layer_embed:
            slots_BSd = slots_BSd + self.layer_embed.weight[self.config.extraction_layer]
        parts = [slots_BSd.to(dtype)]
        if self.prefix_mlp is not None:
            parts.append(self.prefix_mlp(v_Bd).unflatten(1, (self.config.num_prefix_tokens, -1)).to(dtype))
        elif self.prefix_embeds is not None:
            parts.append(self.prefix_embeds.to(dtype).expand(len(v_Bd), -1, -1))
        return torch.cat(parts, dim=1)

    def sampling(self, max_new_tokens: int) -> SamplingSettings:
        """How the AV's rollouts are sampled: at its configuration's temperature and top_p."""
        return SamplingSettings(max_new_tokens, temperature=self.config.temperature, top_p=self.config.top_p)

    def trainable(self) -> dict[str, Tensor]:
        """The authors' names for the parameters, on the CPU in float32."""
        own = dict(self.named_parameters())
        # The authors' order: the map first.
        return {n: own[n].detach().float().cpu().clone() for n in sorted(own, key=lambda n: n != "proj.weight")}

    def load_trainable(self, tensors: dict[str, Tensor], source: str) -> "ActivationVerbalizer":
        """Take parameters; other tensors that no AV has are named in a warning.

        Raises ``ArtefactError`` that names ``source`` where a parameter is missing, of another shape or not finite, or
        where there are parameters of an AV with another configuration.
        """
        own = dict(self.named_parameters())
        # Some write the prefix of an AV that has none.
        given = {k: t for k, t in tensors.items() if t.numel()}
        missing, unknown = sorted(set(own) - set(given)), sorted(set(given) - set(own))
        if missing:
            filled = "only some of" if set(own) & set(given) else "none of"
            raise ArtefactError(
                f"{source} holds {sorted(tensors)}: it fills {filled} the AV's parameters {sorted(own)}, which its "
                f"config.json calls for"
            )
        extra = [k for k in unknown if k.split(".")[0] in PARTS]
        if extra:
            raise ArtefactError(f"{source} holds {extra}, which its config.json does not call for: the two do not fit")
        if unknown:
            print(f"warning: {source}: tensors that are not used: {unknown}")
        for name, p in own.items():
            if tuple(given[name].shape) != tuple(p.shape):
                raise ArtefactError(
                    f"{source}: {name} is {tuple(given[name].shape)}, this backbone's AV has "
                    f"{tuple(p.shape)}; it was trained on another backbone or prefix length"
                )
            if not given[name].is_floating_point() or not torch.isfinite(given[name]).all():
                raise ArtefactError(f"{source}: {name} contains non-finite values")
            p.data.copy_(given[name])
        return self


def _identity(d: int) -> nn.Linear:
    proj = nn.Linear(d, d, bias=False)
    nn.init.eye_(proj.weight)
    return proj


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
    """``val_fve_nrm`` and ``step`` of a checkpoint folder, ``None`` where the file does not say.

    The authors' ``val_fve_nrm`` is a plain cosine, not ½(1 + cos).
    """
    path = find_file(folder, "best_av.pt")
    state = {} if path is None else _read(path, _load_pt)
    return {k: state[k] if isinstance(state.get(k), (int, float)) else None for k in ("val_fve_nrm", "step")}


def import_av(folder: Path, backbone: Backbone) -> ActivationVerbalizer:
    """Load an AV from a folder with ``config.json`` and either checkpoint format; see :func:`check_av`."""
    config, tensors, source = _read_av(folder, backbone.layer)
    return ActivationVerbalizer.of(config, backbone).load_trainable(tensors, source)


def check_av(folder: Path, layer: int, d: int, n_layers: int) -> AVConfig:
    """The configuration of a folder's AV, if it fits a backbone of this layer and shape; no weights are needed.

    A ``.pt`` is read with ``weights_only=True``, its tensors nested under one of :data:`NESTED` or flat. Raises
    ``ConfigError`` or ``ArtefactError`` that names the file if it does not fit.
    """
    config, tensors, source = _read_av(folder, layer)
    ActivationVerbalizer(config, d, torch.zeros(d), n_layers, 1.0).load_trainable(tensors, source)
    return config


def av_hash(folder: Path) -> str:
    """Hash of an AV's configuration and tensors, whatever format its folder keeps them in."""
    config, tensors, _ = _read_av(folder)
    arrays = {name: t.detach().float().contiguous().numpy() for name, t in tensors.items()}
    return json_hash([asdict(config), arrays_hash(arrays)])[:16]


def find_file(folder: Path, name: str) -> Optional[Path]:
    """A release's file, in its folder or in ``best_av`` inside."""
    return next((path for place in PLACES if (path := folder / place / name).exists()), None)


def _read_av(folder: Path, layer: Optional[int] = None) -> tuple[AVConfig, dict[str, Tensor], str]:
    config = AVConfig.from_json(find_file(folder, "config.json") or folder / "config.json")
    if layer not in (None, config.extraction_layer):
        raise ArtefactError(f"{folder}: the AV reads layer {config.extraction_layer}, this run extracts layer {layer}")
    path = find_file(folder, "best_av.safetensors")
    if path is not None:
        return config, _read(path, load_file), str(path)
    path = find_file(folder, "best_av.pt") or folder / "best_av.pt"
    return config, _unwrapped(_read(path, _load_pt), path), str(path)


def _load_pt(path: Path) -> dict:
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"it holds a {type(state).__name__}, not a dictionary")
    return state


def _unwrapped(state: dict, path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, wherever the authors' scripts keep them."""
    inner = next((state[key] for key in NESTED if isinstance(state.get(key), dict)), state)
    tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ArtefactError(f"{path} holds {sorted(map(str, state))}: no tensors there, nor under {', '.join(NESTED)}")
    return tensors


def _read(path: Path, read: Callable[[Path], dict]) -> dict:
    try:
        return read(path)
    # Each format has errors of its own for a file that is empty, cut, altered or unsafe.
    except Exception as error:
        raise ArtefactError(f"{path} was not read ({error or type(error).__name__}); fetch it again") from None
