"""Gemma-2-2B's architecture at the paper's size, with random weights: a whole run on a card, and the reference's rates.

``python card.py FOLDER`` writes ``card.json`` into the folder and prints the table; the backbone (5 GB) and the run are
kept in a temporary folder and removed. No claim about activations is made here.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from run import measure, report
from stages import SPECIAL_IDS, random_backbone, run_stages
from transformers import Gemma2Config, PretrainedConfig

from nla_utils.config import RunConfig
from nla_utils.run import open_run
from nla_utils.store import write_json

GEMMA_2_2B = Gemma2Config(
    num_hidden_layers=26,
    hidden_size=2304,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    intermediate_size=9216,
    vocab_size=256_000,
    query_pre_attn_scalar=256,
    **SPECIAL_IDS,
)


def measure_run(shape: PretrainedConfig, folder: Path, **sizes: int) -> dict:
    """The record of ``run.measure`` at the paper's sizes or the given ones, and the seconds that every stage took."""
    random_backbone(folder / "backbone", shape)
    run = open_run(RunConfig(backbone=str(folder / "backbone"), profile="full", out=str(folder / "runs"), **sizes))
    seconds = run_stages(run)
    record = measure(run)
    total = sum(seconds.values())
    whole = {"seconds": total, "ratio": record["pipeline"]["reference_seconds"] / total}
    return {"whole_run": whole, "stage_seconds": seconds, **record}


def whole_run(record: dict) -> str:
    parts = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in record["stage_seconds"].items())
    whole = record["whole_run"]
    took = f"The whole run took {whole['seconds'] / 60:.1f} minutes ({parts})"
    return f"{took}; the reference path takes {whole['ratio']:.1f} times that."


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python card.py FOLDER, where card.json is to lie")
    with tempfile.TemporaryDirectory() as tmp:
        found = measure_run(GEMMA_2_2B, Path(tmp))
    write_json(Path(sys.argv[1]) / "card.json", found)
    print(report(found))
    print(whole_run(found))
