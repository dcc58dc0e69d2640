"""Fetch a backbone and write the size of its weights in bytes to a file: fetch_weights.py BACKBONE FILE."""

import sys
from pathlib import Path

from nla_utils.lm.weights import fetch, resolve
from nla_utils.store import atomic_write

backbone, file = sys.argv[1:]
size = sum(path.stat().st_size for path in fetch(resolve(backbone)).glob("*.safetensors"))
atomic_write(Path(file), str(size).encode())
