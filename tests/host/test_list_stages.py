"""Which keys each consumer of the Hopper kernel sees through block lists, proved on the host.

The kernel's own integer code is asked stage by stage, and every (query, key) pair counted; the
oracle is the mask of sparse_fmha.reference.
"""

import numpy as np
import pytest
from drawn_lists import packed, problems, visible
from hypothesis import given
from hypothesis import strategies as st

_C = pytest.importorskip("sparse_fmha._C")

ABSENT = 1 << 30


def pairs_seen(problem, q_tile, consumer, tile_k, len_q, len_kv, skips=()):
    """How often each of a consumer's 64 rows meets each key; what is beyond the ends is dropped.

    skips: numbers of the stages in the consumer's walk that are left out.
    """
    both, first, second = problem.stages
    count = np.zeros((64, len_kv), dtype=int)
    own = (first, second)[consumer]
    for stream, stages in ((0, both), (1 + consumer, own)):
        for stage in range(stages):
            if stage + (both if stream else 0) in skips:
                continue
            origins = problem.origins(stream, stage)
            box = tile_k // len(origins)
            masked, words = problem.seen(stream, stage, consumer)
            keys = np.concatenate([np.arange(o, o + box) for o in origins])
            if masked:
                bits = np.array(words, dtype=np.uint32)[:, :, None] >> np.arange(32) & 1
                seen = bits.reshape(64, tile_k).astype(bool)
            else:
                seen = np.ones((64, tile_k), dtype=bool)
            outside = keys >= len_kv
            assert not seen[:, outside].any(), "a row sees a key that is not there"
            inside = ~outside
            np.add.at(count, (slice(None), keys[inside]), seen[:, inside])
    rows = min(64, max(0, len_q - q_tile * 128 - consumer * 64))
    return count[:rows]


SIZES = [(q, kv, tile_k) for q in (64, 128) for kv in (16, 32, 64, 128) for tile_k in (64, 128)]


def draw(data, sizes):
    block_q, block_kv, tile_k = sizes
    return data.draw(problems(block_q, block_kv)) | {"tile_k": tile_k}


def bound(p, q_tile):
    counts, indices = p["full"]
    partial_counts, partial_indices = p["partial"]
    return _C.QueryTileLists(
        *(p[name] for name in ("len_q", "len_kv", "block_q", "block_kv", "causal", "tile_k")),
        q_tile,
        counts,
        indices,
        indices.shape[1],
        partial_counts,
        partial_indices,
        packed(p["masks"]),
        partial_indices.shape[1],
    )


