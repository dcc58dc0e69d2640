"""``python -m nla_utils``: the ``nla`` command."""

from nla_utils.runner.cli import app

app()
