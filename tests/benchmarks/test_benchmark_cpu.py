"""The study of the CPU: what it runs, and what its figures are of."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.studies import cpu  # noqa: E402
from sparse_fmha import _C  # noqa: E402


def test_names_are_unique():
    names = [case.name for case in cpu.CASES]
    assert len(set(names)) == len(names) > 1


def test_tiny_run(tmp_path):
    out = tmp_path / "out.json"
    before = _C.set_cpu_isa("baseline")
    try:
        assert cpu.main(["--tiny", "--iterations", "1", "--sets", "--out", str(out)]) == 0
        assert _C.set_cpu_isa("baseline") == "baseline"
    finally:
        _C.set_cpu_isa(before)
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"] for row in rows} == {case.name for case in cpu.CASES}
    ops = {"sparse_fmha", "torch", *_C.cpu_isas()}
    per_case = len(cpu.DTYPES) * 2 * len(ops)
    assert len(rows) == len(cpu.CASES) * per_case
    for first in range(0, len(rows), len(ops)):
        group = rows[first : first + len(ops)]
        assert {row["op"] for row in group} == ops
        (torchs,) = (row["ms"] for row in group if row["op"] == "torch")
        assert all(row["of_torch"] == torchs / row["ms"] for row in group)


def test_rates_are_of_visible_pairs(tmp_path):
    out = tmp_path / "out.json"
    arguments = ["--tiny", "--iterations", "1", "--only", "1-D*", "--out", str(out)]
    assert cpu.main(arguments) == 0
    rows = json.loads(out.read_text())["rows"]
    (case,) = (case.tiny() for case in cpu.CASES if case.name.startswith("1-D"))
    flops = 4 * case.heads * case.head_dim * case.grid[0] * case.window[0]
    for row in rows:
        work = flops * (2.5 if row["pass"] == "backward" else 1)
        if row["op"] == "torch":
            assert row["gflops"] is None
        else:
            assert abs(row["gflops"] * row["ms"] * 1e6 / work - 1) < 1e-6