@pytest.mark.parametrize("sizes", SIZES)
@given(data=st.data())
def test_every_pair_is_met_once(sizes, data):
    p = draw(data, sizes)
    mask = visible(p)
    for q_tile in range(-(-p["len_q"] // 128)):
        problem = bound(p, q_tile)
        for consumer in range(2):
            count = pairs_seen(problem, q_tile, consumer, p["tile_k"], p["len_q"], p["len_kv"])
            first = q_tile * 128 + consumer * 64
            np.testing.assert_array_equal(count, mask[first : first + 64].astype(int))


def pairs_kept(problem, p, q_tile, consumer, skips):
    """The same through boxes that are listed for gradients. Bits begin with the last stage."""
    both, *own = problem.stages
    stages = both + own[consumer]
    words = [0] * (-(-stages // 32) + 1)
    for i in skips:
        words[(stages - 1 - i) // 32] |= 1 << (stages - 1 - i) % 32
    box = min(p["block_kv"], p["tile_k"])
    queries = q_tile * 128 + consumer * 64 + np.arange(64)
    last = queries + p["len_kv"] - p["len_q"] if p["causal"] else np.full(64, p["len_kv"] - 1)
    count = np.zeros((64, p["len_kv"]), dtype=int)
    for block, rows in problem.kept(consumer, words):
        keys = block * box + np.arange(box)
        bits = np.array(rows or [255] * (8 * box), dtype=np.uint8).reshape(64, box // 8)
        seen = np.unpackbits(bits, axis=1, bitorder="little").astype(bool)
        seen = (seen & (keys <= last[:, None]))[:, keys < p["len_kv"]]
        np.add.at(count, (slice(None), keys[keys < p["len_kv"]]), seen)
    return count[: max(0, p["len_q"] - queries[0])]


@pytest.mark.parametrize("sizes", [(64, 16, 128), (64, 128, 32), (128, 32, 128), (128, 64, 32)])
@given(data=st.data())
def test_what_stages_keep_is_listed(sizes, data):
    """Blocks longer than a stage in parts."""
    p = draw(data, sizes)
    for q_tile in range(-(-p["len_q"] // 128)):
        problem = bound(p, q_tile)
        for consumer in range(2):
            both, *own = problem.stages
            every = range(both + own[consumer])
            skips = data.draw(st.sets(st.sampled_from(every)) if every else st.just(set()))
            given_sizes = p["tile_k"], p["len_q"], p["len_kv"]
            expected = pairs_seen(problem, q_tile, consumer, *given_sizes, skips)
            found = pairs_kept(problem, p, q_tile, consumer, skips)
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sizes", SIZES)
@given(data=st.data())
def test_stages_are_no_more_than_the_lists_need(sizes, data):
    p = draw(data, sizes)
    per_stage = p["tile_k"] / p["block_kv"]
    for q_tile in range(-(-p["len_q"] // 128)):
        stages = bound(p, q_tile).stages
        blocks = range(
            q_tile * 128 // p["block_q"], min(-(-p["len_q"] // p["block_q"]), 2 + q_tile * 2)
        )
        if p["block_q"] == 128:
            listed = p["full"][0][q_tile] + p["partial"][0][q_tile]
            assert stages == (-(-int(listed) // per_stage), 0, 0)
        else:
            full = [set(p["full"][1][b, : p["full"][0][b]].tolist()) for b in blocks]
            full.append(set())
            both = full[0] & full[1]
            own = [len(full[w] - both) + int(p["partial"][0][b]) for w, b in enumerate(blocks)]
            expected = [len(both), *own, 0][:3]
            assert stages == tuple(-(-n // per_stage) for n in expected)


def test_blocks_that_are_not_there_are_not_seen():
    indices = np.array([[0, 9, -1, 2, 1]], dtype=np.int32)
    p = dict(len_q=64, len_kv=70, block_q=64, block_kv=32, causal=False, tile_k=128)
    p["full"] = (np.array([4], dtype=np.int32), indices)
    p["partial"] = (np.zeros(1, dtype=np.int32), np.zeros((1, 1), dtype=np.int32))
    p["masks"] = np.zeros((1, 1, 64, 32), dtype=bool)
    problem = bound(p, 0)
    assert problem.stages == (0, 1, 0)
    assert problem.origins(1, 0) == [0, 64, ABSENT, ABSENT]
    count = pairs_seen(problem, 0, 0, 128, 64, 70)
    assert (count == np.r_[np.ones(32), np.zeros(32), np.ones(6)]).all()
    p["block_q"], p["masks"] = 128, np.zeros((1, 1, 128, 32), dtype=bool)
    assert bound(p, 0).origins(0, 0) == [0, ABSENT, ABSENT, 64]


def test_counts_are_held_to_the_width():
    p = dict(len_q=128, len_kv=64, block_q=128, block_kv=16, causal=False, tile_k=128)
    p["full"] = (np.array([99], dtype=np.int32), np.array([[1, 3]], dtype=np.int32))
    p["partial"] = (np.array([-5], dtype=np.int32), np.zeros((1, 1), dtype=np.int32))
    p["masks"] = np.zeros((1, 1, 128, 16), dtype=bool)
    problem = bound(p, 0)
    assert problem.stages == (1, 0, 0)
    assert problem.origins(0, 0)[:3] == [16, 48, ABSENT]


def test_only_stages_at_the_limits_are_masked():
    """Full lists under a causal mask: the last block of each query tile, and what is ragged."""
    n = 4
    p = dict(block_q=128, block_kv=128, causal=True, tile_k=128, len_q=n * 128, len_kv=n * 128)
    counts, indices = np.arange(1, n + 1, dtype=np.int32), np.tile(np.arange(n), (n, 1))
    p["full"] = (counts, indices.astype(np.int32))
    p["partial"] = (np.zeros(n, dtype=np.int32), np.zeros((n, 1), dtype=np.int32))
    p["masks"] = np.zeros((n, 1, 128, 128), dtype=bool)

    def masked(q_tile):
        tile = bound(p, q_tile)
        return [tile.seen(0, stage, 1)[0] for stage in range(tile.stages[0])]

    assert [masked(t) for t in range(n)] == [[False] * t + [True] for t in range(n)]
    p["causal"] = False
    assert [masked(t) for t in range(n)] == [[False] * (t + 1) for t in range(n)]
    p["partial"] = (np.ones(n, dtype=np.int32), np.full((n, 1), n - 1, dtype=np.int32))
    p["full"] = (counts - 1, p["full"][1])
    assert [masked(t) for t in range(n)] == [[True] + [False] * t for t in range(n)]
    p["len_kv"] -= 1
    p["partial"] = (np.zeros(n, dtype=np.int32), p["partial"][1])
    p["full"] = (counts, p["full"][1])
    assert [masked(t) for t in range(n)] == [[False] * (t + 1) for t in range(n - 1)] + [
        [False] * (n - 1) + [True]
    ]


def test_a_stage_that_is_not_filled_is_masked():
    p = dict(block_q=64, block_kv=16, causal=False, tile_k=128, len_q=128, len_kv=512)
    both, first, second = range(0, 9), range(9, 17), range(17, 26)
    rows = [[*both, *first, -1], [*both, *second]]
    p["full"] = (np.array([17, 18], dtype=np.int32), np.array(rows, dtype=np.int32))
    p["partial"] = (np.zeros(2, dtype=np.int32), np.zeros((2, 1), dtype=np.int32))
    p["masks"] = np.zeros((2, 1, 64, 16), dtype=bool)
    tile = bound(p, 0)
    assert tile.stages == (2, 1, 2)
    # There are two masked spans, at the beginning and at the end: the first one is all of `both`.
    assert [tile.seen(0, i, 0)[0] for i in range(2)] == [True, True]
    assert not tile.seen(1, 0, 0)[0]
    assert [tile.seen(2, i, 1)[0] for i in range(2)] == [False, True]
