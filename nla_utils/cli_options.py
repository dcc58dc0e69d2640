"""Options that several commands share, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from nla_utils.cli_verbalize import SET_HELP
from nla_utils.config import PROFILES

Backbone = Annotated[str, typer.Option(help="Registry name, hub id (org/name@commit) or folder.")]
ProfileName = Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")]
Out = Annotated[Path, typer.Option(help="Folder for everything a run writes.")]
Seed = Annotated[int, typer.Option(help="Seed of targets, training and rollouts.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, mps, or split: spread over all cards.")]
Dtype = Annotated[str, typer.Option(help="Backbone dtype: bfloat16, float32 or float16.")]
Sizes = Annotated[list[str], typer.Option("--set", help=SET_HELP)]
Sequences = Annotated[
    Optional[Path], typer.Option(help="A file of `nla sequences` to take the run's sequences from, instead of drawing them.")
]
