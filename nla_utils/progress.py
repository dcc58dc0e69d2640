"""Progress of long stages: a bar with rate and end time, mirrored to whoever started the notebook."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tqdm import tqdm

MIRROR_VARIABLE = "NLA_PROGRESS_FILE"


class Progress(tqdm):
    """A tqdm bar that also leaves its line in the file named by ``$NLA_PROGRESS_FILE``.

    A notebook's output is not on the terminal of ``nla reproduce``; that command reads the file and shows the line.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, mininterval=1.0, dynamic_ncols=False, ncols=90, **kwargs)

    def display(self, msg=None, pos=None):
        mirror = os.environ.get(MIRROR_VARIABLE)
        if mirror:
            # A bar that cannot be shown is no reason to stop.
            with contextlib.suppress(OSError):
                Path(mirror).write_text(str(self), encoding="utf-8")
        return super().display(msg, pos)
