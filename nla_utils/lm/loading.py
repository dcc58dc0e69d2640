"""Loading a backbone: its layer, device and special tokens are validated before the weights load, the model after."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from nla_utils.config import RunConfig
from nla_utils.errors import BackboneError, ConfigError, SourceError
from nla_utils.lm import cpu
from nla_utils.lm.backbone import Backbone, Description
from nla_utils.lm.checks import TOLERANCE, check_backbone, differ, float32_activations, probe_ids
from nla_utils.lm.weights import (
    TOKENIZERS,
    BackboneSpec,
    fetch,
    quantized,
    read_model_config,
    resolve,
    settings_hash,
    weight_hash,
)
from nla_utils.store import read_json

# The value of a run's ``device`` that spreads a backbone over several cards.
SPLIT = "split"
# What rounding to bfloat16 once can move a product by, and more than enough for other dtypes.
HEAD_TOLERANCE = 2.0**-7


def describe(given: RunConfig) -> Description:
    """The configured backbone's description, its files fetched.

    Raises ``ConfigError`` (unknown name, layer out of range, no start token, a kind of model or of quantization that is
    not supported) or ``SourceError``.
    """
    spec = resolve(given.backbone)
    if spec.unverified:
        print(f"{spec.name} has not been run with this code: {spec.unverified}")
    folder = fetch(spec)
    config, tokenizer = read_model_config(spec, folder), read_tokenizer(folder)
    return Description(
        spec,
        folder,
        tokenizer,
        pick_layer(given.layer, spec, config.num_hidden_layers),
        config.num_hidden_layers,
        config.hidden_size,
        *special_ids(spec, tokenizer, folder, config.vocab_size),
        spec.padding_side or tokenizer.padding_side,
        getattr(torch, given.dtype),
        (weight_hash(folder), settings_hash(folder)),
    )


def load_backbone(given: RunConfig, checked: bool = True) -> Backbone:
    """The configured backbone: fetched, loaded, frozen and, unless it is checked by the caller, checked.

    Raises what :func:`describe` does before weights load, ``SourceError`` for weights that cannot be read,
    ``BackboneError`` as :func:`check_backbone` does.
    """
    found = describe(given)
    model = load_model(found.folder, given).eval().requires_grad_(False)
    weight, attention = model.get_output_embeddings().weight, model.config._attn_implementation
    head_weight = weight.to(cpu.product_dtype(weight))
    backbone = Backbone(**vars(found), model=model, head_weight=head_weight, library_attention=attention)
    if model.device.type == "cpu":
        # Before linear maps are widened: what is compared with is computed from the weights as they are.
        choose_attention(backbone)
        cpu.widen_linear_maps(model.base_model)
    choose_head(backbone)
    if checked:
        check_backbone(backbone)
    return backbone


def pick_device(device: str) -> str:
    """The device that is meant: ``auto`` is CUDA, then MPS, then CPU; so is ``split``, of where inputs and results lie.

    Raises ``ConfigError`` for a device that is not there.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device in ("auto", SPLIT):
        return next(kind for kind, n in there.items() if n)
    kind, _, number = device.partition(":")
    if int(number or 0) >= there[kind]:
        said = f"device {device!r}: this machine has {there[kind]} of {kind}"
        raise ConfigError(f"{said}; --device auto takes what there is")
    return device


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
    """The run's layer, else the registry's, else round(0.73 L); raises ``ConfigError`` if it is not in 1..L-1."""
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


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; raises ``SourceError`` that says what it lacks."""
    if not any((folder / name).exists() for name in TOKENIZERS):
        raise SourceError(f"{folder} holds no tokenizer ({', '.join(TOKENIZERS)}); copy that of the model there")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # each kind of file is read by a package of its own
        if not (folder / TOKENIZERS[0]).exists() and (folder / TOKENIZERS[1]).exists():
            said = f"{folder} holds {TOKENIZERS[1]} and no {TOKENIZERS[0]}, and it was not converted"
            raise SourceError(f"{said}; pip install sentencepiece protobuf tiktoken, or add {TOKENIZERS[0]}") from None
        said = " ".join(str(error).split())
        raise SourceError(
            f"{folder}: its tokenizer was not read ({said}); mend that, then run the same command again"
        ) from None


def special_ids(
    spec: BackboneSpec, tokenizer: PreTrainedTokenizerBase, folder: Path, n_ids: int
) -> tuple[int, tuple[int, ...], int]:
    """(start, EOS ids, pad) of a backbone with ``n_ids`` embeddings; raises ``ConfigError`` where there is no start
    token, or it has no embedding.

    Any id ends a sequence that the registry, else the tokenizer or the folder's ``generation_config.json`` calls EOS.
    """
    start_id, eos_ids, pad_id = spec.start_id, spec.eos_ids, tokenizer.pad_token_id
    if start_id is None:
        start_id = tokenizer.bos_token_id
        if start_id is None:
            raise ConfigError(
                f"{spec.name}: its tokenizer has no BOS token and the registry names no start token; "
                f"every target starts from one, so this backbone needs a registry entry with start_id"
            )
        print(f"{spec.name}: sequences start from the tokenizer's BOS, id {start_id}")
    if eos_ids is None:
        path = folder / "generation_config.json"
        stated = read_json(path).get("eos_token_id") if path.exists() else None
        named = [tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])]
        eos_ids = dict.fromkeys(i for i in named if i is not None)
    if start_id >= n_ids:
        raise ConfigError(f"{spec.name}: start token {start_id} has no embedding, there are {n_ids}")
    if pad_id is None or pad_id >= n_ids:
        # What stands at padding is never read.
        instead = next((i for i in eos_ids if i < n_ids), start_id)
        if pad_id is not None:
            print(f"{spec.name}: its pad id {pad_id} has no embedding, there are {n_ids}; padding is id {instead}")
        pad_id = instead
    return start_id, tuple(eos_ids), pad_id


def load_model(folder: Path, config: RunConfig) -> nn.Module:
    """The weights on the run's device; ``split`` spreads the blocks over all cards, and over the CPU's memory after.

    Raises ``SourceError`` for weights that are broken or incomplete, ``BackboneError`` where not even embeddings and
    head find room on a card.
    """
    how = {"dtype": getattr(torch, config.dtype), "device_map": "auto" if config.device == SPLIT else None}
    try:
        whole = AutoConfig.from_pretrained(folder)
        if (text := whole.get_text_config()) is not whole:
            # The language model of a multimodal one, whose weights are called what they are called inside it.
            how |= {"config": text, "key_mapping": {r"^model\.language_model\.": "model."}}
        if (text.pad_token_id or 0) >= text.vocab_size:
            # :func:`special_ids` has said which one pads instead.
            text.pad_token_id, how["config"] = None, text
        if said := quantized(whole):
            # On every device: without being told, the library does it only where it has no kernels for such weights.
            given = f"{folder.name}: its {said['quant_method']} weights"
            print(f"{given} are dequantized to {config.dtype}; what quantizing lost stays lost")
            text.quantization_config, how["config"] = said | {"dequantize": True}, text
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise SourceError(f"{folder}: its weights were not read ({error}); fetch or convert them again") from None
    # The library fills what a file lacks with random numbers.
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if lacking:
        raise SourceError(f"{folder}: its files lack {len(lacking)} weights of the model, {lacking[0]} among them")
    if config.device != SPLIT:
        return model.to(pick_device(config.device))
    if any(module.weight.is_meta for module in (model.get_input_embeddings(), model.get_output_embeddings())):
        raise BackboneError(f"{folder}: its embeddings or its head find no room on the cards; they cannot be offloaded")
    return model


def choose_attention(backbone: Backbone) -> None:
    """Take the attention for short sequences where its activations are as close to float32 as rounding allows, or as
    the library's are; else the library's, with the reason printed."""
    model, ids = backbone.model, probe_ids(backbone)
    try:
        exact = float32_activations(backbone, ids)
        theirs = differ(backbone.encode(ids, start=False), exact)
        model.set_attn_implementation(cpu.ATTENTION)
        if model.config._attn_implementation != cpu.ATTENTION:
            raise BackboneError("this model does not let it be replaced")
        ours = differ(backbone.encode(ids, start=False), exact)
        if not ours <= max(TOLERANCE[backbone.dtype], theirs):
            said = f"ours has a relative difference of {ours:.2g} and the library's one of {theirs:.2g}"
            raise BackboneError(f"against float32, {said}")
    except Exception as error:  # each architecture fails in a way of its own where it is given what it does not expect
        model.set_attn_implementation(backbone.library_attention)
        print(
            f"{backbone.name}: attention is the library's ({backbone.library_attention}); ours does not serve: {error}"
        )


@torch.inference_mode()
def choose_head(backbone: Backbone) -> None:
    """Take the product with the head's weight where it gives the model's own logits."""
    ids_1T = torch.tensor(probe_ids(backbone)[:1], device=backbone.device)
    ours = backbone.logits(backbone.last_hidden(input_ids=ids_1T)[0])
    difference = differ(ours, backbone.model(ids_1T, use_cache=False).logits[0])
    has_bias = getattr(backbone.model.get_output_embeddings(), "bias", None) is not None
    backbone.own_head = has_bias or not difference <= HEAD_TOLERANCE
    if backbone.own_head:
        print(f"{backbone.name}: logits are made by the model's own code; they are more than one product with its head")
