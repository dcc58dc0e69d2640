"""One place for pins: the lock file. environment.yml and pyproject.toml must agree with it."""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata

import pytest
from packaging.specifiers import SpecifierSet

from nla_utils.config import ROOT
from nla_utils.errors import BackboneError
from nla_utils.lm.checks import check_library


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonical(n): v for n, v in pins}


def test_environment_yml_has_the_lock_files_pins():
    text = (ROOT / "environment.yml").read_text()
    pins = dict(re.findall(r"^ {6}- ([\w.-]+)==(\S+)$", text, re.M))
    assert {canonical(n): v for n, v in pins.items()} == locked()


def test_every_dependency_is_locked_within_its_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    pins = locked()
    for requirement in wanted:
        name, floor = requirement.split(">=")
        have = pins[canonical(name)]
        assert [int(x) for x in re.findall(r"\d+", have)[:2]] >= [int(x) for x in floor.split(".")[:2]], requirement


def test_every_pin_installs_on_the_oldest_python():
    floor = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    for name in locked():
        try:
            needs = metadata(name)["Requires-Python"]
        except PackageNotFoundError:
            # What the oldest Python needs beside its standard library, a newer one may not.
            assert sys.version_info[:2] > tuple(map(int, floor.split("."))), f"{name} is pinned and not installed"
            continue
        assert needs is None or f"{floor}.0" in SpecifierSet(needs), f"{name} needs Python {needs}"


def test_transformers_floor_is_where_gemma_embeddings_scale_themselves():
    from importlib.metadata import version

    assert tuple(int(x) for x in version("transformers").split(".")[:2]) >= (5, 5)
    check_library("5.5.0")
    check_library("6.0.1")
    with pytest.raises(BackboneError, match="5.5 or newer"):
        check_library("5.4.9")


def test_nothing_unpickles():
    for path in (ROOT / "nla_utils").rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace("allow_pickle=False", "")
        assert "pickle" not in text and "weights_only=False" not in text
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, f"{path.name}: {call}"
