"""Forced blocks of a grid, against all pairs, and masks of chosen and forced blocks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_fmha.selection import BlockGrid, block_scores, top_k_blocks

FEW = settings(max_examples=40)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pairs(q_len, kv_len):
    """Positions of queries and keys."""
    return torch.arange(q_len)[:, None] + kv_len - q_len, torch.arange(kv_len)


def blocks_of(dense, block_q, block_kv):
    rows = [part.any(0) for part in dense.split(block_q)]
    return torch.stack([torch.stack([c.any() for c in row.split(block_kv)]) for row in rows])


@FEW
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.sampled_from([64, 128]),
    st.sampled_from([16, 64, 128]),
    st.booleans(),
    st.integers(0, 320),
    st.integers(-310, 310),
    st.integers(-310, 310),
)
def test_forced_blocks(q_len, kv_len, block_q, block_kv, causal, n, start, stop):
    """A block is in a map if one of its pairs is meant."""
    grid = BlockGrid(q_len, kv_len, block_q, block_kv, causal=causal)
    i, j = pairs(q_len, kv_len)
    everywhere = torch.ones(q_len, kv_len, dtype=torch.bool)
    near = (i - j < n) & ((i - j >= 0) if causal else (j - i < n))
    seen = torch.zeros(kv_len, dtype=torch.bool)
    seen[start:stop] = True
    asking = torch.zeros(q_len, dtype=torch.bool)
    asking[start:stop] = True
    last = torch.arange(q_len) >= q_len - n
    meant = torch.zeros(q_len, dtype=torch.bool)
    for row, position in enumerate(i[:, 0].tolist()):
        meant[row] = 0 <= position < kv_len and bool(seen[position])
    for name, made, dense in (
        ("sink", grid.sink(n), (j < n) & everywhere),
        ("local", grid.local(n), near),
        ("diagonal", grid.diagonal(), i == j),
        ("keys", grid.keys(start, stop), seen & everywhere),
        ("queries", grid.queries(start, stop), asking[:, None] & everywhere),
        ("last_queries", grid.last_queries(n), last[:, None] & everywhere),
        ("tokens", grid.tokens(start, stop), meant[:, None] | seen & everywhere),
        ("reachable", grid.reachable(), (j <= i) if causal else everywhere),
        ("none", grid.none(), ~everywhere),
    ):
        assert made.shape == grid.shape
        assert torch.equal(made, blocks_of(dense, block_q, block_kv)), name


def test_a_mask_of_chosen_and_forced_blocks():
    q, k = normal(2, 500, 4, 16), normal(2, 500, 2, 16, seed=1)
    grid = BlockGrid.of(q, k, 64, 32, causal=True)
    chosen = top_k_blocks(block_scores(q, k, grid), 2)
    mask = grid.mask(chosen | grid.sink(10) | grid.diagonal())
    mask.validate()
    assert mask.shape == (2, 4, 500, 500)
    assert torch.equal(mask.blocks(), chosen | grid.sink(10) | grid.diagonal() & grid.reachable())
    joined = grid.mask(chosen) | grid.mask(grid.sink(10)) | grid.mask(grid.diagonal())
    assert torch.equal(joined.to_dense(), mask.to_dense())
    assert grid.mask(grid.sink(1)[None]).shape == (1, 1, 500, 500)


X = normal(1, 10, 2, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BlockGrid(-1, 5), ValueError, "q_len must be at least 0, got -1"),
        (
            lambda: BlockGrid(5, 5, 32),
            ValueError,
            "block_q must be 64 or 128, got 32",
        ),
        (lambda: BlockGrid(5, 5).sink(-1), ValueError, "n must be at least 0, got -1"),
        (lambda: BlockGrid(5, 5).local(-1), ValueError, "n must be at least 0, got -1"),
        (lambda: BlockGrid.of(X, X[0]), ValueError, r"k must have .*, got .*\[10, 2, 8\]"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
