"""Each stage against the reference path: one process, alternating, medians; writes JSON and the table.

Run with ``make bench``. Both sides use the same loaded model; they differ in how they use it.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import gemm
import numpy as np
import pandas as pd
import reference
import torch

from nla_utils.backbone import Backbone
from nla_utils.ceilings import continue_prompts, prompt_ids
from nla_utils.config import N_PARAPHRASES, PROFILES, ROOT, RunConfig
from nla_utils.rollouts import paper_logprobs, roll_out
from nla_utils.run import open_run
from nla_utils.sampling import SAMPLE_BATCH, SamplingSettings
from nla_utils.store import code_version, library_versions, write_json
from nla_utils.tables import markdown
from nla_utils.targets import draw_chunk
from nla_utils.training import pair_loss
from nla_utils.verbalizer import ActivationVerbalizer

ROUNDS = 5
K = 16
REFERENCE_SEQUENCES = 32
PARAPHRASES = "paraphrases of 03"
ROLLOUTS = "rollouts of 04 and 05"
MEMORY = "peak memory, reference / ours (MB)"


@dataclass
class Side:
    """One way of doing a stage: ``work`` returns how many tokens it handled."""

    work: Callable[[], int]
    rates: list[float]
    peak_bytes: int = 0


class PeakMemory:
    """Largest resident set above the starting one while the block runs, sampled every 5 ms."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = _resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, _resident())

    def __exit__(self, *_) -> None:
        self.done.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        return self.peak - self.start


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def compare(backbone: Backbone, name: str, theirs: Callable[[], int], ours: Callable[[], int]) -> dict:
    """Tokens/s of both sides, alternating, each with its own attention, and the ratio of medians."""
    sides = {"reference": Side(theirs, []), "ours": Side(ours, [])}
    attentions = {"reference": backbone.library_attention, "ours": backbone.model.config._attn_implementation}
    for round_ in range(ROUNDS):
        for label, side in sides.items():
            backbone.model.set_attn_implementation(attentions[label])
            with PeakMemory() as memory:
                started = time.perf_counter()
                tokens = side.work()
                rate = tokens / (time.perf_counter() - started)
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


def measure() -> dict:
    run = open_run(RunConfig(profile="quick"))
    backbone = run.backbone
    settings = SamplingSettings()
    chunk = draw_chunk(backbone, settings, 128, seed=0)
    sequences = [chunk["ids"][i, : chunk["lengths"][i]].tolist() for i in range(128)]
    ids_NT = torch.from_numpy(chunk["ids"]).long()
    v = torch.from_numpy(chunk["v"])
    av = ActivationVerbalizer.fresh(backbone)
    texts = [s for s in sequences if len(s) == 64][:16]
    text_ids = torch.tensor(texts)

    def ours_sampling() -> int:
        return int(draw_chunk(backbone, settings, SAMPLE_BATCH, seed=1)["lengths"].sum())

    def reference_sampling() -> int:
        ids, _ = reference.sample_and_extract(backbone, REFERENCE_SEQUENCES)
        return ids.numel()

    def ours_encoding() -> int:
        backbone.encode(sequences, start=True)
        return sum(map(len, sequences))

    def reference_encoding() -> int:
        reference.encode(backbone, ids_NT)
        return ids_NT.numel()

    def ours_training() -> int:
        av.zero_grad()
        pair_loss(backbone, av, v[:16], texts).backward()
        return text_ids.numel()

    def reference_training() -> int:
        reference.train_step(backbone, av, v[:16], text_ids)
        return text_ids.numel()

    def ours_evaluation() -> int:
        # One set of rollouts for 04 and 05, encoded both ways, with both kinds of log-probability.
        part = roll_out(backbone, av, v[:15], settings, K, seed=2)
        paper_logprobs(backbone, av, v[:15], part, np.ones(15, dtype=bool))
        return int(part["lengths"].sum())

    def reference_evaluation() -> int:
        h = reference.roll_out_and_score(backbone, av, v[:1], K)
        reference.roll_out_and_score(backbone, av, v[:1], K)
        return len(h) * reference.NEW_TOKENS

    prompts = [prompt_ids(backbone, backbone.decode_text(s), "corrected") for s in sequences[:32]]

    def ours_ceilings() -> int:
        repeated = [p for p in prompts for _ in range(N_PARAPHRASES)]
        samples = continue_prompts(backbone, repeated, SamplingSettings(top_p=0.95), 3, "left")
        backbone.encode([samples.sequence(i) for i in range(len(repeated))], start=True)
        return int(samples.lengths.sum())

    def reference_ceilings() -> int:
        return reference.paraphrase_and_encode(backbone, prompts)

    stages = [
        compare(backbone, "sampling with extraction", reference_sampling, ours_sampling),
        compare(backbone, "encoding to layer", reference_encoding, ours_encoding),
        compare(backbone, "training step", reference_training, ours_training),
        compare(backbone, PARAPHRASES, reference_ceilings, ours_ceilings),
        compare(backbone, ROLLOUTS, reference_evaluation, ours_evaluation),
    ]
    limit = gemm.limits(backbone, SAMPLE_BATCH, 16 * 65)
    for stage, key in zip(stages, ("sampling", "encoding", "training")):
        stage["gemm_limit_tokens_per_s"] = limit[key]
        stage["share_of_limit"] = stage["ours_tokens_per_s"] / limit[key]
    return {
        "backbone": run.folder.identity,
        "stages": stages,
        "quick_pipeline": quick_pipeline(stages),
        "evaluation": quick_pipeline([s for s in stages if s["stage"] in (PARAPHRASES, ROLLOUTS)]),
        "profiles": {
            "sampling with extraction": profile(ours_sampling),
            "encoding to layer": profile(ours_encoding),
            "training step": profile(ours_training),
        },
        "store": store_sizes(run, backbone),
        "gemm": limit,
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "code": code_version(),
        "libraries": library_versions(),
    }


