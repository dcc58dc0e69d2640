"""Imports go one way, and the core needs nothing of what stands beside it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from nla_utils.config import ROOT

PACKAGE = ROOT / "nla_utils"
# Each part imports parts of a lower number, and itself.
LEVEL = {
    "__init__": -1, "errors": 0, "metrics": 0, "progress": 0, "workers": 0, "protocol": 1, "config": 1, "locks": 1,
    "artefacts": 2, "chunks": 3, "lm": 4, "run": 5, "stages": 6, "scores": 7, "paper": 8, "extensions": 9, "runner": 10,
    "__main__": 11,
}  # fmt: skip
# Arrays in, numbers out: types aside, neither scores nor pages know the model.
WITHOUT_THE_MODEL = {"scores": {"lm", "run", "stages"}, "paper": {"lm", "run", "stages"}}
# Data about backbones, read without torch: pages name a backbone's weights from there.
DATA_ALONE = "nla_utils.lm.registry"


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(p): p for p in PACKAGE.rglob("*.py")}


def imported(path, with_types):
    """Modules of the package that a file imports, anywhere in it; those for types alone if asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test)
                 for n in ast.walk(i)}  # fmt: skip
    for node in ast.walk(tree):
        if node in for_types and not with_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nla_utils"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("nla_utils"))


def part(name):
    return name.split(".")[1] if "." in name else "__init__"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_one_way(name):
    own = part(name)
    for other in imported(MODULES[name], with_types=True):
        if own == "__init__":
            assert part(other) == "extensions", "the package itself loads NLA alone, and lazily"
        else:
            assert part(other) == own or LEVEL[part(other)] < LEVEL[own], f"{name} imports {other}"
    for other in imported(MODULES[name], with_types=False):
        assert other == DATA_ALONE or part(other) not in WITHOUT_THE_MODEL.get(own, ()), f"{name} imports {other}"


def test_there_is_no_cycle():
    graph = {name: {m for m in imported(path, with_types=True) if m != name} for name, path in MODULES.items()}
    graph.pop("nla_utils")
    list(TopologicalSorter(graph).static_order())


def test_section_11_is_scored_without_any_extension():
    program = "import sys, nla_utils.scores.rollouts, nla_utils.stages.rollouts, nla_utils.stages.ablation; " \
              "assert not [m for m in sys.modules if m.startswith('nla_utils.extensions')]"  # fmt: skip
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_nla_is_one_import():
    program = "import sys; from nla_utils import __version__; assert 'torch' not in sys.modules; from nla_utils import NLA"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
