"""Block masks of packed sequences against their definition, token by token."""

import pytest
import torch
from drawn_packed import PACKED
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_cases import Packed

from sparse_fmha import BlockMask
from sparse_fmha.masks import packed
from sparse_fmha.masks.packed import EVERYTHING, Window

TILES = st.sampled_from([(64, 64), (128, 128), (64, 16), (128, 32), (64, 128)])
WINDOWS = st.sampled_from([EVERYTHING]) | st.builds(
    Window, st.integers(-1, 150), st.integers(-1, 150)
)


def visible(case, own, window):
    """Bool [Tq, Tk]; `own`: the keys of each sequence by which lengths."""
    seen = torch.zeros(case.tokens(0), case.tokens(own), dtype=torch.bool)
    for b, (q_len, k_len, used) in enumerate(case.lengths):
        keys = used if case.counts_used else (q_len if own == 0 else k_len)
        row, key = int(case.starts(0)[b]), int(case.starts(own)[b])
        apart = torch.arange(keys) - torch.arange(q_len)[:, None] - (keys - q_len)
        pairs = torch.ones(q_len, keys, dtype=torch.bool)
        if window.left >= 0:
            pairs &= apart >= -window.left
        if window.right >= 0:
            pairs &= apart <= window.right
        if case.causal:
            pairs &= apart <= 0
        seen[row : row + q_len, key : key + keys] = pairs
    return seen


def masked(case, own, window, tiles, more=0):
    """The mask, and which pairs there should be."""
    starts = case.starts(0)
    used = None
    if case.counts_used:
        used = torch.tensor([x[2] for x in case.lengths], dtype=torch.int32)
    sequences = packed.sequences_of(
        starts, starts if own == 0 else case.starts(1), used, case.tokens(0), case.tokens(own)
    )
    bounds = [max((x[place] for x in case.lengths), default=0) + more for place in (0, own)]
    parts = packed.block_mask(sequences, *bounds, case.causal, window, *tiles)
    return BlockMask(**vars(parts)), visible(case, own, window)


def shared(case):
    """A case whose keys are where the queries are."""
    return Packed(
        tuple((n, n, n) for n, *_ in case.lengths), case.before, case.after, causal=case.causal
    )


@settings(max_examples=150)
@given(PACKED, TILES, WINDOWS, st.booleans(), st.sampled_from([0, 90]))
@example(Packed(lengths=((1, 1, 1),) * 300), (64, 64), EVERYTHING, True, 0)
@example(Packed(lengths=((128, 128, 128),) * 3), (128, 128), EVERYTHING, True, 0)
@example(Packed(lengths=((500, 700, 700),), causal=True), (128, 16), EVERYTHING, False, 0)
@example(Packed(lengths=((700, 300, 300),), causal=True), (64, 16), Window(70, -1), False, 0)
@example(Packed(lengths=((300, 700, 700),), before=3, after=1), (64, 64), EVERYTHING, False, 0)
@example(  # a query block from the last token of a longest sequence to the first of another one
    Packed(lengths=((100, 100, 100), (62, 62, 62), (100, 100, 100)), before=29),
    (64, 16),
    EVERYTHING,
    True,
    0,
)
def test_it_is_the_token_mask(case, tiles, window, one_start, more):
    case = shared(case) if one_start else case
    mask, expected = masked(case, 0 if one_start else 1, window, tiles, more)
    mask.validate()
    held = case.held()
    assert torch.equal(mask.to_dense()[0, 0][held], expected[held])


def test_blocks_are_full_wherever_all_queries_see_them():
    case = Packed(lengths=((200, 640, 640), (300, 256, 256)), before=40, after=100)
    mask, expected = masked(case, 1, EVERYTHING, (64, 64))
    expected[~case.held()] = True
    exact = BlockMask.from_dense(expected, 64, 64)
    full = BlockMask(mask.counts, mask.indices, *mask.shape[2:], 64, 64).blocks()
    held = case.held()[: mask.blocks_q * 64 : 64]
    wanted = BlockMask(exact.counts, exact.indices, *mask.shape[2:], 64, 64).blocks()
    assert torch.equal(full[..., held, :], wanted[..., held, :])


@pytest.mark.parametrize(
    ("case", "own", "most"),
    [
        (Packed(lengths=((4096, 4096, 4096),)), 1, 2),
        (Packed(lengths=((4096, 4096, 4096),), causal=True), 1, 3),
        (Packed(lengths=((128, 128, 128),) * 32, causal=True), 0, 3),
    ],
    ids=["one sequence", "one causal sequence", "many"],
)
def test_lists_of_partial_blocks_are_short(case, own, most):
    """Their bitmasks would be as large as a dense mask else."""
    mask, _ = masked(case, own, EVERYTHING, (128, 128))
    assert mask.partial_indices.shape[-1] <= most
