"""``python -m nla_utils``: the ``nla`` command."""

from nla_utils.cli import app

app()
