"""The study of kernels for other GPUs at its tiny size."""

import json
import math

import pytest
import torch

import kernel_list
from benchmarks.cases.gradients import attention_of, problem
from benchmarks.peers.gradients import flex_op
from benchmarks.studies import other_gpus
from benchmarks.tables import other_gpus as figures


def test_tiny(tmp_path):
    out = tmp_path / "other_gpus.json"
    assert other_gpus.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    cases = {direction: set() for direction in other_gpus.PASSES}
    for row in rows:
        cases[row["pass"]].add(row["case"])
    assert cases["forward"] == {case.name for case in other_gpus.CASES}
    assert cases["backward"] == {c.name for c in other_gpus.CASES if other_gpus.has_backward(c)}
    assert figures.OWN_DENSE["backward"] in cases["backward"]
    assert {row["op"] for row in rows} == {"cpu"}
    for row in rows:
        assert row["ms"]["median"] > 0
        assert row["executed_flops"] == row["useful_flops"] > 0
        assert row["error"] < 1e-5


def rows_of_lists():
    return [
        {
            "arch": row.arch.name,
            "pass": row.direction,
            "mechanism": row.mechanism_name,
            "skips": row.skips,
            "head_dim": row.head_dim,
            "value_dim": row.value_dim,
            "tile_q": row.tile_q,
            "tile_k": row.tile_k,
        }
        for row in kernel_list.read_all()
    ]


@pytest.mark.parametrize("arch", other_gpus.ARCHS)
@pytest.mark.parametrize("case", [c for c in other_gpus.CASES if c.window], ids=lambda c: c.name)
def test_executed_pairs(monkeypatch, case, arch):
    """Whole tiles, no fewer pairs than are visible, and not many more where windows are aligned."""
    monkeypatch.setattr(other_gpus.sparse_fmha, "kernels", rows_of_lists)
    tile_q, tile_k = other_gpus.tiles_of(case, arch)
    executed = other_gpus.executed_pairs(case, arch)
    assert executed % (tile_q * tile_k) == 0
    assert case.pairs() <= executed <= 3 * case.pairs()
    assert executed <= 1.2 * math.prod(case.grid) ** 2


def row(case, op, ms, flops, executed=None, direction="forward"):
    spread = {"median": ms, "p10": ms, "p90": ms}
    return {"pass": direction, "case": case, "op": op, "ms": spread, "useful_flops": flops,
            "executed_flops": executed or flops, "error": None}  # fmt: skip


def test_shares():
    """Dense attention is compared with FlashAttention-2, windows with FlexAttention and dense."""
    rows = [
        row(figures.OWN_DENSE["forward"], "sm80", 2.0, 8e9),
        row(figures.OWN_DENSE["forward"], figures.FLASH, 3.0, 8e9),
        row("FLUX", "sm80", 1.0, 1e9, 3e9),
        row("FLUX", figures.FLEX, 1.7, 1e9),
        row(figures.OWN_DENSE["backward"], "sm80", 4.0, 8e9, direction="backward"),
        row("FLUX", "sm80", 1.0, 1e9, direction="backward"),
    ]
    dense, flash, grid, flex, _, backward_grid = other_gpus.table(rows).splitlines()[-6:]
    assert "50%" in backward_grid
    assert "1.50" in dense
    assert "1.00" in flash
    assert "75%" in grid
    assert "1.70" in grid
    assert "1.00" in flex
    assert "%" not in dense


def test_generated_table():
    rows = [
        row("D64 full 2k", "sm80", 2.0, 8e9),
        row("D64 full 2k", "sm86", 4.0, 8e9),
        row("D64 full 2k", figures.FLASH, 3.0, 8e9),
        row(figures.OWN_DENSE["forward"], "sm80", 2.0, 8e9),
        row("FLUX", "sm80", 1.0, 1e9, 3e9),
        row("FLUX", figures.FLEX, 1.7, 1e9),
    ]
    rows[0]["error"], rows[1]["error"] = 1e-3, 2e-3
    del rows[0]["pass"]  # the first results had one pass
    line, _, grid = figures.rows({"rows": rows})
    assert line == {
        "pass": "forward", "case": "D64 full 2k", "error": "2.0e-03",
        "sm80, TFLOP/s": "4", "sm80 over FlashAttention-2": "1.50x",
        "sm86, TFLOP/s": "2", "sm86 over FlashAttention-2": "0.75x",
    }  # fmt: skip
    assert grid == {
        "pass": "forward", "case": "FLUX", "sm80, TFLOP/s": "1",
        "sm80 over FlexAttention": "1.70x", "sm80, of its dense rate": "75%",
    }  # fmt: skip
    assert set(line) | set(grid) <= set(figures.COLUMNS)


def test_flex_is_beside_windows_unless_left_out():
    parser = other_gpus.parser()
    for arguments, expected in (([], {True, False}), (["--no-flex"], {False})):
        args = parser.parse_args(arguments)
        measured = {c.name: other_gpus.measures_flex(c, args, "cuda") for c in other_gpus.CASES}
        assert set(measured.values()) == expected
        assert measured["FLUX"] == measured["HunyuanVideo"] == (arguments == [])
        assert not measured["lists 64x64"]
        assert not other_gpus.measures_flex(other_gpus.CASES[-4], args, "cpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("name", ["FLUX", "HunyuanVideo, stride 16x8x8", "1-D, stride 256"])
def test_flex_computes_the_same(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    (case,) = (c.tiny() for c in other_gpus.CASES if c.name == name)
    attend, _ = attention_of(case, "cpu", seed=0)
    q, k, v, _ = (x.detach() for x in problem(case, "cpu", torch.float32, seed=0))
    found = flex_op(case, (q, k, v), torch.float32)()
    torch.testing.assert_close(found, attend(q, k, v).reshape(found.shape))
