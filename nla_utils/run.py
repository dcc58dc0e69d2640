"""Opening a run: what every notebook does first."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nla_utils.backbone import Backbone, identity
from nla_utils.config import RunConfig
from nla_utils.loading import load_backbone, pick_device, pick_layer, special_ids
from nla_utils.sources import fetch, resolve, weight_hash
from nla_utils.store import RunFolder


@dataclass
class Run:
    """A configuration, the folder it writes to, and the backbone if one was loaded."""

    config: RunConfig
    folder: RunFolder
    backbone: Backbone | None = None


def open_run(config: RunConfig) -> Run:
    """Load the run's backbone and open its folder; bad input raises before weights load."""
    backbone = load_backbone(config)
    return Run(config, folder_of(config, backbone), backbone)


def folder_of(config: RunConfig, backbone: Backbone) -> RunFolder:
    """The folder of a run with a backbone that is loaded, standing at its layer."""
    return RunFolder.of(config, backbone.name, {**backbone.identity(), "seed": config.seed})


def open_folder(config: RunConfig) -> RunFolder:
    """The run's folder with its live identity, without loading the model's weights."""
    from transformers import AutoConfig, AutoTokenizer

    spec = resolve(config.backbone)
    source: Path = fetch(spec)
    layer = pick_layer(config.layer, spec, AutoConfig.from_pretrained(source).num_hidden_layers)
    special = special_ids(spec, AutoTokenizer.from_pretrained(source))
    live = identity(spec, weight_hash(source), layer, special, config.dtype, pick_device(config.device))
    return RunFolder.of(config, spec.name, {**live, "seed": config.seed})
