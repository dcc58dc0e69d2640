"""Each stage against the reference path: one process, alternating, medians; writes JSON and the table.

Run with ``make bench``. Both sides use the same loaded model; they differ in how they use it.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import gemm
import numpy as np
import pandas as pd
import reference
import torch
from clock import now, peak_memory

from nla_utils.baselines import continue_prompts, prompt_ids
from nla_utils.config import BATCH_SIZE, N_PARAPHRASES, ROOT, Profile, RunConfig
from nla_utils.encoding import read
from nla_utils.lm.backbone import Backbone
from nla_utils.lm.cpu import has_bfloat16
from nla_utils.lm.loading import load_backbone
from nla_utils.lm.sampling import SamplingSettings, row_streams
from nla_utils.protocol import CORRECTED, PROTOCOLS
from nla_utils.report.tables import markdown
from nla_utils.run import Run, open_run
from nla_utils.store import code_version, library_versions, write_json
from nla_utils.targets import draw_chunk
from nla_utils.training import pair_loss
from nla_utils.verbalizer import ActivationVerbalizer, published_logprobs

ROUNDS = 5
K = 16
REFERENCE_SEQUENCES = 32
SAMPLING = "sampling with extraction"
ENCODING = "encoding to layer"
TRAINING = "training step"
PARAPHRASES = "paraphrases of 03"
ROLLOUTS = "rollouts of 04 and 05"
MEMORY = "peak memory, reference / ours (MB)"


@dataclass
class Side:
    """One way of doing a stage: ``work`` returns how many tokens it handled."""

    work: Callable[[], int]
    rates: list[float]
    peak_bytes: int = 0


def reference_backbone(run: Run) -> Backbone:
    """What the reference path is given: the run's own model, where bfloat16 is left to the library.

    On a CPU without bfloat16 instructions the library is faster in float32, and a careful user would load that.
    """
    if run.backbone.head_weight.dtype == run.backbone.dtype:
        return run.backbone
    return load_backbone(dataclasses.replace(run.config, dtype="float32"))


def compare(name: str, theirs: Callable[[], int], ours: Callable[[], int], models: dict[str, Backbone]) -> dict:
    """Tokens/s of both sides, alternating, each with its own attention, and the ratio of medians."""
    sides = {"reference": Side(theirs, []), "ours": Side(ours, [])}
    attentions = {
        "reference": models["reference"].library_attention,
        "ours": models["ours"].model.config._attn_implementation,
    }
    for round_ in range(ROUNDS):
        for label, side in sides.items():
            backbone = models[label]
            backbone.model.set_attn_implementation(attentions[label])
            with peak_memory(backbone.device) as memory:
                started = now(backbone.device)
                tokens = side.work()
                rate = tokens / (now(backbone.device) - started)
            side.rates.append(rate)
            side.peak_bytes = max(side.peak_bytes, memory.bytes)
            print(f"{name}, round {round_ + 1}: {label} {rate:.0f} tokens/s", flush=True)
    medians = {label: statistics.median(s.rates) for label, s in sides.items()}
    return {
        "stage": name,
        **{f"{label}_tokens_per_s": m for label, m in medians.items()},
        **{f"{label}_rounds": s.rates for label, s in sides.items()},
        **{f"{label}_peak_bytes": s.peak_bytes for label, s in sides.items()},
        "ratio": medians["ours"] / medians["reference"],
    }


def compare_stages(run: Run) -> tuple[list[dict], dict[str, Callable[[], int]]]:
    """Both paths' rates for each stage, and our way of the stages whose time is taken apart."""
    backbone, library = run.backbone, reference_backbone(run)
    settings = SamplingSettings()
    chunk = draw_chunk(backbone, settings, row_streams(0, "benchmark", range(128)))
    sequences = [chunk["ids"][i, : chunk["lengths"][i]].tolist() for i in range(128)]
    ids_NT = torch.from_numpy(chunk["ids"]).long()
    v = torch.from_numpy(chunk["v"]).to(backbone.device)
    av = ActivationVerbalizer.fresh(backbone)
    texts = [s for s in sequences if len(s) == settings.max_new_tokens][:BATCH_SIZE]
    text_ids = torch.tensor(texts)

    def ours_sampling() -> int:
        return int(
            draw_chunk(backbone, settings, row_streams(1, "benchmark", range(backbone.sample_batch)))["lengths"].sum()
        )

    def reference_sampling() -> int:
        ids, _ = reference.sample_and_extract(library, REFERENCE_SEQUENCES)
        return ids.numel()

    def ours_encoding() -> int:
        backbone.encode(sequences, start=True)
        return sum(map(len, sequences))

    def reference_encoding() -> int:
        reference.encode(library, ids_NT)
        return ids_NT.numel()

    def ours_training() -> int:
        av.zero_grad()
        pair_loss(backbone, av, v[: len(texts)], texts).backward()
        return text_ids.numel()

    def reference_training() -> int:
        reference.train_step(library, av, v[: len(texts)], text_ids)
        return text_ids.numel()

    def ours_evaluation() -> int:
        # One set of rollouts for 04 and 05, encoded both ways, with both kinds of log-probability.
        v_Md = v[:15].cpu().numpy()
        texts = av.write(backbone, v_Md, K, settings, row_streams(2, "benchmark", range(15), K + 1))
        read(backbone, texts, *PROTOCOLS)
        published_logprobs(backbone, av, v_Md, texts, np.ones(15, dtype=bool))
        return int(texts.lengths.sum())

    def reference_evaluation() -> int:
        h = reference.roll_out_and_score(library, av, v[:1], K)
        reference.roll_out_and_score(library, av, v[:1], K)
        return len(h) * reference.NEW_TOKENS

    prompts = [prompt_ids(backbone, backbone.decode_text(s), CORRECTED) for s in sequences[:32]]

    def ours_ceilings() -> int:
        repeated = [p for p in prompts for _ in range(N_PARAPHRASES)]
        streams = row_streams(3, "benchmark", range(len(prompts)), N_PARAPHRASES)
        samples = continue_prompts(backbone, repeated, SamplingSettings(top_p=0.95), streams, "left")
        backbone.encode([samples.sequence(i) for i in range(len(repeated))], start=True)
        return int(samples.lengths.sum())

    def reference_ceilings() -> int:
        return reference.paraphrase_and_encode(library, prompts)

    ways = {
        SAMPLING: (reference_sampling, ours_sampling),
        ENCODING: (reference_encoding, ours_encoding),
        TRAINING: (reference_training, ours_training),
        PARAPHRASES: (reference_ceilings, ours_ceilings),
        ROLLOUTS: (reference_evaluation, ours_evaluation),
    }
    models = {"reference": library, "ours": backbone}
    stages = [compare(name, *way, models) for name, way in ways.items()]
    return stages, {name: ways[name][1] for name in (SAMPLING, ENCODING, TRAINING)}


