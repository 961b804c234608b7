"""The benchmark cases on grids: what they count, what they are compared with, what is shown."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import sparse_fmha
from sparse_fmha import reference

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import run  # noqa: E402
from benchmarks.cases import grids  # noqa: E402
from benchmarks.cases.case import Case  # noqa: E402
from benchmarks.cases.catalogue import CASES  # noqa: E402
from benchmarks.harness import report  # noqa: E402
from benchmarks.harness.names import UnavailableError  # noqa: E402
from benchmarks.harness.timing import measure  # noqa: E402
from benchmarks.peers import flex, sta  # noqa: E402
from benchmarks.peers import registry as peers  # noqa: E402
from benchmarks.tables import rates, readme, terminal  # noqa: E402

# grid, window, stride, dilation, causal
PROBLEMS = [
    ((13,), (4,), (1,), (1,), (False,)),
    ((17,), (5,), (3,), (1,), (True,)),
    ((23,), (4,), (4,), (3,), (False,)),
    ((19,), (3,), (2,), (2,), (True,)),
    ((8, 12), (3, 4), (2, 4), (1, 1), (False, False)),
    ((11, 8), (2, 4), (1, 3), (4, 2), (False, True)),
    ((6, 4, 8), (3, 2, 4), (3, 1, 2), (1, 2, 1), (False, False, True)),
    ((40,), (16,), (8,), (1,), (False,)),  # has blocks of 8x8 pairs that are all visible
]


def small(problem, **changes):
    grid, window, stride, dilation, causal = problem
    fields = {"heads_q": 2, "heads_kv": 2, "head_dim": 16} | changes
    return Case(
        "na/small/s1", "cpu", "float32", 1, math.prod(grid), causal=causal, grid=grid,
        window=window, stride=stride, dilation=dilation, **fields,
    )  # fmt: skip


def tensors(case):
    generator = torch.Generator().manual_seed(0)
    shape = case.batch, case.length, case.heads_q, case.head_dim
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def exact(case, q, k, v):
    mask = reference.neighborhood_mask(case.grid, case.window, **case.options)
    return reference.attention(q, k, v, mask)[0].float()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_masks_and_counts_are_those_of_the_reference(problem):
    case, mask = small(problem), reference.neighborhood_mask(*problem)
    assert case.visible_pairs == mask.sum()
    rows = torch.tensor([0, case.length // 3, case.length - 1])
    assert torch.equal(grids.row_masks(case.axes, rows), mask[rows])


def test_gpu_cases_are_neighborhoods_that_exist():
    cases = [c for c in CASES if c.name.startswith("na/")]
    assert {len(c.grid) for c in cases} == {1, 2, 3}
    for case in cases:
        assert case.length == math.prod(case.grid)
        assert 3 <= case.dense_iterations <= 20 or case.name == "na/ltx-11x11x11/s1"
        assert case.dense.mechanism == "dense"
        assert case.dense.visible_pairs == case.length**2
        for length, window, stride, dilation, causal in case.axes:
            assert 1 <= stride <= window <= length // dilation
            assert isinstance(causal, bool)
    useful = {c.name: c.useful_flops for c in cases}
    assert useful["na/flux/s1"] == 4 * 24 * 128 * 256**2 * 80**2
    assert useful["na/hunyuan/s16x8x8"] == 4 * 24 * 128 * 115200 * 18 * 24 * 24


@pytest.mark.parametrize(
    ("grid", "box"), [((12,), (4,)), ((8, 12), (2, 4)), ((4, 6, 8), (2, 3, 4))]
)
def test_tiles_are_a_permutation_and_back(grid, box):
    tokens = math.prod(grid)
    order = grids.tile_order(grid, box)
    assert torch.equal(order.sort().values, torch.arange(tokens))
    x = torch.randn(2, *grid, 3, 5)
    tiles = grids.to_tiles(x, box)
    assert torch.equal(tiles, x.flatten(1, -3)[:, order].transpose(1, 2))
    assert torch.equal(grids.from_tiles(tiles, grid, box), x.flatten(1, -3))
    tile = torch.stack(torch.unravel_index(order, grid), 1)[: math.prod(box)]
    assert tile.amax(0).tolist() == [side - 1 for side in box]  # the first is a box at the origin


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("shuffled", [False, True])
def test_block_lists_and_mask_of_flex(problem, shuffled, monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 8)
    case, tokens = small(problem), math.prod(problem[0])
    order = torch.arange(tokens)
    if shuffled:
        order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    want = reference.neighborhood_mask(*problem)[order][:, order]
    mask = flex.block_mask(case, order)
    assert torch.equal(create_mask(mask.mask_mod, 1, 1, tokens, tokens, "cpu")[0, 0], want)

    behind = -tokens % 8
    blocks = torch.nn.functional.pad(want, (0, behind, 0, behind))
    blocks = blocks.unflatten(0, (-1, 8)).unflatten(2, (-1, 8))
    partly, fully = blocks.any(3).any(1), blocks.all(3).all(1)
    for lists, kind in (
        ((mask.kv_num_blocks, mask.kv_indices), partly & ~fully),
        ((mask.full_kv_num_blocks, mask.full_kv_indices), fully),
    ):
        counts, indices = (x[0, 0].tolist() for x in lists)
        for row, count, listed in zip(kind, counts, indices, strict=True):
            assert sorted(listed[:count]) == row.nonzero()[:, 0].tolist()


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("peer", [flex.flex, flex.flex_tiled])
def test_flex_computes_the_neighborhood(peer, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    case = small(((4, 16, 8), (3, 5, 4), (1, 2, 4), (1, 1, 1), (False, True, False)))
    q, k, v = tensors(case)
    torch.testing.assert_close(peer(case, q, k, v)(), exact(case, q, k, v))


def test_flex_tiles_where_a_tile_divides_the_grid():
    boxes = {c.name: flex.box_of(c) for c in CASES if c.grid in {(256, 256), (16, 44, 80)}}
    assert boxes["na/flux/s1"] == (16, 8)
    assert boxes["na/cosmos/s1"] == (4, 4, 8)
    for problem, reason in ((PROBLEMS[0], "a sequence"), (PROBLEMS[5], "dilated")):
        with pytest.raises(UnavailableError, match=reason):
            flex.box_of(small(problem))
    with pytest.raises(UnavailableError, match="no tile"):
        flex.box_of(small(PROBLEMS[4]))


@pytest.mark.parametrize("window", sorted(sta.WINDOWS))
def test_sliding_tiles_are_neighborhoods(window):
    """Along each axis, by the kernel's rule: the query's tile, moved off the border, is the centre
    of a window of whole tiles."""
    for length, side, tiles in zip(sta.GRID, sta.TILE, window, strict=True):
        seen = grids.windows((length, tiles * side, side, 1, False)).tolist()
        last = length // side - 1
        for i, interval in enumerate(seen):
            centre = min(max(i // side, tiles // 2), last - tiles // 2)
            begin, end = centre - tiles // 2, centre + tiles // 2 + 1
            assert interval == [begin * side, end * side]


def test_sliding_tile_peer_passes_tiles_and_puts_them_back(monkeypatch):
    (case,) = (c for c in CASES if c.name == "na/wan/s6x8x8")
    given = {}

    def forward(q, k, v, out, *rest):
        given.update(q=q, rest=rest)
        out.copy_(v)

    monkeypatch.setattr(sta, "load", lambda: forward)
    q, k, v = torch.randn(3, 1, case.length, 1, 128)
    assert torch.equal(sta.sta(case, q, k, v)(), v)
    assert given["rest"] == (3, 3, 3, 0, False, False, 3)
    assert given["q"].shape == (1, 1, case.length, 128)
    assert given["q"].is_contiguous()
    first = q.view(18, 48, 80, 128)[:6, :8, :8].flatten(0, 2)
    assert torch.equal(given["q"][0, 0, : 6 * 8 * 8], first)
    for change, reason in (
        ({"stride": (1, 1, 1)}, "stride of 6x8x8"),
        ({"window": (18, 24, 32)}, "no kernel for this window"),
        ({"window": (18, 24, 25)}, "no kernel for this window"),
        ({"dtype": "float16"}, "bfloat16"),
    ):
        with pytest.raises(UnavailableError, match=reason):
            sta.window_in_tiles(dataclasses.replace(case, **change))


def test_slow_ops_have_fewer_turns_evenly_spread():
    calls = []
    ops = {name: lambda name=name: calls.append(name) for name in ("first", "slow", "fast")}
    times = measure(
        ops, device="cpu", l2="cold", iterations=9, warmup=2, fewer={"slow": 3}
    )  # fmt: skip
    assert {name: s.samples for name, s in times.items()} == {"first": 9, "slow": 3, "fast": 9}
    rounds = [list(g) for new, g in itertools.groupby(calls, "first".__eq__) if not new]
    assert [i for i, ops in enumerate(rounds) if "slow" in ops] == [4, 7, 10]


@pytest.mark.parametrize("problem", PROBLEMS[1:])
def test_a_neighborhood_beside_dense_attention(problem, monkeypatch):
    case = small(problem, dense_iterations=2)
    options = {"l2": ["cold"], "iterations": 4, "warmup": 1, "seed": 0}
    record = run.run_case(case, peers.choose("cpu", "auto"), [], **options)
    runs = rates.by_op(record, "cold")
    assert sorted(runs) == ["sparse_fmha", "sparse_fmha dense", "torch", "torch dense"]
    assert record["shape"]["stride"] == problem[2]
    for op, one in runs.items():
        flops = case.useful_flops
        if op.endswith("dense"):
            flops = one["useful_flops"]
            assert flops == 4 * 2 * 16 * case.length**2
        assert one["useful_tflops"] == pytest.approx(flops / one["ms"]["median"] * 1e-9)
        assert one["ms"]["samples"] == (2 if op.endswith("dense") else 4)
        assert one["error"]["rel_rms"] < 1e-5  # each against what it computes


def test_simulated_tiles_are_recorded_where_there_is_a_simulator(monkeypatch):
    (case,) = (c for c in CASES if c.name == "na/hunyuan/s16x8x8")
    simulation = {"executed_flops": 2 * case.useful_flops, "useful_flops": case.useful_flops,
                  "predicted_ms": 20.0, "tile_q": (2, 8, 8), "tile_k": (2, 8, 8)}  # fmt: skip
    asked = {}

    def simulate(grid, window, **options):
        asked.update(grid=grid, window=window, **options)
        return type("Simulation", (), simulation)

    monkeypatch.setattr(sparse_fmha, "simulate", simulate, raising=False)
    assert run.simulated(case) == simulation
    assert asked == {
        "grid": (30, 48, 80), "window": (18, 24, 24), "stride": (16, 8, 8), "dilation": (1, 1, 1),
        "causal": (False,) * 3, "heads": 24, "batch": 1, "head_dim": 128,
    }  # fmt: skip
    one = run.run_of("sparse_fmha", case, case, [], simulation, ms=25.0)
    assert one["executed_tflops"] == pytest.approx(2 * one["useful_tflops"])
    assert (one["predicted_ms"], one["tile_q"]) == (20.0, (2, 8, 8))
    assert "executed_tflops" not in run.run_of(
        "sparse_fmha dense", case, case.dense, [], simulation, ms=25.0
    )
    monkeypatch.delattr(sparse_fmha, "simulate")
    with pytest.raises(UnavailableError, match="simulate"):
        run.simulated(case)
    assert run.simulated(small(PROBLEMS[0])) == {}


def results(stamp, cases):
    return {
        "schema": report.SCHEMA, "timestamp": stamp, "commit": "0123456789abcdef", "dirty": False,
        "device": {"type": "cuda", "name": "GPU"}, "versions": {"torch": "2.11"},
        "settings": {"l2": ["cold"], "iterations": 20}, "cases": cases, "failed": {},
    }  # fmt: skip


def record(name, **more):
    (case,) = (c for c in CASES if c.name == name)

    def one(op, ms, flops=case.useful_flops, **fields):
        rate = flops / ms * 1e-9
        spread = {"median": ms, "p10": ms, "p90": ms}
        error = {"rel_rms": 1e-3, "max_abs": 1e-3}
        return {"op": op, "l2": "cold", "ms": spread, "useful_tflops": rate, "gbps": 1.0,
                "percent_of_matmul": 1.0, "error": error} | fields  # fmt: skip

    dense = case.dense.useful_flops
    shape = {k: list(v) if isinstance(v, tuple) else v for k, v in case.shape().items()}
    return {
        "name": name, "shape": shape, "skipped": {},
        "runs": [one("matmul", 1.5), one("sparse_fmha", 10.0, **more), one("fa3 dense", 80, dense),
                 one("sparse_fmha dense", 70.0, dense)],
    }  # fmt: skip


def test_readme_tables_are_from_the_newest_file_with_such_cases(tmp_path):
    sequence = record("na/flux/s1")
    sequence["name"] = "fmha/d128/full/64k"
    sequence["shape"] |= {"window": [], "grid": [], "causal": False}
    sequence["runs"] = [r for r in sequence["runs"] if not r["op"].endswith("dense")]
    flux = record("na/flux/s1", executed_tflops=600.0, predicted_ms=9.0)
    report.save(results("2026-01-01T00:00:00+00:00", [sequence, flux]), tmp_path / "b.json")
    text = readme.section(tmp_path)
    assert "2026-01-01, commit 0123456789" in text
    assert text.splitlines()[-3:] == [
        "| case | grid | window | stride | ms | useful TFLOP/s | executed TFLOP/s | of our dense "
        "rate | over FlashAttention-3 dense | NATTEN, ms | simulated / measured |",
        "|" + " --- |" * 11,
        "| na/flux/s1 | 256x256, 24 heads, D=128 | 80x80 | 1 | 10 | 515 | 600 | 80% | 8.00x | 18.6 "
        "| 0.90 |",
    ]
    later = [record("na/1d-causal/s1"), record("na/2d-dilated/s1"), record("na/hunyuan/s16x8x8")]
    report.save(results("2026-01-02T00:00:00+00:00", later), tmp_path / "a.json")
    text = readme.section(tmp_path)
    assert "| length | 64k |" in text  # still of the first file
    assert "na/flux" not in text
    rows = [line.split(" | ") for line in text.splitlines()[-3:]]
    assert [row[2] for row in rows] == ["4096, causal", "32x32, dilation 4x4", "18x24x24"]
    assert [row[3] for row in rows] == ["1", "1", "16x8x8"]
    assert "executed TFLOP/s" not in text  # nobody simulated


def test_printed_table_compares_with_dense():
    flux = record("na/flux/s1", executed_tflops=600.0, predicted_ms=9.0)
    header, rows = terminal.table_rows(results("2026-01-01T00:00:00+00:00", [flux]))
    shown = dict(zip(header, rows[0], strict=True))
    assert shown["% dense"] == "79.6"
    assert shown["predicted"] == "0.90x"
    assert shown["fa3 dense"] == "660 8.00x"
    assert shown["error / best"] == ""  # dense attention has another result
