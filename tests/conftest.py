"""Tiny random backbones with real tokenizers. They test plumbing; no claim is made about activations."""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import warm  # noqa: E402
from filelock import FileLock  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from nla_utils.config import RunConfig  # noqa: E402
from nla_utils.report.results import COMMITTED  # noqa: E402
from nla_utils.run import Run, open_run  # noqa: E402
from nla_utils.targets import make_targets  # noqa: E402

warm.start_kernels()

# What the configuration of each AV that the authors published says.
PUBLISHED_AV = {
    "backbone_dtype": "bfloat16",
    "d_vector": None,
    "max_new_tokens": 64,
    "temperature": 1.0,
    "top_p": 1.0,
    "pool": "last",
    "lambda_mag": 0.1,
    "beta_kl": 0.05,
    "gamma_entropy": 0.05,
    "delta_community": 0.2,
    "h_min": 1.5,
    "h_max": 3.0,
    "prefix_mode": "static",
    "prefix_mlp_hidden": 256,
    "num_inject_slots": 1,
}
CORPUS = Path(__file__).parent / "corpus.txt"
SHAPE = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    initializer_range=0.3,
)
CONFIGS = {
    "gemma2": lambda ids: Gemma2Config(**SHAPE, **ids, head_dim=8, query_pre_attn_scalar=8, sliding_window=64),
    "gemma3": lambda ids: Gemma3TextConfig(**SHAPE, **ids, head_dim=8, query_pre_attn_scalar=8, sliding_window=64),
    "llama": lambda ids: LlamaConfig(**SHAPE, **ids),
    "qwen2": lambda ids: Qwen2Config(**SHAPE, **ids),
}
# name: (architecture, padding side, BOS = EOS, tokenizer adds BOS)
TINY = {
    "tiny-gemma2": ("gemma2", "left", False, True),
    "tiny-gemma3": ("gemma3", "left", False, True),
    "tiny-llama": ("llama", "right", False, True),
    "tiny-qwen2": ("qwen2", "right", True, False),
}


