"""Masks of packed documents against their definition, token by token."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from sparse_fmha import BlockMask

SIZES = st.lists(st.integers(0, 5) | st.integers(0, 300), max_size=9)
TILES = st.sampled_from([(64, 64), (128, 128), (64, 16), (128, 32), (64, 128)])


def starts(sizes):
    return torch.tensor([0, *sizes]).cumsum(0).int()


def visible(sizes, causal):
    """Bool [T, T]."""
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))
    seen = document[:, None] == document
    return seen.tril() if causal else seen


@given(SIZES, TILES, st.booleans(), st.integers(0, 200))
@example([128, 128, 256], (128, 128), False, 0)
@example([], (64, 64), True, 0)
@example([0, 0], (64, 64), True, 0)
@example([1] * 300, (64, 64), False, 0)
def test_it_is_the_token_mask(sizes, tiles, causal, more):
    cu = starts(sizes)
    mask = BlockMask.from_documents(cu, *tiles, causal)
    bounded = BlockMask.from_documents(
        cu, *tiles, causal, length=sum(sizes), max_len=max(sizes, default=0) + more
    )
    for made in (mask, bounded):
        made.validate()
        assert made.causal is causal
        assert torch.equal(made.to_dense()[0, 0], visible(sizes, causal))
    for name in ("counts", "partial_counts"):  # as many of each kind; a bound is only wider
        exact, wide = (getattr(made, name) for made in (mask, bounded))
        assert (exact is None and (wide is None or not wide.any())) or torch.equal(exact, wide)


@given(SIZES, TILES, st.booleans())
def test_blocks_are_full_wherever_all_is_visible(sizes, tiles, causal):
    """No bitmask says what a full block or the causal flag could."""
    mask = BlockMask.from_documents(starts(sizes), *tiles, causal)
    exact = BlockMask.from_dense(visible(sizes, False)[None, None], *tiles)
    reachable = exact.blocks()
    if causal:
        reachable = BlockMask.from_blocks(reachable, *mask.shape[2:], *tiles, causal=True).blocks()
    assert torch.equal(mask.blocks(), reachable)
    full = BlockMask(exact.counts, exact.indices, *mask.shape[2:], *tiles).blocks() & reachable
    assert torch.equal(BlockMask(mask.counts, mask.indices, *mask.shape[2:], *tiles).blocks(), full)


def test_lists_are_no_wider_than_the_fullest_row():
    mask = BlockMask.from_documents(starts([1024] * 16), 128, 128, True)
    assert mask.indices.shape == (1, 1, 128, 8)
    assert mask.partial_bits is None
    mask = BlockMask.from_documents(starts([1000] * 16), 128, 128, True)
    assert mask.partial_indices.shape[-1] == mask.partial_counts.max()


def test_without_reading_on_a_device_that_cannot_be_read():
    cu = starts([100, 200]).to("meta")
    mask = BlockMask.from_documents(cu, length=300, max_len=200)
    assert mask.device.type == mask.partial_bits.device.type == "meta"
    assert mask.shape == (1, 1, 300, 300)


@pytest.mark.parametrize(
    ("cu", "options", "error", "message"),
    [
        ([0, 3], {}, TypeError, "cu must be a tensor, got list"),
        (torch.tensor([0, 3]), {}, TypeError, "cu must have dtype torch.int32, got torch.int64"),
        (starts([3])[None], {}, ValueError, r"cu must have shape \[documents \+ 1\], got \[1, 2\]"),
        (starts([3])[:0], {}, ValueError, r"cu must have .*, got .*\[0\]"),
        (starts([3]) + 1, {}, ValueError, r"cu\[0\] must be 0, got 1"),
        (
            starts([3, -1, 2]),
            {},
            ValueError,
            r"cu must not descend, got cu\[1\] = 3 and cu\[2\] = 2",
        ),
        (starts([3]), {"length": 4}, ValueError, r"length must be cu\[-1\], 3, got 4"),
        (
            starts([3]),
            {"max_len": 2},
            ValueError,
            "max_len must be at least the longest document in cu, 3 tokens, got 2",
        ),
        (
            starts([3]),
            {"length": 4, "max_len": 4, "validate": True},
            ValueError,
            r"length must be cu\[-1\], 3, got 4",
        ),
        (starts([3]), {"length": -1}, ValueError, "length must be at least 0, got -1"),
        (starts([3]), {"max_len": 1.5}, TypeError, "max_len must be an int, got 1.5"),
        (starts([3]), {"block_q": 32}, ValueError, "block_q must be .*, got 32"),
        (starts([3]), {"causal": 1}, TypeError, "causal must be True or False, got 1"),
    ],
)
def test_bad_arguments(cu, options, error, message):
    with pytest.raises(error, match=message):
        BlockMask.from_documents(cu, **options)
