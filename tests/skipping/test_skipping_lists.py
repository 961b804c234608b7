"""Softmax skipping with lists of blocks and stripes: which tiles the reference skips, too."""

import dataclasses

import block_masks
import pytest
import torch
from skip_cases import check, inputs, rows
from skip_lists import block_tiles, stripe_tiles

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask


@pytest.mark.parametrize("blocks", [(64, 16), (64, 128), (128, 32), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("threshold", "dim", "tile_k"), [(1e-3, 128, 128), (0.3, 96, 128), (0.3, 136, 32)]
)
def test_block_sparse(threshold, dim, tile_k, causal, blocks):
    drawn = block_masks.Drawn(450, 600, *blocks, 2, 2, causal, kinds=(0.3, 0.5, 0.2))
    mask, visible = drawn.mask(), drawn.dense()
    q, k, v = inputs(450, 600, heads=2, heads_kv=1, dim=dim)
    for b in range(2):
        one = dataclasses.replace(drawn, seed=0)
        tiles = torch.stack([block_tiles(mask, b, h, tile_k) for h in range(2)])
        part = BlockMask(
            *(mask.counts[b : b + 1], mask.indices[b : b + 1], *one.sizes),
            causal=causal,
            partial_counts=mask.partial_counts[b : b + 1],
            partial_indices=mask.partial_indices[b : b + 1],
            partial_bits=mask.partial_bits[b : b + 1],
        )
        given = (x[b : b + 1] for x in (q, k, v))
        stats = check(
            sparse_fmha.block_sparse_attention, *given, visible[b : b + 1], rows(450), tiles,
            threshold, part,
        )  # fmt: skip
        if threshold == 0.3:
            assert (stats.skipped > 0).any()


@pytest.mark.parametrize("range_size", [None, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("threshold", "dim", "tile_k"), [(1e-3, 128, 128), (0.3, 96, 128), (0.3, 136, 32)]
)
def test_stripe(threshold, dim, tile_k, causal, range_size):
    generator = torch.Generator().manual_seed(1)
    length, groups = 600, 3
    columns = torch.stack([torch.randperm(300, generator=generator)[:250] for _ in range(groups)])
    columns = columns.sort(-1).values.int()[None, None]
    counts = torch.tensor([250, 170, 3]).int()[None, None]
    ranges = {}
    if range_size is not None:
        starts = torch.tensor([[301, 440, -1], [310, -1, -1], [470, 300, 380]]).int()
        if range_size == 128:
            starts[:, 2:] = -1
        number = (starts >= 0).sum(-1).int()
        ranges = dict(range_starts=starts[None, None], range_counts=number[None, None])
    mask = StripeMask(
        columns, counts, length, length, 256, causal=causal, range_size=range_size or 64, **ranges
    )
    q, k, v = inputs(length, dim=dim)
    tiles = stripe_tiles(mask, 0, 0, tile_k)[None]
    stats = check(
        sparse_fmha.stripe_attention, q, k, v, mask.to_dense(), rows(length),
        tiles, threshold, mask,
    )  # fmt: skip
    if threshold == 0.3:
        assert (stats.skipped > 0).any()
