"""The benchmark of host time: what is called, the arithmetic of its table, a run of few calls."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import report, timing  # noqa: E402
from benchmarks.studies import host_time  # noqa: E402
from benchmarks.tables import host_time as page  # noqa: E402


def row(op, ms):
    return {"op": op, "ms": {"median": ms, "p10": ms / 2, "p90": 2 * ms}}


def test_table():
    rows = [row("torch sdpa", 0.026), row("fa3", 0.082), row("fmha_fwd", 0.028)]
    lines = host_time.table([*rows, row("attention", 0.042)]).splitlines()
    assert [line.split() for line in lines] == [
        ["op", "us", "p10", "p90", "over", "raw", "op", "over", "sdpa"],
        ["torch", "sdpa", "26.0", "13.0", "52.0"],
        ["fa3", "82.0", "41.0", "164.0", "3.15x"],
        ["fmha_fwd", "28.0", "14.0", "56.0", "1.08x"],
        ["attention", "42.0", "21.0", "84.0", "1.50x", "1.62x"],
    ]
    # Ratios stand under their own heads.
    assert [line.rindex("x") for line in lines[2:]] == [lines[0].index("over sdpa") + 4] * 3


def test_page_table():
    rows = [row("torch sdpa", 0.026), row("attention", 0.0312)]
    assert [tuple(line.values()) for line in page.rows({"rows": rows})] == [
        ("torch sdpa", "26.0", "13.0", "1.00x"),
        ("attention", "31.2", "15.6", "1.20x"),
    ]


def test_calls_of_a_batch(monkeypatch):
    """A clock that an op turns by itself: of a batch the time of one call, without the warm-up."""
    clock, turns, log = [0], {"a": 1000, "b": 3000}, []

    def op(name):
        def run():
            log.append(name)
            # The first batch is slow.
            clock[0] += turns[name] * (1000 if log.count(name) <= 4 else 1)

        return run

    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: clock[0])
    ops = {name: op(name) for name in turns}
    times = timing.measure_host(ops, device="cpu", calls=4, rounds=10, warmup=1)
    assert {n: (t.median, t.p90, t.samples) for n, t in times.items()} == {
        "a": (pytest.approx(0.001), pytest.approx(0.001), 10),
        "b": (pytest.approx(0.003), pytest.approx(0.003), 10),
    }
    batches = ["".join(log[i : i + 4]) for i in range(0, len(log), 4)]
    rounds = {"".join(batches[i : i + 2]) for i in range(0, len(batches), 2)}
    assert rounds == {"aaaabbbb", "bbbbaaaa"}  # shuffled


def test_public_functions_end_in_the_raw_ops():
    ops, skipped = host_time.calls("cpu", "float32", seed=0)
    assert list(skipped) == ["fa3"]
    assert set(ops) == {"torch sdpa", *host_time.RAW, *host_time.RAW.values()}
    for public, raw in host_time.RAW.items():
        assert ops[public]().equal(ops[raw]()[0]), public
    torch.testing.assert_close(ops["torch sdpa"]().transpose(1, 2), ops["attention"]())


def test_tiny(tmp_path, capsys):
    path = tmp_path / "made.json"
    assert host_time.main(["--tiny", "--device", "cpu", "--out", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2:] == ["not measured: fa3: runs on GPUs only", f"results: {path}"]
    results = report.load(path)
    assert {"commit", "device", "versions"} <= results.keys()
    assert results["settings"]["dtype"] == "float32"
    assert host_time.table(results["rows"]).splitlines() == shown[:-2]
    for each in results["rows"]:
        ms = each["ms"]
        assert ms["samples"] == 3
        assert 0 < ms["p10"] <= ms["median"] <= ms["p90"]
