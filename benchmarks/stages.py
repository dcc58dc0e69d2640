"""All stages of a run on a random backbone of any shape, each timed. No claim about activations is made here."""

from __future__ import annotations

from pathlib import Path

import torch
from clock import now
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from nla_utils.ablation import make_ablation
from nla_utils.ceilings import make_ceilings
from nla_utils.config import RunConfig
from nla_utils.evaluation import score_ceilings, score_rollouts
from nla_utils.reader import fit_reader
from nla_utils.readings import make_readings
from nla_utils.rollouts import make_rollouts, rollout_set
from nla_utils.run import Run
from nla_utils.targets import make_targets
from nla_utils.training import train_av

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


def run_stages(config: RunConfig, run: Run) -> dict[str, float]:
    """Seconds of each notebook's work, in order; everything is left in the run's folder."""
    given, folder, seconds = (config, run.backbone), run.folder, {}

    def timed(stage: str, work, *args):
        started = now(run.backbone.device)
        result = work(*given, *args, folder)
        seconds[stage] = now(run.backbone.device) - started
        return result

    targets = timed("01 targets", make_targets)
    timed("02 training", train_av, targets)
    timed("02 tail reader", fit_reader, targets)
    ceilings = timed("03 ceilings", make_ceilings, targets)
    timed("03 slip by slip", make_ablation, targets, ceilings)
    rollouts = timed("04 rollouts", make_rollouts, targets)
    readings = timed("04 readings", make_readings, targets)
    started = now(run.backbone.device)
    for protocol in ("paper", "corrected"):
        score_ceilings(targets, ceilings, protocol)
        own = rollout_set(rollouts, targets, protocol)
        score_rollouts(targets, own, ceilings, readings, protocol, "paraphrase_bestof8")
    return seconds | {"03 to 05 scores": now(run.backbone.device) - started}
