"""What the README tells a reader to type is a command, with options that it has."""

import re
import shlex

import pytest
import typer

from nla_utils.config import ROOT
from nla_utils.runner.cli import app

FENCED = (ROOT / "README.md").read_text(encoding="utf-8").split("```")[1::2]
LINES = [line.split(" #")[0].strip() for block in FENCED if block[0] == "\n" for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("nla ")]
TARGETS = [line for line in LINES if line.startswith("make ")]
# For who starts several processes by hand, who has something to release, and who maintains the committed results.
ELSEWHERE = {"distribute", "bundle", "publish", "spread"}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_has_the_options_that_it_is_given(line):
    _, name, *options = shlex.split(line)
    assert typer.main.get_command(app).commands[name].make_context(name, options).info_name == name


@pytest.mark.parametrize("line", TARGETS)
def test_a_target_of_the_readme_is_in_the_makefile(line):
    assert re.search(rf"^{shlex.split(line)[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)


def test_the_readme_shows_every_command():
    assert {shlex.split(line)[1] for line in COMMANDS} | ELSEWHERE == set(typer.main.get_command(app).commands)