def profile(work: Callable[[], int]) -> dict[str, float]:
    """Share of the operations' own time, the six largest and the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        work()
    spent = {e.key: e.self_cpu_time_total for e in profiler.key_averages()}
    total = sum(spent.values())
    top = dict(sorted(spent.items(), key=lambda x: -x[1])[:6])
    return {**{k: t / total for k, t in top.items()}, "the rest": 1 - sum(top.values()) / total}


def quick_pipeline(stages: list[dict]) -> dict:
    """Seconds of `quick` on either path, from the measured rates of these stages and the profile's sizes.

    Tokens: the targets, one epoch, and paraphrases and rollouts of both sets of targets.
    """
    s = PROFILES["quick"]
    tokens = {
        "sampling with extraction": s.n_targets * s.max_new_tokens,
        PARAPHRASES: 2 * N_PARAPHRASES * s.n_eval * s.max_new_tokens,
        "training step": (s.n_targets - s.n_eval) * s.max_new_tokens * s.epochs,
        ROLLOUTS: 2 * s.n_eval * (s.n_rollouts + 1) * s.max_new_tokens,
    }
    seconds = {
        side: sum(tokens[x["stage"]] / x[f"{side}_tokens_per_s"] for x in stages if x["stage"] in tokens)
        for side in ("reference", "ours")
    }
    return {**{f"{k}_seconds": v for k, v in seconds.items()}, "ratio": seconds["reference"] / seconds["ours"]}


def store_sizes(run, backbone) -> dict:
    """Bytes per target: every position in float32 against ids, length and the last position."""
    n = reference.BATCH
    with tempfile.TemporaryDirectory() as tmp:
        ids, h_NTd = reference.sample_and_extract(backbone, n)
        theirs = reference.store(Path(tmp) / "pack.pt", ids, h_NTd) / n
        run.folder.path = Path(tmp)
        tensors = {"ids": ids.int().numpy(), "lengths": np.zeros(n, dtype=np.int32), "v": h_NTd[:, -1].numpy()}
        ours = run.folder.save("targets", tensors).path.stat().st_size / n
    return {"reference_bytes_per_target": theirs, "ours_bytes_per_target": ours, "ratio": theirs / ours}


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
    whole = record["quick_pipeline"]
    evaluation = record["evaluation"]
    lines = [
        markdown(pd.DataFrame(rows).set_index("stage")),
        "Notebooks 03 to 05 at `quick` from these rates: reference "
        f"{evaluation['reference_seconds'] / 60:.1f} minutes, ours {evaluation['ours_seconds'] / 60:.1f}: "
        f"{evaluation['ratio']:.1f} times.\n",
        f"`quick` from these rates: reference {whole['reference_seconds'] / 60:.1f} minutes, ours "
        f"{whole['ours_seconds'] / 60:.1f}: {whole['ratio']:.1f} times.\n",
        "What the time of our stages is made of (torch's profiler, share of the operations' own time):\n",
    ]
    lines += [
        f"- {stage}: " + ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in shares.items())
        for stage, shares in record["profiles"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    result = measure()
    folder = ROOT / "benchmarks"
    write_json(folder / "results.json", result)
    readme = (folder / "README.md").read_text()
    head, _, _ = readme.partition("<!-- table -->")
    (folder / "README.md").write_text(f"{head}<!-- table -->\n\n{report(result)}")
    print(report(result))
