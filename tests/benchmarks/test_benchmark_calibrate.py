"""The benchmark of calibrated thresholds and of the order of key tiles, on the CPU."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.studies import calibrate  # noqa: E402
from sparse_fmha.calibration import tile_sparsity  # noqa: E402

SIZE = dict(heads=4, heads_kv=2, dim=64, lengths=(700,), ordered=640)


def drawn(length=640):
    return calibrate.decaying(SIZE, length, "cpu", torch.float64, 3)


def test_scores_fall_with_the_distance():
    q, k = drawn()
    k = k.repeat_interleave(2, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k)[0] * SIZE["dim"] ** -0.5
    at = [scores.diagonal(-d, 1, 2)[:, calibrate.SINKS :].mean(-1) for d in (0, 8, 64, 512)]
    for head, near in enumerate((10, 10, 20, 20)):
        means = [x[head].item() for x in at]
        assert means[0] == pytest.approx(near, abs=1)
        assert means == sorted(means, reverse=True)
    sinks = scores[:, 200:, : calibrate.SINKS].mean((1, 2))
    assert (sinks > scores[:, 200:, 20:100].mean((1, 2)) + 5).all()


def test_the_built_order_is_the_library_s(monkeypatch):
    """All groups sampled: last to first skips what the calibration counts."""
    monkeypatch.setattr(calibrate, "SAMPLED", 10)
    thresholds = [1e-4, 1e-2, 0.3]
    rows = calibrate.by_order(SIZE, "cpu", torch.float32, 2, thresholds)
    q, k = (x.float() for x in drawn())
    skipped, visited = tile_sparsity(q, k, thresholds, causal=True)
    shares = (skipped.sum((0, 1)) / visited.sum()).tolist()
    built = [row for row in rows if row["order"] == "last to first"]
    assert [row["skipped"] for row in built] == pytest.approx(shares)
    assert 0.05 < shares[0] < shares[2] < 1
    assert all(0 <= row["lost"] < row["threshold"] * 700 for row in rows)


def test_orders_by_hand():
    """One row of four tiles, in each order."""
    tops = torch.tensor([5.0, 1.0, 4.0, 3.0])
    for order, expected in (
        ([3, 2, 1, 0], [math.inf, 1, -3, 1]),
        ([0, 1, 2, 3], [math.inf, -4, -1, -2]),
        ([0, 3, 2, 1], [math.inf, -2, -1, -4]),
    ):
        margin, seen = calibrate.margins(tops[order].view(1, 1, 4))
        assert margin.flatten().tolist() == expected
        assert seen.all()
    assert [x.tolist() for x in calibrate.orders(4, "cpu").values()] == [
        [3, 2, 1, 0], [0, 1, 2, 3], [0, 3, 2, 1],
    ]  # fmt: skip
    margin, seen = calibrate.margins(torch.tensor([-math.inf, 2.0]).view(1, 1, 2))
    assert seen.tolist() == [[False, True]]
    assert margin.tolist() == [[-math.inf, math.inf]]


def test_a_run(tmp_path, capsys):
    assert calibrate.main(["--tiny", "--out", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert [row["length"] for row in results["reached"]] == [1024] * 3 + [2048] * 3
    assert len(results["orders"]) == 9
    assert all(abs(r["gamma 1"]["skipped"] - r["wanted"]) < 0.15 for r in results["reached"])
    shown = capsys.readouterr().out
    assert "first to last" in shown
    assert f"{results['reached'][0]['gamma 1']['skipped']:.1%}" in shown


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--tiny"):
        calibrate.main([])
