"""The stages of the Hopper kernel for stripes, proved against the mask token by token.

Each consumer of each query tile plays its walk: which keys lie in its stages, and which of them it
sees where the stage says that it is masked.
"""

from collections import Counter

import pytest
from drawn_stripes import padded, problems, visible
from hypothesis import given, settings
from hypothesis import strategies as st

_C = pytest.importorskip("sparse_fmha._C")
ABSENT = 1 << 30


@settings(max_examples=150, deadline=None)
@given(problem=problems(), tile_k=st.sampled_from([32, 64, 128]), filler=st.sampled_from([-1, 0]))
def test_every_visible_pair_is_met_once(problem, tile_k, filler):
    len_q, len_kv, block_q, range_size, causal, columns, starts = problem
    counts, range_counts = ([len(row) for row in rows] for rows in (columns, starts))
    lists = counts, padded(columns, filler), range_counts, padded(starts, filler)
    met = Counter()
    for q_tile in range(-(-len_q // 128)):
        tile = _C.QueryTileStripes(
            len_q, len_kv, block_q, range_size, causal, tile_k, q_tile, *lists
        )
        for consumer in (0, 1):
            first = q_tile * 128 + consumer * 64
            if first >= len_q:
                continue
            own = tile.stages[1 + consumer]
            places = _C.consumer_places(tile.stages, consumer)
            assert len(places) == tile.stages[0] + own
            streams = _C.stream_places(tile.stages)
            for place, _ in places:
                stream, index = streams[place]
                assert stream in (0, 1 + consumer)
                keys, masked = tile.keys(stream, index, consumer)
                assert len(keys) == tile_k
                for row in range(first, min(first + 64, len_q)):
                    limit = tile.limit(row)
                    met.update((row, key) for key in keys if not masked or key < limit)
    assert all(key < len_kv for _, key in met)
    mask = visible(problem)
    assert met == Counter(map(tuple, mask.nonzero().tolist()))


def test_what_is_not_there_is_absent():
    """Beyond counts, negative, behind the last key; and a run that ends behind it."""
    tile = _C.QueryTileStripes(
        64, 100, 64, 64, False, 128, 0, [4], [[3, -7, 100, 99, 5]], [3], [[60, -1, 100]]
    )
    assert tile.stages == (3, 0, 0)
    keys, masked = tile.keys(0, 0, 0)
    assert keys[:64] == list(range(60, 124))
    assert min(keys[64:]) >= ABSENT
    assert masked
    keys, masked = tile.keys(0, 1, 0)
    assert min(keys) >= ABSENT
    keys, masked = tile.keys(0, 2, 0)
    assert keys == [3, ABSENT, ABSENT, 99] + [ABSENT] * 124
    assert masked
