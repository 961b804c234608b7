"""`simulate`: the published bounds, and its figures against walks and masks."""

import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tilings import extents, powers, problems, token_mask, walks

import sparse_fmha
from sparse_fmha import _C, simulate
from sparse_fmha.cost import model, simulation, tile_problem


@pytest.mark.parametrize(
    ("grid", "window", "tile_q", "tile_k", "bound"),
    [
        ((30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8), 3.3),
        ((16, 44, 80), (16, 24, 16), (8, 4, 8), (4, 4, 8), 5.2),
        ((256, 256), (80, 80), (16, 16), (16, 8), 6.1),
    ],
    ids=["HunyuanVideo", "Cosmos", "FLUX"],
)
def test_published_bounds(grid, window, tile_q, tile_k, bound):
    """Hassani et al., arXiv 2504.16922: speedups over dense that their kernel can reach."""
    found = simulate(grid, window, tile_q=tile_q, tile_k=tile_k, key_tiling="static")
    assert round(found.speedup_bound_worst, 1) == bound
    dynamic = simulate(grid, window, tile_q=tile_q, tile_k=tile_k)
    assert dynamic.speedup_bound_worst >= found.speedup_bound_worst


def test_perfect_block_sparsity():
    """Tiles that divide stride and window visit nothing in vain."""
    found = simulate(
        (30, 48, 80), (18, 24, 24), stride=(16, 8, 8), tile_q=(2, 8, 8), tile_k=(2, 8, 8)
    )
    assert found.partial == (0, 0)
    assert found.executed_flops == found.useful_flops
    assert found.speedup_bound == found.perfect_bound == 100 / 9


def test_grid_smaller_than_a_tile():
    found = simulate((5, 5), 3)
    assert (found.query_tiles, found.visited) == (1, (1, 1))
    assert math.prod(found.tile_q) == math.prod(found.tile_k) == 128


def as_run(problem):
    """Without the dilation of axes with a window of 1, where it makes no difference."""
    grid, window, stride, dilation, causal = problem
    dilation = tuple(1 if w == 1 else d for w, d in zip(window, dilation, strict=True))
    return grid, window, stride, dilation, causal


