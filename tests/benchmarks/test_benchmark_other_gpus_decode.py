"""The study of decode on the kernels for other GPUs at its tiny size, and its table."""

import json

import pytest

from benchmarks.studies import other_gpus_decode
from benchmarks.tables import other_gpus_decode as figures


def test_tiny(tmp_path):
    out = tmp_path / "decode.json"
    assert other_gpus_decode.main(["--tiny", "--iterations", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == [case.name for case in other_gpus_decode.CASES]
    for row in rows:
        assert row["op"] == "cpu"
        assert row["ms"]["median"] > 0
        skips = "skipped" in row["case"]
        assert row["error"] is None if skips else row["error"] < 1e-5


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bytes_follow_the_head_dim(dim):
    """Keys and values of 16 x 32k tokens and 8 heads, and q and out of 32."""
    (case,) = (
        each
        for each in other_gpus_decode.CASES
        if each.head_dim == dim and each.name.startswith("16x32k") and each.group == "dense"
    )
    cache = 2 * 16 * 32768 * 8 * dim * 2
    assert case.cache_bytes(2) == cache
    assert case.read_bytes(2) == cache + 2 * 16 * 32 * dim * 2


def row(op, ms, error):
    return {"case": "1x1k", "op": op, "ms": {"median": ms, "p10": ms, "p90": ms},
            "bytes": 2_000_000, "error": error}  # fmt: skip


def test_generated_table():
    rows = [row("sm90", 0.001, 1e-3), row("sm80", 0.002, 2e-3)]
    (line,) = figures.rows({"rows": rows})
    assert line == {
        "case": "1x1k", "MB": "2", "error": "2.0e-03", "sm80 over sm90": "0.50x",
        "sm90, us": "1", "sm90, GB/s": "2000", "sm80, us": "2", "sm80, GB/s": "1000",
    }  # fmt: skip
    assert set(line) == set(figures.COLUMNS)
    (line,) = figures.rows({"rows": rows[1:]})
    assert "sm80 over sm90" not in line, "there is nothing to compare with"
    head, text = figures.summary({"rows": rows}).splitlines()
    assert head.split()[-4:] == ["sm80", "over", "sm90", "error"]
    assert text.split()[-2:] == ["0.50x", "2.0e-03"]
