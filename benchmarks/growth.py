"""What a whole run costs as N, K, M, d, L and the vocabulary grow: time, memory and disk, on random backbones.

Run with ``make growth``. Each point is every stage of a run in a fresh process; exponents are fitted to the larger half
of each curve, where fixed costs matter least, and set beside what the work itself asks for. Writes ``growth.json``,
``growth.png`` and the table in README.md. No claim about activations is made here.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import LogLocator, NullFormatter

from nla_utils.config import ROOT, RunConfig
from nla_utils.report.figures import style
from nla_utils.report.tables import markdown
from nla_utils.store import Progress, code_version, library_versions, read_json, write_json

BASE = {"N": 512, "K": 8, "M": 16, "d": 128, "L": 4, "V": 4096}
GROWN = {
    "N": (512, 1024, 2048, 4096),
    "K": (8, 16, 32, 64),
    "M": (16, 32, 64, 128),
    "d": (128, 256, 512, 1024),
    "L": (4, 8, 16, 32),
    "V": (4096, 8192, 16384, 32768),
}
POOL = 256
# What the work asks for once the term that grows fastest in it outweighs all others.
EXPECTED = {
    "seconds": {"N": 1, "K": 1, "M": 1, "d": 3, "L": 1, "V": 1},
    "peak_bytes": {"N": 1, "K": 1, "M": 1, "d": 2, "L": 1, "V": 1},
    "disk_bytes": {"N": 1, "K": 1, "M": 1, "d": 2, "L": 0, "V": 1},
}
WHY = {
    "N": "sequences are drawn, stored and trained on one by one",
    "K": "rollouts",
    "M": "targets; the shuffled control compares all pairs, M², but by products of matrices alone",
    "d": "products are d²; the reader solves for 8 d unknowns, d³",
    "L": "blocks; only the last position is stored",
    "V": "the head, and the reader's table of norms",
}


def one_run(sizes: dict[str, int]) -> dict[str, float]:
    """Seconds, peak memory above the loaded backbone, and bytes on disk of all stages of one run."""
    from stages import SPECIAL_IDS, random_backbone, run_stages
    from transformers import LlamaConfig

    from nla_utils.run import open_run

    with tempfile.TemporaryDirectory() as tmp:
        shape = LlamaConfig(
            hidden_size=sizes["d"],
            intermediate_size=3 * sizes["d"],
            num_hidden_layers=sizes["L"],
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=sizes["V"],
            initializer_range=0.1,
            **SPECIAL_IDS,
        )
        random_backbone(Path(tmp) / "backbone", shape)
        config = RunConfig(
            backbone=f"{tmp}/backbone",
            profile="quick",
            out=f"{tmp}/runs",
            device="cpu",
            n_targets=sizes["N"],
            n_eval=sizes["M"],
            n_rollouts=sizes["K"],
            pool_size=POOL,
        )
        run = open_run(config)
        before = _peak()
        seconds = sum(run_stages(run).values())
        disk = sum(p.stat().st_size for p in run.folder.path.rglob("*") if p.is_file())
        return {"seconds": seconds, "peak_bytes": _peak() - before, "disk_bytes": disk}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure() -> dict[str, list[dict]]:
    """Each size grown alone from the base; what an earlier start of the same code has measured is taken."""
    curves: dict[str, list[dict]] = {}
    kept = ROOT / "runs" / "growth" / str(code_version()["git_commit"])
    points = [(name, value) for name, values in GROWN.items() for value in values]
    for name, value in Progress(points, desc="growth", unit="run"):
        path = kept / f"{name}-{value}.json"
        if not path.exists():
            write_json(path, _in_own_process(BASE | {name: value}))
        curves.setdefault(name, []).append({"size": value, **read_json(path)})
    return curves


def _in_own_process(sizes: dict[str, int]) -> dict[str, float]:
    command = [sys.executable, __file__, json.dumps(sizes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def exponent(points: list[dict], quantity: str) -> float:
    """Slope of the larger half of a curve on log-log axes."""
    half = points[len(points) // 2 - 1 :]
    x, y = np.log([p["size"] for p in half]), np.log([p[quantity] for p in half])
    return float(np.polyfit(x, y, 1)[0])


def table(curves: dict[str, list[dict]]) -> pd.DataFrame:
    rows = []
    for name, points in curves.items():
        row = {"grows": name, "from": points[0]["size"], "to": points[-1]["size"]}
        for quantity, label in (("seconds", "time"), ("peak_bytes", "memory"), ("disk_bytes", "disk")):
            row[f"{label}, expected · fitted"] = f"{EXPECTED[quantity][name]} · {exponent(points, quantity):.2f}"
        rows.append(row | {"because": WHY[name]})
    return pd.DataFrame(rows).set_index("grows")


def draw(curves: dict[str, list[dict]], path: Path) -> None:
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    shown = (("seconds", "seconds", 1), ("peak_bytes", "peak memory (MB)", 1e6), ("disk_bytes", "disk (MB)", 1e6))
    for ax, (quantity, label, unit) in zip(axes, shown):
        for name, points in curves.items():
            x = [p["size"] / points[0]["size"] for p in points]
            fitted, expected = exponent(points, quantity), EXPECTED[quantity][name]
            ax.plot(x, [p[quantity] / unit for p in points], "o-", label=f"{name}: {fitted:.2f} (at most {expected})")
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend(frameon=False, fontsize=7)
        style(ax, "times the base size", label)
    fig.savefig(path, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one_run(json.loads(sys.argv[1]))))
        sys.exit()
    found = measure()
    folder = ROOT / "benchmarks"
    write_json(
        folder / "growth.json",
        {"base": BASE | {"pool": POOL}, "curves": found, "code": code_version(), "libraries": library_versions()},
    )
    draw(found, folder / "growth.png")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    head, _, rest = readme.partition("<!-- growth -->\n")
    _, _, tail = rest.partition("<!-- end of growth -->\n")
    shown = markdown(table(found))
    (folder / "README.md").write_text(
        f"{head}<!-- growth -->\n\n{shown}\n<!-- end of growth -->\n{tail}", encoding="utf-8"
    )
    print(shown)
