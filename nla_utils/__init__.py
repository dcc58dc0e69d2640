"""Natural-language activation verbalization, §11, reproduced and audited.

Importing the package loads neither torch nor a model: tables, figures and the paper section are
made from JSON alone.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nla-utils")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
