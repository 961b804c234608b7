"""The study of kernels for other GPUs at its tiny size."""

import json
import math

import pytest

import kernel_list
from benchmarks.studies import other_gpus


def test_tiny(tmp_path):
    out = tmp_path / "other_gpus.json"
    assert other_gpus.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    cases = {direction: set() for direction in other_gpus.PASSES}
    for row in rows:
        cases[row["pass"]].add(row["case"])
    assert cases["forward"] == {case.name for case in other_gpus.CASES}
    assert cases["backward"] == {c.name for c in other_gpus.CASES if other_gpus.has_backward(c)}
    assert other_gpus.OWN_DENSE["backward"] in cases["backward"]
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
    """Dense attention is compared with FlashAttention-2, the others with dense."""
    rows = [
        row(other_gpus.OWN_DENSE["forward"], "sm80", 2.0, 8e9),
        row(other_gpus.OWN_DENSE["forward"], other_gpus.FLASH, 3.0, 8e9),
        row("FLUX", "sm80", 1.0, 1e9, 3e9),
        row(other_gpus.OWN_DENSE["backward"], "sm80", 4.0, 8e9, direction="backward"),
        row("FLUX", "sm80", 1.0, 1e9, direction="backward"),
    ]
    dense, flash, grid, _, backward_grid = other_gpus.table(rows).splitlines()[-5:]
    assert "50%" in backward_grid
    assert "1.50" in dense
    assert "1.00" in flash
    assert "75%" in grid
    assert "%" not in dense
