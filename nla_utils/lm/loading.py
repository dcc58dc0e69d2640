"""Loading a backbone: its layer, device and special tokens, all refused by name before weights load."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nla_utils.artefacts import read_json
from nla_utils.config import RunConfig
from nla_utils.errors import BackboneError, ConfigError, SourceError
from nla_utils.lm import cpu
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.checks import check_backbone
from nla_utils.lm.choices import choose_attention, choose_head
from nla_utils.lm.registry import BackboneSpec, fetch, read_model_config, resolve, settings_hash, weight_hash

# The value of a run's ``device`` that spreads a backbone over several cards.
SPLIT = "split"


def pick_device(device: str) -> str:
    """The device that is meant: ``auto`` is CUDA, then MPS, then CPU; so is ``split``, of where inputs and results lie.

    Raises ``ConfigError`` for a card that is not there.
    """
    if device not in ("auto", SPLIT):
        kind, _, number = device.partition(":")
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
        if int(number or 0) >= there:
            raise ConfigError(f"device {device!r}: this machine has {there} of {kind}; --device auto takes what there is")
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def hardware(device: str) -> str:
    """What a run on a device was computed by: the GPU's name, else the CPU's, with what decides how it takes sums."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    bfloat16 = "with" if cpu.has_bfloat16() else "without"
    return (
        f"{model or platform.machine()}, {torch.backends.cpu.get_cpu_capability()} {bfloat16} bfloat16 instructions, "
        f"{torch.get_num_threads()} threads"
    )


def pick_layer(wanted: int | None, spec: BackboneSpec, n_layers: int) -> int:
    """The run's layer, else the registry's, else round(0.73 L); raises if it is not in 1..L-1."""
    layer = wanted if wanted is not None else spec.layer
    if layer is None:
        layer = round(0.73 * n_layers)
        print(f"{spec.name}: no layer given, using round(0.73 · {n_layers}) = {layer}")
    if not 1 <= layer < n_layers:
        raise ConfigError(
            f"layer {layer} is out of range for {spec.name}: it has {n_layers} blocks, "
            f"choose 1 to {n_layers - 1} (hidden_states[{n_layers}] is already normalised)"
        )
    return layer


@dataclass(frozen=True)
class Description:
    """What a folder says of a backbone before its weights load; ``special`` is (start, EOS ids, pad), ``hashes`` are of
    the weights and of the model's settings."""

    spec: BackboneSpec
    folder: Path
    layer: int
    d: int
    n_layers: int
    tokenizer: PreTrainedTokenizerBase
    special: tuple[int, tuple[int, ...], int]
    padding_side: str
    hashes: tuple[str, str]


def describe(given: RunConfig) -> Description:
    """The configured backbone's description, its files fetched.

    Raises ``ConfigError`` (unknown name, layer out of range, no start token, a kind of model that is not supported)
    or ``SourceError``.
    """
    spec = resolve(given.backbone)
    if spec.unverified:
        print(f"{spec.name} has not been run with this code: {spec.unverified}")
    folder = fetch(spec)
    config = read_model_config(spec, folder)
    layer = pick_layer(given.layer, spec, config.num_hidden_layers)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = special_ids(spec, tokenizer, folder)
    return Description(
        spec, folder, layer, config.hidden_size, config.num_hidden_layers, tokenizer, special,
        spec.padding_side or tokenizer.padding_side, (weight_hash(folder), settings_hash(folder)),
    )  # fmt: skip


def load_backbone(given: RunConfig) -> Backbone:
    """The configured backbone: fetched, loaded, frozen and checked.

    Raises what :func:`describe` does before weights load, ``BackboneError`` if the model fails the checks of
    :mod:`nla_utils.lm.checks`.
    """
    found = describe(given)
    model = load_model(found.folder, given).eval().requires_grad_(False)
    head_weight = model.get_output_embeddings().weight
    head_weight = head_weight.to(cpu.product_dtype(head_weight))
    backbone = Backbone(
        found.spec, model, head_weight, found.tokenizer, found.layer, *found.special, found.padding_side, found.hashes,
        model.config._attn_implementation,
    )  # fmt: skip
    if model.device.type == "cpu":
        # Before linear maps are widened: what is compared with is computed from the weights as they are.
        choose_attention(backbone)
        cpu.widen_linear_maps(model.base_model)
    choose_head(backbone)
    check_backbone(backbone)
    return backbone


def load_model(folder: Path, config: RunConfig) -> nn.Module:
    """The weights on the run's device; ``split`` spreads the blocks over all cards, and over the CPU's memory after.

    Raises ``BackboneError`` where not even embeddings and head find room on a card.
    """
    spread = {"device_map": "auto"} if config.device == SPLIT else {}
    try:
        whole = AutoConfig.from_pretrained(folder)
        if (text := whole.get_text_config()) is not whole:
            # The language model of a multimodal one, whose weights are called what they are called inside it.
            spread |= {"config": text, "key_mapping": {r"^model\.language_model\.": "model."}}
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, config.dtype), output_loading_info=True, **spread
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SourceError(f"{folder}: its weights were not read ({error}); fetch or convert them again") from None
    # The library fills what a file lacks with random numbers.
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise SourceError(f"{folder}: its files lack {len(lacking)} weights of the model, {lacking[0]} among them")
    if config.device != SPLIT:
        return model.to(pick_device(config.device))
    tables = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    if any(table.device.type == "meta" for table in tables):
        raise BackboneError(f"{folder}: its embeddings or its head find no room on the cards; they cannot be offloaded")
    return model


def special_ids(spec: BackboneSpec, tokenizer, folder: Path) -> tuple[int, tuple[int, ...], int]:
    """(start, EOS ids, pad) of a backbone; raises ``ConfigError`` where there is no start token.

    Any id ends a sequence that the registry, else the tokenizer or the folder's ``generation_config.json`` calls EOS.
    """
    start_id = spec.start_id
    if start_id is None:
        start_id = tokenizer.bos_token_id
        if start_id is None:
            raise ConfigError(
                f"{spec.name}: its tokenizer has no BOS token and the registry names no start token; "
                f"every target starts from one, so this backbone needs a registry entry with start_id"
            )
        print(f"{spec.name}: sequences start from the tokenizer's BOS, id {start_id}")
    eos_ids = spec.eos_ids
    if eos_ids is None:
        eos_ids = tuple(dict.fromkeys([*_ids(tokenizer.eos_token_id), *_ids(_generation(folder).get("eos_token_id"))]))
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = eos_ids[0] if eos_ids else start_id
    return start_id, eos_ids, pad_id


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _generation(folder: Path) -> dict:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}
