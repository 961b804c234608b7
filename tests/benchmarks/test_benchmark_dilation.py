"""The study of large dilations: its problems, and its table."""

import pytest
import torch

from benchmarks.harness import report
from benchmarks.studies import dilation as study
from benchmarks.tables import dilation as page
from sparse_fmha import neighborhood_attention, simulate


@pytest.mark.parametrize("size", study.SIZES)
def test_dilated_and_undilated_see_as_many_pairs(size):
    """And the former's dilation is one that takes several launches by element strides."""
    from sparse_fmha import _C

    for grid, window, dilation, heads in study.SIZES[size]["problems"].values():
        ones = (1,) * (3 - len(grid))
        assert _C.tiles.launches(ones + grid, ones + dilation) > 1
        pairs = torch.Size(grid).numel() * torch.Size(window).numel()
        for step in (1, dilation):
            simulation = simulate(grid, window, dilation=step, heads=heads)
            assert simulation.useful_flops == 4 * heads * 128 * pairs


def test_run_and_table(tmp_path, capsys):
    out = tmp_path / "results.json"
    assert study.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = report.load(out)["rows"]
    assert [(row["case"], row["op"]) for row in rows] == [
        ("d64/2-D", "undilated"), ("d64/2-D", "dilated")
    ]  # fmt: skip
    undilated, dilated = (row["ms"]["median"] for row in rows)
    assert rows[1]["rate"] == pytest.approx(undilated / dilated)
    assert rows[0]["tflops"] == pytest.approx(4 * 2 * 64 * 44**2 * 4 / undilated / 1e9)
    assert f"{rows[1]['rate']:.1%}" in capsys.readouterr().out
    assert study.neighborhood_attention is neighborhood_attention
    (row,) = page.rows(report.load(out))
    assert (row["grid, heads"], row["window"], row["dilation"]) == ("44x44, 2", "2x2", "11x11")
    assert (row["D"], row["of the undilated rate"]) == ("64", f"{rows[1]['rate']:.0%}")
