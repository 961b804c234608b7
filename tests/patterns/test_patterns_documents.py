"""Packed documents with windows and sinks against their definition, token by token."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_fmha import BlockMask, StripeMask, patterns, reference, stripe_attention

SIZES = st.lists(st.integers(0, 5) | st.integers(0, 300), max_size=9)
TILES = st.sampled_from([(64, 64), (128, 128), (64, 16), (128, 32), (64, 128)])
WINDOWS = st.integers(1, 10) | st.integers(1, 400)
SINKS = st.integers(0, 5) | st.integers(0, 300)


def starts(sizes):
    return torch.tensor([0, *sizes]).cumsum(0).int()


def visible(sizes, window, sink, causal, flagged=False):
    """Bool [T, T]; with `flagged` also what the mask's causal flag hides."""
    lengths = torch.tensor(sizes, dtype=torch.int64)
    document = torch.arange(len(sizes)).repeat_interleave(lengths)
    first = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    tokens = torch.arange(len(document))
    distance = tokens[:, None] - tokens
    seen = ((distance if causal else distance.abs()) < window) | (tokens - first < sink)
    seen &= document[:, None] == document
    return seen & (distance >= 0) if causal and not flagged else seen


@settings(max_examples=150)
@given(SIZES, TILES, WINDOWS, SINKS, st.booleans())
@example([1000], (128, 128), 128, 4, True)
@example([1000], (64, 16), 128, 200, False)
@example([], (64, 64), 3, 1, True)
@example([0, 0], (64, 64), 3, 1, False)
@example([1] * 200, (64, 64), 2, 1, False)
def test_it_is_the_token_mask(sizes, tiles, window, sink, causal):
    cu, (block_q, block_kv) = starts(sizes), tiles
    options = {"window": window, "sink": sink, "causal": causal}
    options |= {"block_q": block_q, "block_kv": block_kv}
    mask = patterns.documents(cu, **options)
    bounded = patterns.documents(cu, **options, length=sum(sizes))
    wanted = visible(sizes, window, sink, causal)
    for made in (mask, bounded):
        made.validate()
        assert made.causal is causal
        assert torch.equal(made.to_dense()[0, 0], wanted)
    # Whatever is visible but for causality is full; the flag says the rest.
    exact = BlockMask.from_dense(visible(sizes, window, sink, causal, flagged=True), *tiles)
    lengths = mask.shape[2:]
    full = BlockMask.from_indices(exact.counts, exact.indices, *lengths, *tiles, causal=causal)
    assert torch.equal(
        full.blocks(), BlockMask(mask.counts, mask.indices, *lengths, *tiles).blocks()
    )


def test_without_a_window_it_is_from_documents():
    cu = starts([100, 0, 300, 57])
    mask = patterns.documents(cu, causal=False)
    assert torch.equal(mask.to_dense(), BlockMask.from_documents(cu).to_dense())
    bounded = patterns.documents(cu, length=457, max_len=300)
    assert torch.equal(bounded.to_dense(), BlockMask.from_documents(cu, causal=True).to_dense())


def test_lists_do_not_grow_with_the_documents():
    mask = patterns.documents(starts([1 << 14, 1 << 14]), window=256, sink=4)
    assert mask.indices.shape[-1] == 2
    assert mask.partial_indices.shape[-1] == 2


def test_the_window_shrinks_at_borders_as_flash_attention_does():
    mask = patterns.documents(starts([10]), window=3, causal=False).to_dense()[0, 0]
    assert mask.sum(-1).tolist() == [3, 4, 5, 5, 5, 5, 5, 5, 4, 3]


@settings(max_examples=20)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=6), st.integers(0, 1000))
def test_stripes_are_cut_at_documents_by_thresholds_of_rows(sizes, seed):
    """The recipe of docs/packed.md: an addition that is the same for all that a row sees."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(sizes)
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    groups = -(-tokens // 64)
    order = torch.rand(1, 2, groups, tokens, generator=generator).argsort(-1)
    columns = order[..., : tokens // 2 + 1].sort(-1).values.int()
    counts = torch.full((1, 2, groups), columns.shape[-1], dtype=torch.int32)
    mask = StripeMask(columns, counts, tokens, tokens, 64, causal=True)
    q, k, v = (torch.randn(1, tokens, 2, 16, generator=generator).double() for _ in range(3))
    bias = document.float()[None, None] * 2**-20
    out, lse = stripe_attention(q, k, v, mask, key_bias=bias, row_threshold=bias, return_lse=True)
    seen = mask.to_dense() & (document[:, None] == document)
    exact, exact_lse = reference.attention(q, k, v, seen)
    torch.testing.assert_close(out, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse - bias.mT, exact_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"sink": 4}, ValueError, "sink must be 0 without a window, which hides no key, got 4"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 3, "sink": -1}, ValueError, "sink must be at least 0, got -1"),
        ({"window": 3.0}, TypeError, "window must be an int, got 3.0"),
        ({"window": 3, "block_q": 32}, ValueError, "block_q must be .*, got 32"),
        (
            {"window": 3, "length": 6, "validate": True},
            ValueError,
            r"length must be cu\[-1\], 5, got 6",
        ),
        (
            {"window": 3, "max_len": 2},
            ValueError,
            "max_len must be at least the longest document in cu, 3 tokens, got 2",
        ),
        (
            {"window": 3, "cu": torch.zeros(2)},
            TypeError,
            "cu must have .*dtype.*, got torch.float32",
        ),
        (
            {"window": 3, "cu": starts([5, -2])},
            ValueError,
            r"cu must not descend, got cu\[1\] = 5 and cu\[2\] = 3",
        ),
    ],
)
def test_errors(arguments, error, words):
    arguments = {"cu": starts([2, 3])} | arguments
    with pytest.raises(error, match=words):
        patterns.documents(arguments.pop("cu"), **arguments)
