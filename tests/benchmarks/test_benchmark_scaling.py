"""The benchmark of several ranks: small, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("torch has no gloo", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import report  # noqa: E402
from benchmarks.studies import scaling, scaling_ways  # noqa: E402
from benchmarks.tables import readme  # noqa: E402


def run(*command, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *command]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def test_help():
    shown = run("benchmarks.studies.scaling", "--help", check=True).stdout
    assert "torchrun --nproc-per-node" in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_refuses_without_cuda():
    done = run("benchmarks.studies.scaling")
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr


def test_refuses_without_torchrun():
    done = run("benchmarks.studies.scaling", "--tiny")
    assert done.returncode == 1
    assert "start it with torchrun" in done.stderr


@pytest.mark.parametrize(("world", "expected"), [(2, [2]), (3, [2, 3]), (8, [2, 4, 8])])
def test_sizes(world, expected):
    assert scaling.sizes(world) == expected


def test_tiny(tmp_path):
    arguments = ["--tiny", "--iterations", "1", "--warmup", "0", "--out", tmp_path / "out.json"]
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = run(*command, "benchmarks.studies.scaling", "--backward", *arguments, check=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    expected = [
        (op + end, way)
        for op, one in scaling.OPS.items()
        for way in ("one rank", *(way for way in one.ways if way != scaling.SDPA))
        for end in ("", *([] if one.chooses or way == scaling.FLEX else [scaling.WITH_BACKWARD]))
    ]
    assert [(row["op"], row["way"]) for row in rows] == expected
    shown = done.stdout.splitlines()[-len(rows) - 2 :]  # gloo may have said something before
    assert shown[0].split()[0] == "op"
    assert shown[-1] == f"results: {tmp_path / 'out.json'}"
    for row in rows:
        assert row["difference"] < 1e-6
        assert row["ms"]["median"] > 0
        if row["ranks"] == 2:
            ulysses = row["way"].startswith("ulysses")
            assert row["sent_bytes"] == 512 * 16 * 4 * ((2 * 8 + 2 * 4) / 2 if ulysses else 8)
            both = row["op"].endswith(scaling.WITH_BACKWARD)
            alone = row["way"] in ("pass_kv", scaling.FLEX)
            assert (row["communication_ms"] is None) == (both or alone)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_slices_that_the_heads_allow(ranks):
    from sparse_fmha.distributed._slices import key_slices

    for heads, heads_kv, most in ((32, 8, 4), (24, 24, 4), (8, 1, 3), (16, 16, 5)):
        args = SimpleNamespace(heads=heads, heads_kv=heads_kv, slices=most)
        found = scaling_ways.slices("ulysses in slices", ranks, args)
        assert 1 <= found <= most
        key_slices(heads // ranks, max(heads_kv // ranks, 1), found)
        assert heads_kv % scaling_ways.slices("zigzag in slices", ranks, args) == 0
        assert scaling_ways.slices("ulysses", ranks, args) == 1


def test_readme_table(tmp_path):
    def row(way, ranks, ms, communication=None):
        moved = communication and {"median": communication}
        return {"op": "full", "way": way, "ranks": ranks, "ms": {"median": ms},
                "communication_ms": moved}  # fmt: skip

    results = {
        "schema": report.SCHEMA, "timestamp": "2026-01-02T00:00:00+00:00", "commit": "0123456789ab",
        "dirty": False,
        "device": {"type": "cuda", "name": "NVIDIA H100"}, "versions": {"torch": "2.11.0"},
        "settings": {"length": 131072, "heads": 32, "heads_kv": 8, "head_dim": 128,
                     "dtype": "bfloat16", "density": 0.1, "iterations": 20},
        "rows": [row("one rank", 1, 100.0), row("ulysses", 2, 80.0, 8.0)],
    }  # fmt: skip
    report.save(results, tmp_path / "scaling" / "x.json")
    text = readme.section(tmp_path)
    assert "128k tokens, 32/8 heads" in text
    assert "commit 0123456789" in text
    assert text.splitlines()[-2:] == [
        "| full | one rank | 1 | 100 | 1.00x | 100% |  |",
        "| full | ulysses | 2 | 80 | 1.25x | 62% | 10% |",
    ]
