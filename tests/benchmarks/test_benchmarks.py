"""The benchmark command runs end to end on the CPU, and its numbers mean what they say."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparse_fmha

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.cases import skipping  # noqa: E402
from benchmarks.cases.case import Case  # noqa: E402
from benchmarks.cases.catalogue import CASES, select  # noqa: E402
from benchmarks.harness import report  # noqa: E402
from benchmarks.harness.timing import measure, spread  # noqa: E402
from benchmarks.peers import registry as peers  # noqa: E402
from benchmarks.run import kernel_of, run_case, tensors  # noqa: E402
from benchmarks.tables import readme  # noqa: E402

README = f"# title\n\n{readme.BEGIN}\nold\n{readme.END}\n\ntail\n"


def python(*arguments):
    paths = [p for p in (os.environ.get("PYTHONPATH"), *sys.path) if p]
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def results_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "cpu.json"
    done = python(
        *("benchmarks", "--device", "cpu", "--case", "cpu/d64/full/256", "--case", "cpu/na2d-w8/*"),
        *("--iterations", "3", "--warmup", "1", "--plot", "--out", str(path)),
    )
    assert done.returncode == 0, done.stderr
    assert "cpu/d64/full/256" in done.stdout
    return path


def test_cpu_run_end_to_end(results_file):
    results = report.load(results_file)
    assert results_file.with_suffix(".png").stat().st_size > 10_000
    assert results["device"]["type"] == "cpu"
    assert results["device"]["name"]
    assert results["versions"]["torch"] == torch.__version__
    assert [c["name"] for c in results["cases"]] == ["cpu/d64/full/256", "cpu/na2d-w8/full/64x64"]
    for case in results["cases"]:
        assert case["skipped"] == {}
        runs = [(r["op"], r["l2"]) for r in case["runs"]]
        ops = ("matmul", "sparse_fmha", "torch")
        assert sorted(runs) == sorted((op, l2) for op in ops for l2 in ("cold", "warm"))
        for run in case["runs"]:
            ms = run["ms"]
            assert 0 < ms["p10"] <= ms["median"] <= ms["p90"] < math.inf
            assert ms["samples"] == 3
            if run["op"] == "matmul":
                continue
            rate = case["useful_flops"] / (ms["median"] * 1e-3) * 1e-12
            assert run["useful_tflops"] == pytest.approx(rate)
            assert 0 < run["error"]["rel_rms"] < 1e-5  # fp32 against fp64
            assert 0 < run["error"]["max_abs"] < 1e-4


def test_error_of_a_wrong_result_is_large():
    from benchmarks.cases.errors import Oracle

    case = Case("x/y", "cpu", "float32", 2, 100, 4, 2, 16, causal=True)
    q, k, v = (torch.randn(2, 100, heads, 16) for heads in (4, 2, 2))
    oracle = Oracle(case, q, k, v)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    assert oracle.error(exact)["rel_rms"] < 1e-5
    swapped = exact.clone()
    swapped[-1, :, 3] = exact[-1, :, 0]  # one of the heads that are looked at
    assert oracle.error(swapped)["rel_rms"] > 0.1
    late = exact.clone()
    late[-1, -1] += 1  # the last row
    assert oracle.error(late)["max_abs"] > 0.9


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 64, 300, 500])
def test_pairs_and_tiles_count_what_a_mask_shows(causal, length):
    case = Case("x/y", "cuda", "bfloat16", 1, length, 1, 1, 64, causal=causal)
    mask = torch.ones(length, length, dtype=torch.bool)
    if causal:
        mask.tril_()
    assert case.visible_pairs == mask.sum()
    kernel = {"tile_q": 192, "tile_k": 80, "head_dim": 128, "value_dim": 128}
    tiles = sum(  # rows beyond the end do what the last one does
        bool(mask[min(i, length - 1) : i + 64, j : j + 80].any())
        for i in range(0, (length + 191) // 192 * 192, 64)
        for j in range(0, length, 80)
    )
    assert case.executed_flops(kernel) == 4 * 128 * tiles * 64 * 80


def test_a_peer_that_cannot_run_is_named_and_ours_must_run():
    def unable(case, q, k, v):
        raise peers.UnavailableError("not for this case")

    case = Case("x/y", "cpu", "float32", 1, 16, 2, 2, 16)
    options = {"l2": ["warm"], "iterations": 1, "warmup": 0, "seed": 0}
    builders = peers.choose("cpu", "none")
    record = run_case(case, builders | {"torch": unable}, [], **options)
    assert record["skipped"] == {"torch": "not for this case"}
    assert [r["op"] for r in record["runs"]] == ["matmul", "sparse_fmha"]
    with pytest.raises(peers.UnavailableError):
        run_case(case, {peers.OURS: unable}, [], **options)


def test_names_are_unique_and_select_by_glob():
    names = [c.name for c in CASES]
    assert len(set(names)) == len(names)
    chosen = select("cuda", ["fmha/d128/*"], quick=False)
    assert sorted(c.length for c in chosen) == [2048, *sorted(2 * [4096, 8192, 16384, 32768])]
    assert {c.batch * c.length for c in chosen} == {32768}
    with pytest.raises(ValueError, match="nothing-like-it"):
        select("cpu", ["nothing-like-it"], quick=False)


def test_measure_calls_all_and_orders_times():
    calls = {"slow": 0, "fast": 0}

    def op(name, n):
        a = torch.randn(n, n)

        def run():
            calls[name] += 1
            return a @ a

        return run

    times = measure(
        {"slow": op("slow", 512), "fast": op("fast", 2)},
        device="cpu", l2="warm", iterations=4, warmup=1,
    )  # fmt: skip
    assert calls == {"slow": 10, "fast": 10}  # each timed call has an untimed one before it
    assert times["slow"].samples == 4


def test_spread():
    s = spread([float(x) for x in range(1, 102)])
    assert (s.median, s.p10, s.p90, s.samples) == (51, 11, 91, 101)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "no/such"], "no cpu case has such a name"),
        (["--peers", "fa9"], "allowed on cpu are torch"),
        (["--iterations", "0"], "--iterations: must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    done = python("benchmarks", "--device", "cpu", *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def fixture_results(folder, stamp, ms, name="fmha/d128/causal"):
    """Two GPU cases: ours takes `ms`, the peers 2 ms and 4 ms."""

    def run(op, t):
        return {"op": op, "l2": "cold", "ms": {"median": t}, "useful_tflops": 1000 / t}

    def case(size, length):
        return {
            "name": f"{name}/{size}",
            "shape": {"length": length, "heads_q": 32, "heads_kv": 8, "head_dim": 128,
                      "causal": True, "window": [], "dtype": "bfloat16"},
            "runs": [run("matmul", 1.25), run("sparse_fmha", ms), run("fa3", 2), run("cudnn", 4)],
        }  # fmt: skip

    results = {
        "schema": report.SCHEMA,
        "timestamp": stamp,
        "commit": "0123456789abcdef",
        "dirty": False,
        "device": {"type": "cuda", "name": "GPU"},
        "versions": {"torch": "2.11"},
        "settings": {"l2": ["cold"], "iterations": 20},
        "cases": [case("16k", 16384), case("8k", 8192)],
        "failed": {},
    }
    report.save(results, folder / f"{stamp[:10]}.json")


def test_tables_of_pages(tmp_path):
    short, full, choosing = (tmp_path / name for name in ("README", "benchmarks", "choosing"))
    for page in (short, full, choosing):
        page.write_text(README)
    arguments = ["--readme", str(short), "--tables", str(full), "--choosing", str(choosing)]
    arguments += ["--results", str(tmp_path)]

    assert readme.main(arguments) == 0
    for page in (short, full, choosing):
        assert page.read_text() == README.replace("old", readme.NONE_YET)

    fixture_results(tmp_path, "2026-01-02T00:00:00+00:00", ms=1.6)
    fixture_results(tmp_path, "2026-01-01T00:00:00+00:00", ms=8.0)  # older: not shown
    assert readme.main([*arguments, "--check"]) == 1
    assert full.read_text() == README.replace("old", readme.NONE_YET)  # --check changes nothing
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    new = full.read_text()
    assert new.startswith("# title\n")
    assert new.endswith("\ntail\n")
    assert "| length | 8k | 16k |" in new
    cell = "625, 1.25x FlashAttention-3"
    assert f"| D=128, 32/8 heads, causal, bfloat16 | {cell} | {cell} |" in new
    assert "2026-01-02, commit 0123456789" in new
    assert "800 TFLOP/s" in new

    short.write_text(short.read_text() + "more\n")  # of one's own
    assert readme.main([*arguments, "--check"]) == 0
    fixture_results(tmp_path, "2026-01-03T00:00:00+00:00", ms=3.2)
    assert readme.main([*arguments, "--check"]) == 1

    full.write_text("no markers")
    with pytest.raises(ValueError, match="benchmarks has no line"):
        readme.main(arguments)


def test_headline_shows_what_is_lost(tmp_path):
    fixture_results(tmp_path, "2026-01-02T00:00:00+00:00", ms=2.5, name="fmha/d256/causal")
    assert readme.headlines(tmp_path).splitlines()[2:] == [
        "| case | ms | fastest other | speed relative to it |",
        "| --- | --- | --- | --- |",
        "| causal attention, 16k tokens, head dim 256 | 2.5 | FlashAttention-3 | **0.80x** |",
    ]
    fixture_results(tmp_path, "2026-01-03T00:00:00+00:00", ms=1.6, name="fmha/d256/causal")
    assert readme.headlines(tmp_path).endswith("| FlashAttention-3 | 1.25x |")


def test_results_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match="schema 99"):
        report.load(path)


def test_pages_of_the_repository_are_current():
    results = ["git", "ls-files", "--others", "benchmarks/results"]
    if subprocess.run(results, cwd=ROOT, capture_output=True, check=False).stdout:
        pytest.skip("benchmarks/results has files that git does not track: a run of one's own")
    done = python("benchmarks.tables.readme", "--check")
    assert done.returncode == 0, done.stderr


def test_plain_table_without_rich():
    table = report.plain_table(["a", "long"], [["1234", "5"]])
    assert table.splitlines() == ["a     long", "1234  5"]


@pytest.mark.parametrize(
    ("percent", "causal"), [(10, False), (50, False), (90, False), (10, True), (50, True)]
)
def test_the_share_of_tiles_that_inputs_let_skip(causal, percent):
    case = Case(
        "skip/x/1", "cpu", "bfloat16", 1, 4096, 2, 1, 128, causal=causal, skip=percent,
        dense_iterations=1,
    )  # fmt: skip
    q, k, v = tensors(case, 0)
    skipping.shape_scores(q, k, percent, 0)
    assert skipping.share(case, q, k, v) == pytest.approx(percent / 100, abs=0.15)
    assert case.dense == replace(case, skip=0, dense_iterations=0)


def test_a_case_that_skips_is_compared_with_dense_attention():
    case = Case(
        "skip/full/50", "cpu", "float32", 1, 512, 2, 1, 128, skip=50, dense_iterations=1
    )  # fmt: skip
    record = run_case(
        case, {"sparse_fmha": peers.sparse_fmha}, sparse_fmha.kernels(),
        l2=["warm"], iterations=1, warmup=0, seed=0,
    )  # fmt: skip
    ours, dense = (
        next(r for r in record["runs"] if r["op"] == op)
        for op in ("sparse_fmha", "sparse_fmha dense")
    )
    assert ours["kernel"] == "cpu_dense_float32_skip"
    assert dense["kernel"] == "cpu_dense_float32"
    assert 0 < ours["skipped_tiles"] < 1
    assert ours["error"]["rel_rms"] < 1e-3  # what is skipped weighs little
    assert "skipped_tiles" not in dense


@pytest.mark.parametrize(
    ("skip", "name"), [(0, "sm90_dense_bfloat16_d128"), (0.5, "sm90_dense_bfloat16_d128_skip")]
)
def test_kernel_of_a_gpu_case(monkeypatch, skip, name):
    """A GPU row is found by capability; rows with a bias serve no case."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    case = replace(select("cuda", ["fmha/d96/full/4k"], False)[0], skip=skip)
    row = {"arch": "sm90", "pass": "forward", "dtype": "bfloat16", "mechanism": "dense"}
    rows = [
        {**row, "name": f"sm90_dense_bfloat16_d{dim}{end}", "head_dim": dim, "value_dim": dim,
         "skips": end == "_skip", "key_bias": end == "_bias"}
        for dim in (256, 128, 64) for end in ("_bias", "_skip", "")
    ]  # fmt: skip
    assert kernel_of(case, rows)["name"] == name