@settings(max_examples=100, deadline=None)
@given(problems(), st.data())
def test_simulation_adds_up(drawn, data):
    problem, rank = drawn
    grid, window, stride, dilation, causal = (values[3 - rank :] for values in problem)
    batch, heads, extra = (data.draw(st.integers(low, 9)) for low in (1, 1, 0))
    head_dim = 8 * data.draw(st.integers(1, 32))
    tile_q, tile_k = data.draw(extents())[-rank:], data.draw(extents())[-rank:]
    found = simulate(
        grid, window, stride=stride, dilation=dilation, causal=tuple(map(bool, causal)),
        heads=heads, batch=batch, head_dim=head_dim, extra=extra, tile_q=tile_q, tile_k=tile_k,
    )  # fmt: skip
    shape = tuple((1,) * (3 - rank) + tile for tile in (tile_q, tile_k))
    keys = math.prod(tile_k)
    visits = [
        (partial + (extra % keys > 0), full + extra // keys)
        for partial, full in walks(as_run(problem), shape)
    ]
    partial, full = (np.array(numbers) for numbers in zip(*visits, strict=True))
    visited = partial + full
    assert found.query_tiles == len(visits) == sum(found.distribution.values())
    for tiles, counted in zip(
        (found.visited, found.full, found.partial), (visited, full, partial), strict=True
    ):
        assert tiles.mean == pytest.approx(counted.mean())
        assert tiles.worst == counted.max()
    assert found.distribution == dict(zip(*np.unique(visited, return_counts=True), strict=True))

    mask = token_mask(problem, rank)
    tokens = len(mask)
    flops = 4 * batch * heads
    assert found.useful_flops == flops * head_dim * (int(mask.sum()) + tokens * extra)
    assert found.dense_flops == flops * head_dim * tokens * (tokens + extra)
    row = next(row for row in (64, 96, 128, 256) if row >= head_dim)
    pairs = int(visited.sum()) * math.prod(tile_q) * keys
    assert found.executed_flops == flops * row * pairs >= found.useful_flops
    assert found.perfect_bound == pytest.approx(found.dense_flops / found.useful_flops)
    dense_keys = math.ceil((tokens + extra) / keys)
    dense_queries = math.ceil(tokens / math.prod(tile_q))
    assert found.speedup_bound == pytest.approx(dense_queries * dense_keys / visited.sum())
    assert found.speedup_bound_worst == pytest.approx(dense_keys / visited.max())


def test_perfect_bound_is_grid_by_window():
    found = simulate((30, 48, 80), (18, 24, 24), dilation=(1, 2, 3))
    assert found.perfect_bound == pytest.approx(30 * 48 * 80 / (18 * 24 * 24))


def test_predicted_time():
    """Full tiles alone, in two rounds and a bit, which take three."""
    full, partial, query = _C.tiles.costs(128)
    arguments = {"stride": 2048, "tile_q": 128, "tile_k": 128}
    one_round = query + 16 * full
    found = [simulate(128 * 256, 2048, heads=heads, **arguments) for heads in (1, 2, 64)]
    rounds = [sim.predicted_ms * 1e3 / one_round for sim in found]
    assert rounds == pytest.approx([2, 4, 64 * 256 / 132], rel=0.01)
    # One visible token more on either side makes partial tiles of two full ones.
    moved = simulate(128 * 256, 2048, stride=1, tile_q=128, tile_k=128)
    assert moved.partial.worst == 2
    assert moved.predicted_ms * 1e3 >= 2 * (query + 15 * full + 2 * partial) * 0.999
    assert 0 < full < partial < 2 * full


def test_longest_query_tile_bounds_the_time():
    assert model.makespan([(1, 50.0), (132, 1.0)]) == 50
    assert model.makespan([(131, 1.0), (2, 3.0)]) == pytest.approx(3)
    assert model.makespan([(133, 1.0)]) == 2
    assert model.makespan([(1320000, 1.0)]) == pytest.approx(10000)


@pytest.mark.parametrize("static", [False, True])
def test_tiles_that_are_given(static):
    """One given tile is kept, and the other is the cheapest for it."""
    problem = {"grid": (64, 64), "window": 9, "key_tiling": "static" if static else "dynamic"}
    best = simulate(**problem)
    by_queries = simulate(**problem, tile_q=(64, 2))
    assert by_queries.tile_q == (64, 2)
    assert math.prod(by_queries.tile_k) == 128
    by_keys = simulate(**problem, tile_k=(2, 64))
    assert by_keys.tile_k == (2, 64)
    for found, given_tiles in ((by_queries, {"tile_q": (64, 2)}), (by_keys, {"tile_k": (2, 64)})):
        times = []
        for box in powers(128, (1, 64, 64)):
            free = {"tile_k" if "tile_q" in given_tiles else "tile_q": box}
            times.append(simulate(**problem, heads=132, **given_tiles, **free).predicted_ms)
        other = {"tile_q": found.tile_q, "tile_k": found.tile_k}
        assert simulate(**problem, heads=132, **other).predicted_ms == pytest.approx(min(times))
        assert found.predicted_ms >= best.predicted_ms
    assert simulate(**problem, tile_q=8).tile_q == (8, 8)
    assert simulate(4096, 9, tile_q=(2, 2, 32)).tile_q == (2, 2, 32)


def test_static_is_never_better_than_dynamic():
    for tile_k in powers(128, (1, 64, 64)):
        arguments = {"tile_q": (8, 16), "tile_k": tile_k}
        dynamic = simulate((64, 64), 13, **arguments)
        static = simulate((64, 64), 13, **arguments, key_tiling="static")
        assert dynamic.visited.mean <= static.visited.mean


def test_ranking():
    found = simulation.ranking(7, grid=(64, 64), window=(9, 9), heads=132)
    assert len({(sim.tile_q, sim.tile_k) for sim in found}) == 7
    assert [sim.predicted_ms for sim in found] == sorted(sim.predicted_ms for sim in found)
    assert found[0] == simulate((64, 64), 9, heads=132)


def test_rows_are_those_of_the_kernels():
    listed = Path(__file__).parents[2] / "csrc/kernels/sm90_forward.def"
    entry = r"""^kernel\(mechanism=Neighborhood, .*, head_dim=(\d+),
       tile_q=(\d+), tile_k=(\d+), .*, skipping=kNever\)$"""
    rows = re.findall(entry, listed.read_text(), re.MULTILINE)
    assert {tuple(map(int, numbers)) for numbers in rows} == set(tile_problem.ROWS)


def test_text():
    text = str(simulate((30, 48, 80), (18, 24, 24), heads=24, tile_q=(4, 8, 8), tile_k=(2, 8, 8)))
    assert "grid 30x48x80, window 18x24x24, stride 1x1x1\n" in text
    assert "query tiles 4x8x8: 480 a head; key tiles 2x8x8, dynamic" in text
    assert "11.11x with perfect block sparsity" in text
    assert "dilation" not in text
    text = str(simulate((8, 8), 3, dilation=2, causal=(False, True), extra=5))
    assert "dilation 2x2, causal 0x1, 5 extra tokens" in text


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"window": 9},
            ValueError,
            r"window\[0\] \* dilation\[0\] must be at most the 8 tokens of that axis,",
        ),
        ({"window": 0}, ValueError, r"window\[0\] must be at least 1, got 0"),
        (
            {"window": (3, 3, 3)},
            ValueError,
            r"window must have one entry for each of q's 2 token axes, got \(3, 3, 3\)",
        ),
        ({"window": 3.5}, TypeError, "window must be an int or a tuple of them, got 3.5"),
        ({"stride": 4}, ValueError, r"stride\[0\] must be from 1 to window.*, got 4"),
        ({"dilation": 0}, ValueError, r"dilation\[0\] must be at least 1, got 0"),
        ({"causal": 1}, TypeError, "causal must be a bool or a tuple of them, got 1"),
        (
            {"grid": (2, 2, 2, 2)},
            ValueError,
            "grid must have one to three axes",
        ),
        (
            {"grid": ()},
            ValueError,
            "grid must have one to three axes",
        ),
        (
            {"grid": (8, 0)},
            ValueError,
            "grid must have at least 1 token on every axis and at most 1073741824 in",
        ),
        (
            {"grid": (2**16, 2**16)},
            ValueError,
            "grid must have at least 1 token on every axis and at most 1073741824 in",
        ),
        ({"grid": "8"}, TypeError, "grid must be an int or a tuple of them, got '8'"),
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"batch": True}, TypeError, "batch must be an int, got True"),
        ({"extra": -1}, ValueError, "extra must be at least 0, got -1"),
        ({"head_dim": 12}, ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 12"),
        ({"head_dim": 264}, ValueError, "head_dim must be a multiple of 8 from 8 to 256, got 264"),
        ({"head_dim": 64.0}, TypeError, "head_dim must be an int, got 64.0"),
        (
            {"tile_q": 0},
            ValueError,
            "tile_q must have at least 1 token on every axis and at most 65536 in",
        ),
        (
            {"tile_k": (512, 512)},
            ValueError,
            "tile_k must have at least 1 token on every axis and at most 65536 in",
        ),
        (
            {"tile_k": (1, 2, 3, 4)},
            ValueError,
            r"tile_k must have one entry for each of q's 2 token axes, got \(1, 2, 3,",
        ),
        (
            {"key_tiling": "fixed"},
            ValueError,
            "key_tiling must be dynamic or static, got 'fixed'",
        ),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        simulate(**({"grid": (8, 8), "window": 3} | arguments))


def test_extension_of_another_python():
    """The package is imported without `_C`, and simulate says what is missing."""
    program = (
        "import sys, torch; sys.modules['sparse_fmha._C'] = None\n"
        "import sparse_fmha; print('imported'); sparse_fmha.simulate(8, 3)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "imported\n"
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: sparse_fmha's extension _C is missing .*simulate\(\)", last)


def test_public():
    assert isinstance(simulate(64, 8), sparse_fmha.Simulation)
    assert {"simulate", "Simulation"} <= set(sparse_fmha.__all__)


def test_causal_window_beyond_the_start():
    longer = simulate((100,), 400, stride=300, causal=True)
    assert longer.window == longer.stride == (100,)
    assert longer == simulate((100,), 100, stride=100, causal=True)
    # Classes of 34, 33 and 33 positions: a window of 33 would lack the first key of the longest.
    dilated = simulate((100,), 50, dilation=3, causal=True)
    assert dilated.window == (34,)
    flops = 4 * 128 * sum(n * (n + 1) // 2 for n in (34, 33, 33))
    assert dilated.useful_flops == flops
    with pytest.raises(
        ValueError, match=r"window\[0\] \* dilation\[0\] must be at most the 100 tokens of that"
    ):
        simulate((100,), 101)