def build_tokenizer(padding_side: str, bos_is_eos: bool, adds_bos: bool, bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>", "<eos>", "<bos>"], show_progress=False)
    # ASCII alone, so that any sequence of tokens is text that can be tokenized again.
    tokenizer.train_from_iterator([CORPUS.read_text(encoding="ascii")], trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"bos_token": "<eos>" if bos_is_eos else "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side=padding_side, **names
    )


def build_backbone(folder: Path, architecture: str, padding_side: str, bos_is_eos: bool, adds_bos: bool) -> Path:
    return save_tiny(folder, CONFIGS[architecture], build_tokenizer(padding_side, bos_is_eos, adds_bos))


def save_tiny(
    folder: Path, config, tokenizer: PreTrainedTokenizerFast, shard: str = "5GB", quiet: bool = False
) -> Path:
    """A random model of a configuration made from the tokenizer's ids, with the tokenizer, in ``folder``; where it is
    ``quiet`` its head gives all ids that are no token of the tokenizer a logit of 0, and so never names them."""
    ids = dict(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config(ids))
    if quiet:
        with torch.no_grad():
            model.get_output_embeddings().weight[400:] = 0
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


# Files that take longest, in the order in which they are begun: none is left to run alone at the end.
LONGEST = """
test_real test_rehearsal test_evidence test_golden test_survives test_notebooks test_batch test_reproduction
test_training_study test_paper test_faults test_as_users_run_it test_comparison test_distributed test_released
""".split()


def pytest_collection_modifyitems(items) -> None:
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """One folder for all processes of a test run."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def few_committed(shared_folder):
    """Runs of warm processes are set beside one committed run; ``test_reproduction.py`` has one beside all."""
    folder = shared_folder / "committed"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "smollm2-135m").mkdir()
            (folder / "smollm2-135m" / "quick").symlink_to(COMMITTED / "smollm2-135m" / "quick")
    os.environ[warm.FEW] = str(folder)


@pytest.fixture(scope="session")
def tiny_folders(shared_folder) -> dict[str, Path]:
    root = shared_folder / "backbones"
    with FileLock(f"{root}.lock"):
        if not root.exists():
            building = root.with_name("building")
            for name, how in TINY.items():
                build_backbone(building / name, *how)
            building.rename(root)
    return {name: root / name for name in TINY}


def tiny_config(folder: Path, out: Path, **changes) -> RunConfig:
    values = dict(backbone=str(folder), profile="smoke", dtype="float32", device="cpu", out=str(out))
    return RunConfig(**(values | changes))


def with_out(run: Run, out: Path, **changes) -> Run:
    """The run with another output folder, and other changes of its configuration."""
    return Run.of(dataclasses.replace(run.config, out=str(out), **changes), run.backbone)


def comparable(run: Run, targets) -> bool:
    """Whether two held-out texts are short enough to be compared: of random tokens few are, once tokenized again."""
    from nla_utils.verbalizer import published_pairs

    return len(published_pairs(run.backbone, targets, targets.held_out, run.sizes.max_new_tokens)[0].rows) >= 2


@pytest.fixture(scope="session")
def once():
    """``once(name, run, make)``: what is made once for a run. Pytest makes a fixture with parameters anew whenever the
    parameter has changed, which in one file it may do with every test."""
    made = {}

    def get(name: str, run, make):
        key = name, run if isinstance(run, str) else run.backbone.name
        if key not in made:
            made[key] = make()
        return made[key]

    return get


@pytest.fixture(scope="session", params=sorted(TINY))
def tiny_run(request, once, tiny_folders, tmp_path_factory):
    """An opened run with its targets, for each tiny backbone."""

    def make():
        config = tiny_config(tiny_folders[request.param], tmp_path_factory.mktemp(f"run-{request.param}"))
        run = open_run(config)
        return run, make_targets(run)

    return once("run", request.param, make)


@pytest.fixture(scope="session")
def gemma_run(tiny_folders, tmp_path_factory):
    """The tiny Gemma-2: left padding, scaled embeddings, soft-capped logits."""
    config = tiny_config(tiny_folders["tiny-gemma2"], tmp_path_factory.mktemp("gemma"))
    run = open_run(config)
    return run, make_targets(run)


@pytest.fixture(scope="session")
def scored_run(once, tiny_run):
    """A run taken through training, ceilings and rollouts."""
    from nla_utils.baselines import make_ceilings
    from nla_utils.training import train_av
    from nla_utils.verbalizer import make_rollouts

    run, targets = tiny_run

    def make():
        train_av(run, targets)
        return run, targets, make_ceilings(run, targets), make_rollouts(run, targets)

    return once("scored run", run, make)


@pytest.fixture(scope="session")
def probe(once, scored_run):
    """The probe's texts of the targets of ``scored_run``."""
    from nla_utils.baselines import make_probe

    run, targets, *_ = scored_run
    return once("probe", run, lambda: make_probe(run, targets))


@pytest.fixture(scope="session")
def evidence(once, scored_run, probe):
    """All that the results of ``scored_run`` are made of."""
    from nla_utils.evidence import of_ceilings, of_rollouts
    from nla_utils.verbalizer import make_source_loss

    run, targets, ceilings, rollouts = scored_run

    def make():
        loss = make_source_loss(run, targets)
        of_texts = of_rollouts(targets, rollouts, ceilings, probe, loss)
        return of_ceilings(targets, ceilings, run.sizes.n_rollouts) | of_texts

    return once("evidence", run, make)


@pytest.fixture(scope="session")
def readings(once, scored_run):
    """What the reader writes for the targets of ``scored_run``."""
    from nla_extensions.tail_reader.reader import fit_reader
    from nla_extensions.tail_reader.rollouts import make_reader_rollouts

    run, targets, *_ = scored_run

    def make():
        fit_reader(run, targets)
        return make_reader_rollouts(run, targets)

    return once("readings", run, make)


@pytest.fixture(scope="session")
def nla(once, scored_run, readings):
    """The verbalizers of ``scored_run``."""
    from nla_extensions.release.bundle import load_bundle
    from nla_utils import NLA
    from nla_utils.targets import describe

    run, targets, *_ = scored_run

    def make():
        run.write_results("targets", describe(run, targets), {"targets": targets.sha256})
        return NLA(run.backbone, load_bundle(run.backbone, run.folder.path))

    return once("nla", run, make)


@pytest.fixture(scope="session")
def reproduced_tiny(tiny_folders, shared_folder):
    """By name, (the command's words, what it said, the folder) of a smoke run of a tiny backbone with everything that
    it can leave; each made once, whichever process asks first."""
    import golden

    def reproduced(name: str) -> tuple[list[str], str, Path]:
        out = shared_folder / f"reproduced-{name}"
        with FileLock(f"{out}.lock"):
            said = out / "said.txt"
            if not said.exists():
                folder, text = golden.leave(tiny_folders[name], out)
                said.write_text(text, encoding="utf-8")
        folder = out / name / "smoke"
        return golden.reproduce_command(tiny_folders[name], out), said.read_text(encoding="utf-8"), folder

    return reproduced
