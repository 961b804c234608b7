"""The counts of selections: what is counted, and that all cases run without values."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.harness import counted  # noqa: E402
from benchmarks.studies import selections as study  # noqa: E402
from sparse_fmha import patterns  # noqa: E402


def test_kernels_bytes_products_and_memory():
    def call(x, y):
        first = x + 1  # 1 kernel, reads and writes 4000 bytes
        second = first.expand(3, -1, -1) * y  # reads first once, and y; writes 12000
        del first
        return second.view(3, 1000)

    found = counted.count(call, (10, 100), (3, 10, 100), dtype=torch.float32)
    assert (found.kernels, found.bytes) == (2, 4000 + 4000 + 4000 + 12000 + 12000)
    assert found.peak == 4000 + 12000
    assert found.flops == 0
    product = counted.count(torch.bmm, (2, 3, 5), (2, 5, 7), dtype=torch.bfloat16)
    assert product.flops == 2 * 2 * 3 * 5 * 7
    assert product.seconds > counted.LAUNCH


def test_memory_that_is_given_back_does_not_count_twice():
    def call(x):
        for _ in range(5):
            x = x + 1
        return x

    assert counted.count(call, (1000,), dtype=torch.float32).peak == 8000


def test_a_scan_of_an_outer_dimension_is_serial():
    outer = counted.count(lambda x: x.cumsum(0), (10000, 4), dtype=torch.float32)
    inner = counted.count(lambda x: x.cumsum(1), (4, 10000), dtype=torch.float32)
    assert outer.seconds >= 10000 * counted.SCAN > 100 * inner.seconds


@pytest.mark.parametrize("name", study.CASES)
def test_cases(name):
    case = study.CASES[name]._replace(length=4096)
    row = study.row(name, case)
    assert len(row) == len(study.HEADER)
    assert int(row[2]) > 0


def test_selections_take_memory_that_grows_with_tokens():
    """Not with their square, of those that have no table of blocks by blocks."""
    for name in ("hip", "token_sparse"):
        case = study.CASES[name]._replace(heads=4, heads_kv=2)
        of = [
            counted.count(case.choose, *[(1, n, h, 128) for h in (4, 2)], dtype=torch.bfloat16).peak
            for n in (16384, 65536)
        ]
        assert of[1] < 6 * of[0], name


@pytest.mark.parametrize(
    ("name", "kernels", "gigabytes", "ms"),
    [("dhsa", 120, 1, 0.6), ("psa", 300, 10, 4), ("dma_mask", 105, 1.2, 0.6)],
)
def test_what_was_slow_stays_cheap_by_count(name, kernels, gigabytes, ms):
    """At their sizes in the study: DHSA and PSA took 14 ms each, and 1700 kernels, before they were
    rewritten, DMA 0.68 ms and a sort of 128 biases for each query."""
    case = study.CASES[name]
    shapes = [(1, case.length, heads, case.dim) for heads in (case.heads, case.heads_kv)]
    found = counted.count(case.choose, *shapes, dtype=torch.bfloat16)
    assert found.kernels < kernels
    assert found.bytes < gigabytes * 1e9
    assert found.seconds < ms * 1e-3


@pytest.mark.parametrize(("number", "side", "heads"), [(2, 28, 4), (3, 14, 8)])
def test_packed_regions_stay_cheap_by_count(number, side, heads):
    """64 images of BiFormer's later stages at 224 pixels: 91 to 93 kernels and up to 0.96 GB before
    lists came from small products."""
    layout = patterns.BiFormerPacking(patterns.image_regions(side, side, 7), device="meta")
    found = counted.count(
        lambda q, k: patterns.biformer_packed(q, k, layout, top_k=4 ** (number - 1)),
        *[(64, side * side, heads, 32)] * 2, dtype=torch.bfloat16,
    )  # fmt: skip
    assert found.kernels <= 40
    assert found.bytes < 0.08e9


def test_a_table(capsys):
    assert study.main(["--case", "dhsa", "--length", "8192"]) == 0
    assert "dhsa" in capsys.readouterr().out
