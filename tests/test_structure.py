"""Imports go one way, and the core needs nothing of what stands beside it."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from nla_utils.config import ROOT

# Each imports those in lines above it, and its own room.
ORDER = """
errors metrics
config protocol
store
lm
run
encoding
targets
verbalizer
training
baselines
evidence rows
scores
report
notebooks
cli
""".strip().splitlines()
LEVEL = {name: i for i, line in enumerate(ORDER) for name in line.split()}
# Arrays in, numbers out: types aside, neither scores nor pages know the model.
WITHOUT_THE_MODEL = {"evidence", "rows", "scores", "report"}
THE_MODEL = {"lm", "run", "encoding", "targets", "verbalizer", "training", "baselines"}
# Data about backbones, read without torch: pages name a backbone's weights from there.
DATA_ALONE = "nla_utils.lm.weights"


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(p): p for package in ("nla_utils", "nla_extensions") for p in (ROOT / package).rglob("*.py")}
CORE = sorted(name for name in MODULES if name.startswith("nla_utils."))


def imported(path, with_types):
    """Modules of the two packages that a file imports, anywhere in it; those for types alone if asked."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.dump(i.test) for n in ast.walk(i)
    }
    for node in ast.walk(tree):
        if node in for_types and not with_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nla_"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("nla_"))


@pytest.mark.parametrize("name", CORE)
def test_imports_go_one_way(name):
    room = name.split(".")[1]
    for other in imported(MODULES[name], with_types=True):
        assert other.startswith("nla_utils"), f"{name} imports {other}"
        their = other.split(".")[1] if "." in other else None
        assert their in (None, room) or LEVEL[their] < LEVEL[room], f"{name} imports {other}"
    for other in imported(MODULES[name], with_types=False):
        known = room in WITHOUT_THE_MODEL and other != DATA_ALONE and other.split(".")[1:2] in ([m] for m in THE_MODEL)
        assert not known, f"{name} imports {other}"


def test_the_package_itself_loads_two_names_lazily():
    assert set(imported(MODULES["nla_utils"], with_types=True)) == {
        "nla_extensions.release.api",
        "nla_extensions.scoring.scores",
    }
    program = (
        "import sys; from nla_utils import __version__; assert 'torch' not in sys.modules; from nla_utils import NLA"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_there_is_no_cycle():
    graph = {name: {m for m in imported(path, with_types=True) if m != name} for name, path in MODULES.items()}
    graph.pop("nla_utils")
    list(TopologicalSorter(graph).static_order())


def test_pages_are_made_without_torch():
    program = "import sys, nla_utils.report.pages, nla_utils.scores; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
