"""The order in which query tiles of a neighborhood are taken: each once, few keys at a time."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tilings import extents, problems

from sparse_fmha import _C

ONES, ZEROS = (1, 1, 1), (0, 0, 0)
HUNYUAN = ((30, 48, 80), (18, 24, 24), ONES, ONES, ZEROS)
BLOCKS = 132  # of an H100, at work at a time


@settings(max_examples=300, deadline=None)
@given(problems(), extents(), st.integers(1, 300))
@example((HUNYUAN, 3), (2, 8, 8), BLOCKS)
def test_each_tile_is_taken_once(drawn, q, blocks):
    problem, _ = drawn
    tiles, *_ = _C.tiles.count(problem, (q, ONES))
    order = _C.tiles.order(problem, (q, ONES), blocks)
    assert sorted(order) == list(range(tiles))
    _, _, _, dilation, causal = problem
    if any(causal) or set(dilation) != {1}:
        assert order == list(range(tiles))


def keys_at_work(problem, extent, order):
    """Keys seen by BLOCKS tiles in a row, on average; stride 1, and tiles that divide the grid."""
    grid, window, *_ = problem
    starts = [range(0, length, side) for length, side in zip(grid, extent, strict=True)]
    tiles = list(itertools.product(*starts))

    def seen(axis, start):
        first, last = start, start + extent[axis] - 1
        edge = [
            min(max(at - window[axis] // 2, 0), grid[axis] - window[axis]) for at in (first, last)
        ]
        return slice(edge[0], edge[1] + window[axis])

    counts = []
    for begin in range(0, len(order) - BLOCKS + 1, 10):
        keys = torch.zeros(grid, dtype=torch.bool)
        for index in order[begin : begin + BLOCKS]:
            keys[tuple(seen(axis, start) for axis, start in enumerate(tiles[index]))] = True
        counts.append(keys.sum().item())
    return sum(counts) / len(counts)


# The last: what is best already stays as it is.
@pytest.mark.parametrize(
    ("problem", "extent", "at_most"),
    [
        (HUNYUAN, (2, 8, 8), 0.7),
        (((16, 44, 80), (16, 24, 16), ONES, ONES, ZEROS), (16, 4, 2), 0.7),
        (((24, 40, 40), (8, 8, 38), ONES, ONES, ZEROS), (2, 8, 8), 1.0),
        (((40, 80, 16), (8, 24, 12), ONES, ONES, ZEROS), (2, 8, 8), 1.0),
    ],
)
def test_fewer_keys_are_at_work(problem, extent, at_most):
    order = _C.tiles.order(problem, (extent, extent), BLOCKS)
    row_major = keys_at_work(problem, extent, range(len(order)))
    assert keys_at_work(problem, extent, order) <= at_most * row_major


def test_the_second_axis_may_be_the_slowest():
    """A window as long as the grid on the other two axes."""
    problem = (8, 64, 32), (8, 8, 32), ONES, ONES, ZEROS
    order = _C.tiles.order(problem, ((2, 8, 8), ONES), 16)
    assert [index // 4 % 8 for index in order] == sorted(index // 4 % 8 for index in order)
