"""Every error that a user can cause or meet. The command line prints these in one line and ends with status 2."""

from __future__ import annotations

import difflib
from typing import Iterable


class NLAError(Exception):
    """Something is wrong with what was given or found; the message names the value, the file and the remedy."""


class ConfigError(NLAError, ValueError):
    """A parameter of a run is unknown or out of range."""


class ArtefactError(NLAError):
    """An artefact is missing, truncated, of another run, or stale."""


class BackboneError(NLAError):
    """The model cannot be used as a backbone, or gave activations that are not finite."""


class CollapsedTargetsError(NLAError):
    """The targets do not differ from each other (on Qwen: EOS found at the prompt position)."""


class SourceError(NLAError):
    """Weights could not be fetched, or are not the ones that were asked for."""


class NotebookError(NLAError):
    """A notebook raised; the message names the cell's error and the notebook as far as it ran."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggest the closest known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(repr(c) for c in close)}?"
    return f"known: {', '.join(known)}"
