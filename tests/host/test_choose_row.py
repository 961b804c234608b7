"""The choice among kernels that differ in their query tile, beside schedules made tile by tile."""

from __future__ import annotations

import heapq

import pytest

import kernel_list
from sparse_fmha import _C

MULTIPROCESSORS = 132
LENGTHS = (1, 64, 128, 197, 256, 512, 577, 1000, 1024, 2048, 4096, 8192)


def rows(head_dim, causal):
    """The rows among which a call chooses, by tile_q, from the list."""
    mechanism = "Causal" if causal else "Dense"
    found = [
        row
        for row in kernel_list.read_all()
        if (row.arch.name, row.direction, row.mechanism) == ("sm90", "forward", mechanism)
        and row.dtype == "bfloat16"
        and not row.skips
        and not row.key_bias
        and not row.packed
        and row.value_dim == row.head_dim
    ]
    smallest = min(row.head_dim for row in found if row.head_dim >= head_dim)
    return {row.tile_q: row for row in found if row.head_dim == smallest}


def schedule(row, causal, instances, len_q, len_kv):
    """Microseconds until the last tile is done, if a place that is free takes the heaviest one."""
    tiles = []
    for first in range(0, len_q, row.tile_q):
        last = min(first + row.tile_q, len_q) - 1
        keys = min(max(last + 1 + len_kv - len_q, 0), len_kv) if causal else len_kv
        tiles += [-(-keys // row.tile_k)] * instances
    alone = len(tiles) <= MULTIPROCESSORS and row.alone_ns
    step = (row.alone_ns if alone else row.step_ns) / 1e3
    places = [0.0] * (MULTIPROCESSORS * row.blocks)
    for steps in sorted(tiles, reverse=True):
        heapq.heapreplace(places, places[0] + row.tile_ns / 1e3 + steps * step)
    return max(places)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_predictions_are_near_a_schedule(head_dim, causal):
    listed = rows(head_dim, causal)
    assert len(listed) > 1
    for length in LENGTHS:
        for instances in (1, 3, 16, 40, 64, 256):
            if length * instances > 2**19:
                continue
            times = _C.row_times(causal, head_dim, instances, length, length)
            assert [tile for tile, *_ in times] == list(listed)
            exact = {}
            for tile, waves, us in times:
                row = listed[tile]
                tiles = -(-length // tile) * instances
                assert waves == pytest.approx(tiles / (MULTIPROCESSORS * row.blocks))
                exact[tile] = schedule(row, causal, instances, length, length)
                low, high = (0.999, 1.001) if not causal else (0.8, 1.001)
                assert low * exact[tile] <= us <= high * exact[tile], (length, instances, tile)
            chosen = min(times, key=lambda time: time[2])[0]
            assert exact[chosen] <= 1.12 * min(exact.values()), (length, instances)


@pytest.mark.parametrize(("len_q", "len_kv"), [(64, 4096), (4096, 64), (1, 1000), (500, 700)])
def test_causal_lengths_that_differ(len_q, len_kv):
    for tile, _, us in _C.row_times(True, 128, 16, len_q, len_kv):
        exact = schedule(rows(128, True)[tile], True, 16, len_q, len_kv)
        assert us == pytest.approx(exact, rel=0.35)


def test_little_work_takes_small_tiles_and_much_work_the_first_row():
    for head_dim in (64, 128):
        for causal in (False, True):
            first, *_ = rows(head_dim, causal)
            for length, instances, expected in ((256, 16, 64), (16384, 32, first)):
                times = _C.row_times(causal, head_dim, instances, length, length)
                assert min(times, key=lambda time: time[2])[0] == expected


def test_a_head_dim_has_a_choice_only_if_its_row_has():
    assert len(_C.row_times(False, 64, 16, 256, 256)) == len(_C.row_times(False, 8, 16, 256, 256))
    assert len(_C.row_times(False, 72, 16, 256, 256)) == 1  # the row for 96
    assert len(_C.row_times(False, 136, 16, 256, 256)) == 1


def test_nothing_to_do():
    for lengths in ((0, 64), (64, 0)):
        assert all(us >= 0 for *_, us in _C.row_times(True, 64, 16, *lengths))
    assert all(us == 0 for *_, us in _C.row_times(True, 64, 0, 64, 64))


def test_the_override_is_returned():
    before = _C.set_tile_q_override(64)
    try:
        assert _C.set_tile_q_override(128) == 64
    finally:
        assert _C.set_tile_q_override(before) == 128
