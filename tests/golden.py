"""The golden record: what smoke runs of the four tiny backbones leave, as hashes of arrays and as numbers.

``python tests/golden.py FOLDER`` writes ``tests/golden.json`` anew; ``test_golden.py`` compares with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import warm
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name("golden.json")
PROVENANCE = {"identity", "device", "made_from", "code", "libraries", "hardware", "record_sha256"}
OPTIONS = ["--profile", "smoke", "--dtype", "float32", "--device", "cpu"]
# The backbone whose tail reader is also taken apart and repeated.
TAKEN_APART = "tiny-gemma2"
# Those of which the pages are made too, by 06.
WITH_PAGES = ("tiny-gemma2", "tiny-qwen2")


def kind_of_machine() -> str:
    """Machines of one kind take sums in the same order, so their arrays are the same to the last bit.

    The maker counts: the library behind torch's products takes other kernels on AMD's processors than on Intel's.
    """
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    maker = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "unknown maker")
    return f"{maker} {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split('+')[0]}"


def arrays_of(folder: Path) -> dict[str, str]:
    """``{"artefact.array": sha256}`` of a run's artefacts."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, array in load_file(path).items():
            digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode() + array.tobytes()).hexdigest()
            found[f"{path.stem}.{name}"] = digest[:16]
    return found


def results_of(folder: Path) -> dict[str, dict]:
    """Results by file name, without what says where they come from."""
    found = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("results/*.json"))}
    return {name: {k: v for k, v in r.items() if k not in PROVENANCE} for name, r in found.items()}


def command(*words: str) -> str:
    environment = {**os.environ, **warm.ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = warm.run([sys.executable, "-m", "nla_extensions.cli", *words], env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def reproduce_command(backbone: Path, out: Path) -> list[str]:
    until = [] if backbone.name in WITH_PAGES else ["--until", "5"]
    where = ["--backbone", str(backbone), "--out", str(out)]
    return ["reproduce", *where, *OPTIONS, *until, "--with", "tail-reader,depth"]


def leave(backbone: Path, out: Path) -> tuple[Path, str]:
    """Everything that a run of a backbone can leave, §11 and what stands beside it; its folder, and what was said."""
    said = command(*reproduce_command(backbone, out))
    if backbone.name == TAKEN_APART:
        for name in ("ablate", "replicate"):
            command(name, "--backbone", str(backbone), "--out", str(out), *OPTIONS, "--seeds", "1,2")
    return out / backbone.name / "smoke", said


def record_of(folder: Path) -> dict:
    return {"arrays": arrays_of(folder), "results": results_of(folder)}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import TINY, build_backbone

    root, backbones = Path(sys.argv[1]), {}
    for name, how in TINY.items():
        folder, _ = leave(build_backbone(root / "backbones" / name, *how), root / "out")
        backbones[name] = record_of(folder)
        print(name, "done", flush=True)
    record = {"kind_of_machine": kind_of_machine(), "backbones": backbones}
    RECORD.write_text(json.dumps(record, sort_keys=True, separators=(",", ":")), encoding="utf-8")
