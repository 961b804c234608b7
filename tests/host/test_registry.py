"""The table of compiled kernels and the choice of a row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sparse_fmha
from sparse_fmha import _C

KERNELS_DEF = Path(__file__).resolve().parents[2] / "csrc" / "kernels" / "sm90_forward.def"
COLUMNS = ("arch", "mechanism", "dtype", "head_dim", "tile_q", "tile_k", "stages", "skips")
DTYPES = {"half_t": "float16", "bfloat16_t": "bfloat16"}


def test_gpu_rows_are_those_of_kernels_def():
    wanted = re.findall(
        r"^SPARSE_FMHA_KERNEL\((\w+), *(\w+), *(\w+)"
        r", *(\d+), *(\d+), *(\d+), *(\d+), *\w+, *(\w+)\)$",
        KERNELS_DEF.read_text(),
        re.M,
    )
    assert wanted
    rows = {
        tuple(row[column] for column in COLUMNS)
        for row in sparse_fmha.kernels()
        if row["arch"] != "cpu"
    }
    if not sparse_fmha.build_info()["archs"]:
        assert rows == set()
        return
    assert rows == {
        (arch, snake_case(mechanism), DTYPES[element], *map(int, numbers), skips == "kByThreshold")
        for arch, mechanism, element, *numbers, skips in wanted
    }


def test_names_are_unique_and_the_table_prints_them():
    table = sparse_fmha.kernels()
    names = [row["name"] for row in table]
    assert len(set(names)) == len(names) > 0
    lines = repr(table).splitlines()
    assert [line.split()[0] for line in lines[1:]] == names


def snake_case(name):
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


@pytest.mark.parametrize("row", sparse_fmha.kernels(), ids=lambda row: row["name"])
def test_a_request_takes_the_smallest_head_dim_that_fits(row):
    key = {name: row[name] for name in ("arch", "mechanism", "dtype", "skips")}
    fitting = {
        r["head_dim"]: r["name"]
        for r in sparse_fmha.kernels()
        if all(r[name] == key[name] for name in key)
    }
    for head_dim in range(8, max(fitting) + 1, 8):
        chosen = _C.find_kernel(**key, head_dim=head_dim)
        assert chosen["name"] == fitting[min(d for d in fitting if d >= head_dim)]


def test_a_miss_names_the_request_and_every_row():
    with pytest.raises(RuntimeError) as error:
        _C.find_kernel(arch="sm90", mechanism="dense", dtype="float64", head_dim=64)
    message = str(error.value)
    assert "no kernel for arch=sm90, mechanism=dense, dtype=float64, head_dim=64" in message
    for row in sparse_fmha.kernels():
        assert f"{row['name']} (head_dim <= {row['head_dim']})" in message


def test_an_unknown_dtype_names_the_allowed_ones():
    with pytest.raises(ValueError, match="dtype is int8, allowed are: float16, bfloat16, float32"):
        _C.find_kernel(arch="cpu", mechanism="dense", dtype="int8", head_dim=64)
