"""Which query rows the dK/dV kernel of Hopper meets through lists, proved on the host.

The kernel's own integer code is asked for 64 keys and 64 query rows at a time, and the turning of
bitmasks by a warp is played lane by lane; the oracle is the mask of sparse_fmha.reference. What
fills the bitmaps on the device is copied in the binding and runs on a GPU only.
"""

import drawn_stripes
import numpy as np
import pytest
from drawn_lists import packed, problems, visible
from hypothesis import given
from hypothesis import strategies as st

_C = pytest.importorskip("sparse_fmha._C")

SIZES = [(q, kv) for q in (64, 128) for kv in (16, 32, 64, 128)]


def bound(p):
    counts, indices = p["full"]
    partial_counts, partial_indices = p["partial"]
    return _C.ListsOfKeys(
        *(p[name] for name in ("len_q", "len_kv", "block_q", "block_kv", "causal")),
        counts,
        indices,
        indices.shape[1],
        partial_counts,
        partial_indices,
        packed(p["masks"]),
        partial_indices.shape[1],
    )


def turned(words):
    """[keys, queries] of words that have a bit for each query."""
    return (np.array(words, dtype=np.uint64)[:, None] >> np.arange(64, dtype=np.uint64) & 1) != 0


@pytest.mark.parametrize("sizes", SIZES)
@given(data=st.data())
def test_the_map_of_keys_is_that_of_queries_turned(sizes, data):
    p = data.draw(problems(*sizes, longest=1500))
    check(bound(p), visible(p))


def check(lists, mask):
    """Every visible pair is met once, no other is, and only where there is a mask is one hidden."""
    met = np.zeros(mask.T.shape, dtype=int)
    for part in range(-(-len(met) // 64)):
        steps = lists.steps(part)
        assert [step for step, _ in steps] == sorted({step for step, _ in steps})
        for step, masked in steps:
            there = met[part * 64 : part * 64 + 64, step * 64 : step * 64 + 64]
            whole = turned(lists.seen(part, step))
            seen = whole[: there.shape[0], : there.shape[1]]
            assert not whole[len(there) :].any(), "a key out of range is seen"
            assert masked or seen.all(), "a step without a mask hides something"
            there += seen
    np.testing.assert_array_equal(met, mask.T.astype(int))


@pytest.mark.parametrize("sizes", SIZES)
@given(data=st.data())
def test_only_what_is_cut_or_partial_is_masked(sizes, data):
    """What the last key cuts is: dQ may not meet weights of keys out of range."""
    p = data.draw(problems(*sizes))
    p["partial"] = (np.zeros_like(p["partial"][0]), p["partial"][1])
    mask = visible(p)
    lists = bound(p)
    for part in range(-(-p["len_kv"] // 64)):
        for step, masked in lists.steps(part):
            pairs = mask[step * 64 : step * 64 + 64, part * 64 : part * 64 + 64]
            assert pairs.any(), "a step that no row sees anything in"
            if p["len_q"] % 64 == 0 or step < p["len_q"] // 64:
                assert masked != (pairs.shape[1] == 64 and pairs.all())


def stripes(len_q, len_kv, block_q, range_size, causal, columns, starts):
    def listed(rows):
        keys = np.array(drawn_stripes.padded(rows, -1), dtype=np.int32).reshape(len(rows), -1)
        return np.array([len(row) for row in rows], dtype=np.int32), keys, keys.shape[1]

    sizes = len_q, len_kv, block_q, range_size, causal
    return _C.StripesOfKeys(*sizes, *listed(columns), *listed(starts))


@given(problem=drawn_stripes.problems())
def test_the_map_of_single_keys_is_that_of_queries_turned(problem):
    check(stripes(*problem), drawn_stripes.visible(problem).numpy())


def test_single_keys_that_are_not_there_are_not_seen():
    columns, starts = [[5, -7, 100, 3, 99]], [[80, -1, 100]]
    lists = stripes(64, 100, 64, 64, False, columns, starts)
    assert lists.steps(0) == [(0, True)]
    assert turned(lists.seen(0, 0)).any(1).nonzero()[0].tolist() == [3, 5]
    assert turned(lists.seen(1, 0)).all(1).nonzero()[0].tolist() == list(range(16, 36))


def test_a_run_at_the_boundaries_has_no_mask():
    assert stripes(64, 200, 64, 64, False, [[]], [[128]]).steps(2) == [(0, False)]
    assert stripes(64, 170, 64, 64, False, [[]], [[128]]).steps(2) == [(0, False)]
    assert stripes(64, 200, 64, 64, False, [[]], [[128]]).steps(1) == []
    assert stripes(128, 128, 128, 64, True, [[]], [[64]]).steps(1) == [(1, True)]


def test_what_is_not_there_is_not_seen():
    p = dict(len_q=100, len_kv=70, block_q=64, block_kv=32, causal=False)
    p["full"] = (
        np.array([99, -3], dtype=np.int32),
        np.array([[3, -1, 2, 1 << 30], [0, 1, 2, 0]], dtype=np.int32),
    )
    p["partial"] = (np.array([3, 2], dtype=np.int32), np.array([[7, 1, -9]] * 2, dtype=np.int32))
    p["masks"] = np.ones((2, 3, 64, 32), dtype=bool)
    lists = bound(p)
    assert lists.steps(0) == [(0, True), (1, True)]
    assert lists.steps(1) == [(0, True)]  # its keys end at 70
    expected = np.zeros((64, 64), dtype=bool)
    expected[32:] = True
    for step in (0, 1):
        np.testing.assert_array_equal(turned(lists.seen(0, step)), expected)
