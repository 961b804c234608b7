"""Stripes as block lists over copies of keys: what blocks are seen, and parts of a call."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

_C = pytest.importorskip("sparse_fmha._C")
BLOCK = 128


@given(
    len_q=st.integers(1, 700),
    len_kv=st.integers(1, 900),
    causal=st.booleans(),
    rows=st.sampled_from([64, 128]),
    step=st.integers(0, 10),
    keep=st.randoms(use_true_random=False),
)
def test_blocks_that_rows_see(len_q, len_kv, causal, rows, step, keep):
    first_row = step * rows % len_q // rows * rows
    share = keep.choice([0.05, 0.5, 1.0])
    tokens = [token for token in range(len_kv) if keep.random() < share]
    full, partial = _C.gathered_blocks(len_q, len_kv, causal, rows, first_row, tokens)
    assert len(partial) <= (3 if causal else 1)  # most_partial()
    for block, first in enumerate(range(0, len(tokens), BLOCK)):
        listed = tokens[first : first + BLOCK]
        seen = [
            not causal or token <= row + len_kv - len_q
            for row in range(first_row, min(first_row + rows, len_q))
            for token in listed
        ]
        whole = all(seen) and len(listed) == BLOCK
        assert (block in full, block in partial) == (whole, any(seen) and not whole)


BUDGET = 1 << 31


@given(
    batch=st.integers(1, 9),
    heads_kv=st.integers(1, 30),
    ratio=st.integers(1, 4),
    head_dim=st.sampled_from([64, 128, 256]),
    copies=st.integers(1, 1 << 22),
    shared=st.booleans(),
)
def test_parts_of_a_call(batch, heads_kv, ratio, head_dim, copies, shared):
    parts = _C.gathered_parts(batch, heads_kv * ratio, heads_kv, head_dim, copies, shared)
    met = [
        (entry, head)
        for first_batch, entries, first_head, heads in parts
        for entry in range(first_batch, first_batch + entries)
        for head in range(first_head, first_head + heads)
    ]
    assert sorted(met) == [(entry, head) for entry in range(batch) for head in range(heads_kv)]
    assert len(met) == len(set(met))
    # Keys and values of 16 bits, and their gradients.
    of_head = -(-copies // BLOCK) * BLOCK * head_dim * 2 * 2 * 2 * (1 if shared else ratio)
    for _, entries, _, heads in parts:
        assert heads == heads_kv or entries == 1
        assert entries * heads == 1 or entries * heads * of_head <= BUDGET


@pytest.mark.parametrize(
    ("block_q", "listed", "len_kv", "gathered"),
    [
        (512, 3276, 32768, True),
        (512, 28000, 32768, True),
        (512, 29000, 32768, False),
        (128, 8900, 32768, True),
        (128, 9000, 32768, False),
        (64, 4600, 32768, True),
        (64, 4700, 32768, False),
        (64, 0, 1, True),
    ],
)
def test_where_keys_are_copied(block_q, listed, len_kv, gathered):
    assert (_C.tiles.why_not_gathered(block_q, listed, len_kv) is None) == gathered
