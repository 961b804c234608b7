"""Which blocks of keys a group of query rows keeps, by the bits of the tiles that it skipped.

The oracle goes through keys and rows one by one.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

_C = pytest.importorskip("sparse_fmha._C")
GROUP, BLOCK = 64, 16


def bits_of(words):
    """[groups, 32 * words]"""
    return (np.array(words, dtype=np.int64)[..., None] >> np.arange(32) & 1).reshape(len(words), -1)


@given(
    len_q=st.integers(1, 400),
    len_kv=st.integers(1, 5000),
    causal=st.booleans(),
    tile=st.sampled_from([64, 80, 128]),
    share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_visited_tiles_that_were_not_skipped(len_q, len_kv, causal, tile, share, seed):
    keys = np.arange(len_kv)
    first_row = np.arange(0, len_q, GROUP)
    last_row = np.minimum(first_row + GROUP, len_q) - 1
    # As a forward pass does, rows of a group all see the keys that the first one sees.
    seen = keys <= last_row[:, None] + len_kv - len_q if causal else np.ones((len(first_row), 1))
    seen = np.broadcast_to(seen, (len(first_row), len_kv)).astype(bool)
    random = np.random.default_rng(seed)
    skips = random.random((len(first_row), -(-len_kv // tile))) < share
    skips[:, 0] &= seen[:, 0]  # a tile that is not visited is not skipped
    for i in range(1, skips.shape[1]):
        skips[:, i] &= seen[:, i * tile]
    words = np.zeros((len(first_row), -(-len_kv // 2048)), dtype=np.uint32)
    for group, i in zip(*skips.nonzero(), strict=True):
        words[group, i // 32] |= np.uint32(1 << i % 32)
    kept = bits_of(_C.kept_blocks(len_q, len_kv, causal, tile, words.tolist()))
    expected = np.zeros_like(kept)
    for group, key in zip(*(seen & ~skips[:, keys // tile]).nonzero(), strict=True):
        expected[group, key // BLOCK] = 1
    np.testing.assert_array_equal(kept, expected)
