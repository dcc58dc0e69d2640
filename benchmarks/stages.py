"""All stages of a run on a random backbone of any shape, each timed. No claim about activations is made here."""

from __future__ import annotations

from pathlib import Path

import torch
from clock import now
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from nla_utils import rows
from nla_utils.baselines import make_ceilings, make_probe
from nla_utils.evidence import of_ceilings, of_rollouts
from nla_utils.protocol import PROTOCOLS
from nla_utils.run import Run
from nla_utils.scores import score
from nla_utils.targets import make_targets
from nla_utils.training import train_av
from nla_utils.verbalizer import make_rollouts

SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
SPECIAL_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def random_backbone(folder: Path, config: PretrainedConfig) -> None:
    """A random bf16 model of that shape, whose ids are :data:`SPECIAL_IDS`, and a tokenizer of as many words."""
    words = [*SPECIAL.values(), *(f"w{i}" for i in range(config.vocab_size - len(SPECIAL)))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["pad_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def run_stages(run: Run) -> dict[str, float]:
    """Seconds of each notebook's work, in order; everything is left in the run's folder."""
    seconds = {}

    def timed(stage: str, work, *given):
        started = now(run.backbone.device)
        result = work(*given)
        seconds[stage] = now(run.backbone.device) - started
        return result

    targets = timed("01 targets", make_targets, run)
    timed("02 training", train_av, run, targets)
    ceilings = timed("03 ceilings", make_ceilings, run, targets)
    rollouts = timed("04 rollouts", make_rollouts, run, targets)
    probe = timed("04 probe", make_probe, run, targets)
    started = now(run.backbone.device)
    evidence = of_ceilings(targets, ceilings, rollouts.k) | of_rollouts(targets, rollouts, ceilings, probe)
    for protocol in PROTOCOLS:
        for chosen in (rows.OF_CEILINGS, rows.OF_ROLLOUTS, rows.OF_RERANKS):
            score(evidence, protocol, chosen).to_json()
    return seconds | {"03 to 05 scores": now(run.backbone.device) - started}
