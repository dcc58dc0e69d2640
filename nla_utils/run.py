"""A run: its configuration, the folder it writes to, and the backbone. What every notebook opens first."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Optional

from nla_utils.config import ROOT, Profile, RunConfig
from nla_utils.lm.backbone import Backbone, Description
from nla_utils.lm.loading import describe, hardware, load_backbone, pick_device
from nla_utils.store import RunFolder, code_version, library_versions, write_record


@dataclass
class Run:
    """One run. ``backbone`` is ``None`` where the weights were not needed."""

    config: RunConfig
    folder: RunFolder
    backbone: Optional[Backbone] = None

    @classmethod
    def of(cls, config: RunConfig, backbone: Backbone) -> "Run":
        """The run of a configuration with a backbone that is loaded."""
        return cls(config, folder_of(config, backbone), backbone)

    @property
    def sizes(self) -> Profile:
        return self.config.sizes

    @property
    def seed(self) -> int:
        return self.config.seed

    def inside(self, name: str) -> "Run":
        """The run with a folder of its own within this run's, for training that is not the run's."""
        return dataclasses.replace(self, folder=dataclasses.replace(self.folder, path=self.folder.file(name)))

    def at(self, layer: int) -> "Run":
        """The run at another layer; at the layer this one was opened at it is this run's own folder."""
        config = dataclasses.replace(self.config, layer=None if layer == self.backbone.layer else layer)
        return Run.of(config, dataclasses.replace(self.backbone, layer=layer))

    @property
    def provenance(self) -> dict:
        """What every record of the run says of where its numbers come from."""
        return {
            "profile": self.config.folder_name,
            "identity": self.folder.identity,
            "sizes": self.sizes.record(),
            "code": code_version(),
            "libraries": library_versions(),
            "device": self.folder.device,
            "hardware": hardware(self.folder.device),
        }

    def write_results(self, name: str, values: Mapping, made_from: Mapping[str, str]) -> Path:
        """Write ``results/{name}.json``, which :meth:`RunFolder.read_results` reads: provenance, then ``values``."""
        path = self.folder.file(f"results/{name}.json")
        write_record(path, {"name": name, **self.provenance, "made_from": dict(made_from), **values})
        return path


def open_run(config: RunConfig, weights: bool = True) -> Run:
    """The run of a configuration; without ``weights`` only the backbone's configuration and tokenizer are read.

    Raises ``ConfigError`` or ``SourceError`` for bad input before weights load, ``BackboneError`` where the model
    fails the checks at load.
    """
    if weights:
        return Run.of(config, load_backbone(config))
    return Run(config, folder_of(config, describe(config)))


def folder_of(config: RunConfig, backbone: Description) -> RunFolder:
    """Folder of a run; a relative ``out`` is taken from the repository's root, wherever a notebook runs."""
    path = ROOT / config.out / backbone.name / config.folder_name
    device = pick_device(config.device).split(":")[0]
    return RunFolder(path, {**backbone.identity(), "seed": config.seed}, config, device)
