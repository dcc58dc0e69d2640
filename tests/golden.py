"""The golden record: what smoke runs of the four tiny backbones leave, as hashes of arrays and as numbers.

``python tests/golden.py FOLDER`` writes ``tests/golden.json`` anew; ``test_golden.py`` compares with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_name("golden.json")
PROVENANCE = {"identity", "device", "made_from", "code", "libraries", "hardware", "record_sha256"}
OPTIONS = ["--profile", "smoke", "--dtype", "float32", "--device", "cpu"]
# The backbone whose tail reader is also taken apart and repeated.
TAKEN_APART = "tiny-gemma2"
# Those whose notebooks are run as a user runs them, through papermill; the others' cells are run in one process, which saves
# starting eight kernels.
IN_KERNELS = ("tiny-gemma2", "tiny-qwen2")
# One thread, and numpy's products by the kernels that every x86 with AVX2 has: sums are then made in one order.
ENVIRONMENT = {
    "MPLBACKEND": "agg",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Haswell",
}


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


def command(*words: str, program: tuple[str, ...] = ("-m", "nla_extensions.cli")) -> str:
    done = subprocess.run(
        [sys.executable, *program, *words],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def reproduce_command(backbone: Path, out: Path) -> list[str]:
    return ["reproduce", "--backbone", str(backbone), "--out", str(out), *OPTIONS, "--with", "tail-reader,depth"]


def leave(backbone: Path, out: Path) -> tuple[Path, str]:
    """Everything that a run of a backbone can leave, §11 and what stands beside it; its folder, and what was said."""
    if backbone.name in IN_KERNELS:
        said = command(*reproduce_command(backbone, out))
    else:
        said = command(str(backbone), str(out), program=(__file__, "cells"))
    if backbone.name == TAKEN_APART:
        for name in ("ablate", "replicate"):
            command(name, "--backbone", str(backbone), "--out", str(out), *OPTIONS, "--seeds", "1,2")
    return out / backbone.name / "smoke", said


def run_cells(backbone: str, out: str) -> None:
    """Run the notebooks' cells in this process."""
    values = {"backbone": backbone, "out": out, "profile": "smoke", "dtype": "float32", "device": "cpu"}
    notebooks = ROOT / "notebooks"
    for path in [*sorted(notebooks.glob("0[1-6]*.ipynb")), *sorted(notebooks.glob("extensions/0[78]*.ipynb"))]:
        namespace = {"__name__": "__main__", "display": lambda *_: None}
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                source = "".join(line for line in cell["source"] if not line.startswith("%"))
                exec(compile(source, path.name, "exec"), namespace)
                if "parameters" in cell["metadata"].get("tags", []):
                    namespace |= values


def record_of(folder: Path) -> dict:
    return {"arrays": arrays_of(folder), "results": results_of(folder)}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    if sys.argv[1] == "cells":
        run_cells(*sys.argv[2:])
        sys.exit()
    from conftest import TINY, build_backbone

    root, backbones = Path(sys.argv[1]), {}
    for name, how in TINY.items():
        folder, _ = leave(build_backbone(root / "backbones" / name, *how), root / "out")
        backbones[name] = record_of(folder)
        print(name, "done", flush=True)
    record = {"kind_of_machine": kind_of_machine(), "backbones": backbones}
    RECORD.write_text(json.dumps(record, sort_keys=True, separators=(",", ":")), encoding="utf-8")
