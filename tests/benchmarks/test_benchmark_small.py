"""The study of small problems: what it runs, and that the worst case comes first."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.studies import small  # noqa: E402
from benchmarks.tables import small as generated  # noqa: E402


def test_names_are_unique():
    for tiny in (True, False):
        names = [case.name for case in small.cases(tiny)]
        assert len(set(names)) == len(names) > 1


def test_tiny_run(tmp_path):
    out = tmp_path / "out.json"
    assert small.main(["--tiny", "--iterations", "1", "--rows", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert {row["case"] for row in rows} == {case.name for case in small.cases(True)}
    for row in rows:
        median = {name: ms["median"] for name, ms in row["ms"].items()}
        assert row["of_best_peer"] == median["torch"] / median["sparse_fmha"]
        assert {"q64", "q128", "q192"} < set(median)


def test_the_worst_case_is_first():
    def row(name, ratio):
        spread = {"median": 1.0}
        return {"case": name, "of_best_peer": ratio, "tile_q": 64, "ms": {"sparse_fmha": spread}}

    lines = small.table([row("a", 1.2), row("b", 0.9), row("c", 1.0)]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["b", "c", "a"]


def test_generated_table():
    def row(case, **us):
        ms = {name: {"median": 1e-3 * x} for name, x in us.items()}
        best = min(us["cudnn"], us["fa3"])
        return {"case": case, "tile_q": 64, "ms": ms, "of_best_peer": best / us["sparse_fmha"]}

    rows = [
        row("small/d64/dense/1x128", sparse_fmha=4.0, cudnn=7.0, fa3=6.0, q128=1.0),
        row("small/d128/causal/4x512", sparse_fmha=10.0, cudnn=9.0, fa3=12.0),
    ]
    lines = [tuple(line.values()) for line in generated.rows({"rows": rows})]
    assert lines == [
        ("D128 causal 4x512", "10.0", "64", "cudnn", "9.0", "**0.90x**"),
        ("D64 dense 1x128", "4.0", "64", "fa3", "6.0", "1.50x"),
    ]
