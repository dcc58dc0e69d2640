"""Vectors and texts that a user may bring to be read."""

import json
import resource
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nla_extensions.release.api import NLA
from nla_extensions.scoring.files import read_vector
from nla_utils.errors import ConfigError


@pytest.mark.parametrize("shape", [(32,), (1, 32), (1, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("end", ["safetensors", "pt", "npy"])
def test_a_users_own_hidden_state_is_read(tmp_path, shape, dtype, end):
    v, path = torch.randn(shape).to(dtype), tmp_path / f"v.{end}"
    if end == "npy":
        if dtype == torch.bfloat16:
            pytest.skip("numpy has no such type")
        np.save(path, v.numpy())
    else:
        save_file({"v": v}, path) if end == "safetensors" else torch.save(v, path)
    nla = object.__new__(NLA)
    nla.backbone = type("b", (), {"d": 32, "name": "b"})
    np.testing.assert_array_equal(nla._checked(read_vector(path)), v.float().numpy().reshape(-1))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("v.npy", b"", "was not read"),
        ("v.safetensors", b"", "was not read"),
        ("v.pt", b"", "was not read"),
        ("v.npy", b"\x93NUMPY\x01\x00", "was not read"),
        ("v.txt", b"1 2 3", "are read from"),
        ("v.safetensors", (10**12).to_bytes(8, "little") + b"{}", "was not read"),
    ],
)
def test_what_is_no_vector_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_vector(tmp_path / name)
    assert name in str(refused.value)


@pytest.mark.parametrize("name", ["v.safetensors", "v.npy"])
def test_a_header_that_claims_a_trillion_rows_costs_no_memory(tmp_path, name):
    rows = 10**12
    header = json.dumps({"v": {"dtype": "F32", "shape": [rows, 32], "data_offsets": [0, 128 * rows]}}).encode()
    if name == "v.npy":
        with open(tmp_path / name, "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<f4", "fortran_order": False, "shape": (rows, 32)})
            f.write(bytes(128))
    else:
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + bytes(128))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=f"{name} was not read"):
        read_vector(tmp_path / name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert peak * (1 if sys.platform == "darwin" else 1024) < 50_000_000


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a": torch.zeros(3), "b": torch.zeros(3)}, r"holds \['a', 'b'\]"),
        ({"a": torch.zeros(3, dtype=torch.int64)}, "floats"),
    ],
)
def test_files_of_other_tensors_are_named(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match=message):
        read_vector(tmp_path / "v.safetensors")


def test_a_literal_start_token_in_a_text_is_refused(gemma_run):
    nla = NLA(gemma_run[0].backbone, None)
    for call in (nla.activation, nla.trace):
        with pytest.raises(ConfigError, match="spells the special token '<bos>'"):
            call("<bos>a text")
    nla.activation("a text")