def measure(run: Run) -> dict:
    """Everything that the table and the sentences below it say."""
    stages, works = compare_stages(run)
    limit = gemm.limits(run.backbone, run.backbone.sample_batch, BATCH_SIZE * 65)
    for stage in stages:
        if stage["stage"] in limit:
            stage["gemm_limit_tokens_per_s"] = limit[stage["stage"]]
            stage["share_of_limit"] = stage["ours_tokens_per_s"] / limit[stage["stage"]]
    sizes = run.config.sizes
    return {
        "backbone": run.folder.identity,
        "profile": run.config.profile,
        "stages": stages,
        "pipeline": pipeline_seconds(stages, sizes),
        "evaluation": pipeline_seconds([s for s in stages if s["stage"] in (PARAPHRASES, ROLLOUTS)], sizes),
        "profiles": {name: profile(work, run.backbone.device) for name, work in works.items()},
        "store": store_sizes(run),
        "gemm": limit,
        "machine": machine(run.backbone.device),
        "code": code_version(),
        "libraries": library_versions(),
    }


def machine(device: torch.device) -> dict:
    card = {"card": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    processor = platform.processor() or platform.machine()
    return {"processor": processor, "bfloat16_instructions": has_bfloat16(), "threads": torch.get_num_threads(), **card}


def profile(work: Callable[[], int], device: torch.device) -> dict[str, float]:
    """Share of the operations' own time on the device, the six largest and the rest."""
    with torch.profiler.profile() as profiler:
        work()
    clock = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    spent = {e.key: getattr(e, clock) for e in profiler.key_averages()}
    total = sum(spent.values())
    top = dict(sorted(spent.items(), key=lambda x: -x[1])[:6])
    return {**{k: t / total for k, t in top.items()}, "the rest": 1 - sum(top.values()) / total}


def pipeline_seconds(stages: list[dict], s: Profile) -> dict:
    """Seconds of a whole run on either path, from the measured rates of these stages and the run's sizes.

    Tokens: the targets, all epochs, and paraphrases and rollouts of both sets of targets.
    """
    tokens = {
        SAMPLING: s.n_targets * s.max_new_tokens,
        PARAPHRASES: 2 * N_PARAPHRASES * s.n_eval * s.max_new_tokens,
        TRAINING: (s.n_targets - s.n_eval) * s.max_new_tokens * s.epochs,
        ROLLOUTS: 2 * s.n_eval * (s.n_rollouts + 1) * s.max_new_tokens,
    }
    seconds = {
        side: sum(tokens[x["stage"]] / x[f"{side}_tokens_per_s"] for x in stages if x["stage"] in tokens)
        for side in ("reference", "ours")
    }
    return {**{f"{k}_seconds": v for k, v in seconds.items()}, "ratio": seconds["reference"] / seconds["ours"]}


def store_sizes(run: Run) -> dict:
    """Bytes per target: every position in float32 against ids, length and the last position."""
    backbone, n = run.backbone, reference.BATCH
    with tempfile.TemporaryDirectory() as tmp:
        ids, h_NTd = (x.cpu() for x in reference.sample_and_extract(backbone, n))
        theirs = reference.store(Path(tmp) / "pack.pt", ids, h_NTd) / n
        folder = dataclasses.replace(run.folder, path=Path(tmp))
        tensors = {"ids": ids.int().numpy(), "lengths": np.zeros(n, dtype=np.int32), "v": h_NTd[:, -1].numpy()}
        ours = folder.save("targets", tensors).path.stat().st_size / n
    return {
        "reference_bytes_per_target": theirs,
        "ours_bytes_per_target": ours,
        "ratio": theirs / ours,
        "activation_bytes": 4 * backbone.d,
    }


def report(record: dict) -> str:
    rows = [
        {
            "stage": s["stage"],
            "reference, tokens/s": f"{s['reference_tokens_per_s']:.0f}",
            "ours, tokens/s": f"{s['ours_tokens_per_s']:.0f}",
            "ratio": f"{s['ratio']:.1f}",
            "share of the GEMM limit": f"{s['share_of_limit']:.0%}" if "share_of_limit" in s else "–",
            MEMORY: f"{s['reference_peak_bytes'] / 1e6:.0f} / {s['ours_peak_bytes'] / 1e6:.0f}",
        }
        for s in record["stages"]
    ]
    sizes = record["store"]
    rows.append(
        {
            "stage": "store, bytes per target",
            "reference, tokens/s": f"{sizes['reference_bytes_per_target']:.0f} B",
            "ours, tokens/s": f"{sizes['ours_bytes_per_target']:.0f} B",
            "ratio": f"{sizes['ratio']:.1f}",
            "share of the GEMM limit": "–",
            MEMORY: "–",
        }
    )
    whole, evaluation, where = record["pipeline"], record["evaluation"], record["machine"]
    lines = [
        markdown(pd.DataFrame(rows).set_index("stage")),
        f"On {where['threads']} threads, {'with' if where['bfloat16_instructions'] else 'without'} bfloat16 instructions, "
        f"code {record['code']['git_commit'][:12]}.\n",
        f"Of a stored target {sizes['activation_bytes']} bytes are the activation itself, in float32; the rest is the "
        "ids of its sequence and their number. The larger d, the less they count.\n",
        f"Notebooks 03 to 05 at `{record['profile']}` from these rates: reference "
        f"{evaluation['reference_seconds'] / 60:.1f} minutes, ours {evaluation['ours_seconds'] / 60:.1f}: "
        f"{evaluation['ratio']:.1f} times.\n",
        f"`{record['profile']}` from these rates: reference {whole['reference_seconds'] / 60:.1f} minutes, ours "
        f"{whole['ours_seconds'] / 60:.1f}: {whole['ratio']:.1f} times.\n",
        "What the time of our stages is made of (torch's profiler, share of the operations' own time):\n",
    ]
    lines += [
        f"- {stage}: " + ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in shares.items())
        for stage, shares in record["profiles"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    result = measure(open_run(RunConfig(profile="quick")))
    folder = ROOT / "benchmarks"
    write_json(folder / "results.json", result)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    head, _, _ = readme.partition("<!-- table -->")
    (folder / "README.md").write_text(f"{head}<!-- table -->\n\n{report(result)}", encoding="utf-8")
    print(report(result))
