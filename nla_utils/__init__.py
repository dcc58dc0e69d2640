"""Natural-language activation verbalization, §11, reproduced and audited.

Importing the package loads neither torch nor a model: tables, figures and the paper section are made from JSON alone.
``from nla_utils import NLA, score`` loads what reading an activation, and scoring anyone's texts, needs.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nla-utils")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str):
    if name == "NLA":
        from nla_extensions.release.api import NLA

        return NLA
    if name == "score":
        from nla_extensions.scoring.scores import score

        return score
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
