"""The tiles that thread blocks take in turns: each once, and an even share of the work."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_fmha import _C


def shares(tiles, blocks):
    """The tiles of each thread block, in order."""
    found = []
    for block in range(blocks):
        mine, index = [], block
        while index < tiles:
            mine.append(index)
            index = _C.tiles.next_in_turns(index, blocks)
        found.append(mine)
    return found


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 300))
def test_each_tile_is_taken_once(tiles, blocks):
    taken = [index for share in shares(tiles, blocks) for index in share]
    assert sorted(taken) == list(range(tiles))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 150))
def test_turns_share_causal_tiles_evenly(q_tiles, heads, blocks):
    """No thread block has more than its share and one heaviest tile."""
    tiles = q_tiles * heads
    weights = [q_tiles - index // heads for index in range(tiles)]  # all heads side by side
    work = [sum(weights[index] for index in share) for share in shares(tiles, blocks)]
    assert max(work) <= sum(weights) / blocks + q_tiles


def test_two_rounds_pair_the_heaviest_with_the_lightest():
    assert shares(8, 4) == [[0, 7], [1, 6], [2, 5], [3, 4]]
