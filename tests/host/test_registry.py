"""The table of compiled kernels and the choice of a row."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import sparse_fmha
from sparse_fmha import _C
from sparse_fmha._ops import errors

COLUMNS = ("name", "arch", "pass", "mechanism", "dtype", "head_dim", "value_dim")
COLUMNS += ("tile_q", "tile_k", "stages", "skips", "key_bias", "dilated")


def test_gpu_rows_are_those_of_the_lists(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "tools")
    kernel_list = importlib.import_module("kernel_list")
    built = sparse_fmha.build_info()["archs"]
    listed = kernel_list.read_all()
    assert listed
    wanted = [
        (
            *(row.name, row.arch.name, row.direction, row.mechanism_name, row.dtype),
            *(row.head_dim, row.value_dim, row.tile_q, row.tile_k, row.stages),
            *(row.skips, row.key_bias, row.dilated),
        )
        for row in listed
        if row.arch.nvcc in built
    ]
    rows = [
        tuple(row[of] for of in COLUMNS) for row in sparse_fmha.kernels() if row["arch"] != "cpu"
    ]
    assert rows == wanted


def test_names_are_unique_and_the_table_prints_them():
    table = sparse_fmha.kernels()
    names = [row["name"] for row in table]
    assert len(set(names)) == len(names) > 0
    lines = repr(table).splitlines()
    assert [line.split()[0] for line in lines[1:]] == names


@pytest.mark.parametrize("row", sparse_fmha.kernels(), ids=lambda row: row["name"])
def test_a_request_takes_the_smallest_head_dim_that_fits(row):
    names = ("arch", "pass", "mechanism", "dtype", "skips", "key_bias", "dilated")
    key = {name: row[name] for name in names}
    fitting = {}
    for r in sparse_fmha.kernels():
        if all(r[name] == key[name] for name in key):
            # The first, where query tiles differ.
            fitting.setdefault((r["head_dim"], r["value_dim"]), r["name"])
    one_width = row["arch"] not in ("cpu", "sm90")
    widest = max(d[1] for d in fitting)
    for head_dim in range(8, max(fitting)[0] + 1, 8):
        for value_dim in {head_dim} if one_width else {head_dim, 8, 64, min(136, widest), widest}:
            chosen = _C.find_kernel(**key, head_dim=head_dim, value_dim=value_dim)
            large = [d for d in fitting if d[0] >= head_dim and d[1] >= value_dim]
            assert chosen["name"] == fitting[min(large)]
    if one_width:
        with pytest.raises(RuntimeError, match="head_dim=64, value_dim=8"):
            _C.find_kernel(**key, head_dim=64, value_dim=8)


def test_a_miss_names_the_request_and_every_row():
    with pytest.raises(RuntimeError) as error:
        _C.find_kernel(arch="sm90", mechanism="dense", dtype="float64", head_dim=64)
    message = str(error.value)
    request = "arch=sm90, pass=forward, mechanism=dense, dtype=float64, head_dim=64"
    assert f"no kernel for {request}, which runs on the CPU only; " in message
    for row in sparse_fmha.kernels():
        own = row["value_dim"] != row["head_dim"] and row["arch"] != "cpu"
        values = f", value_dim <= {row['value_dim']}" if own else ""
        assert f"{row['name']} (head_dim <= {row['head_dim']}{values})" in message


def test_a_miss_is_told_from_an_impossible_request():
    """By the type that Python makes of it."""
    missing = [("sm90", "float64", NotImplementedError), ("cpu", "float64", RuntimeError)]
    for arch, dtype, kind in missing:
        name = {"arch": arch, "mechanism": "dense", "dtype": dtype}
        with pytest.raises(RuntimeError) as raised:
            _C.find_kernel(**name, head_dim=264 if arch == "cpu" else 64)
        error = errors.typed(raised.value)
        assert type(error) is kind
        assert str(error).startswith("sparse_fmha: no kernel for arch=")


def test_a_row_serves_its_own_pass():
    key = {"arch": "cpu", "mechanism": "dense", "dtype": "float32", "head_dim": 64}
    assert _C.find_kernel(**key, **{"pass": "forward"}) == _C.find_kernel(**key)
    for name in ("forward", "backward_dq", "backward_dkv", "decode"):
        assert _C.find_kernel(**key, **{"pass": name})["pass"] == name
    with pytest.raises(RuntimeError, match="no kernel for arch=cpu, pass=decode, mech"):
        _C.find_kernel(**{**key, "mechanism": "stripe", "pass": "decode"})


@pytest.mark.parametrize("name", ["backward_dq", "backward_dkv"])
def test_the_backward_pass_leaves_tiles_out_on_the_cpu(name):
    key = {"mechanism": "dense", "dtype": "bfloat16", "head_dim": 64, "skips": True, "pass": name}
    assert _C.find_kernel(arch="cpu", **key)["name"] == f"cpu_{name}_dense_bfloat16_skip"
    with pytest.raises(RuntimeError, match=f"pass={name}, .*, with skipping, which runs on"):
        _C.find_kernel(arch="sm90", **key)


def test_an_unknown_dtype_names_the_allowed_ones():
    with pytest.raises(
        ValueError, match="dtype must be one of float16, bfloat16, float32, float64, got int8"
    ):
        _C.find_kernel(arch="cpu", mechanism="dense", dtype="int8", head_dim=64)
