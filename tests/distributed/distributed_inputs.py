"""Inputs of the cases, the same on every rank, and how a rank compares its part."""

import torch
from block_masks import Drawn

import sparse_fmha
from sparse_fmha import BlockGrid, StripeMask

LENGTH = 512


def qkv(heads=8, heads_kv=4, *, batch=2, length=LENGTH, length_kv=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads)
    length_kv = length_kv or length
    shapes = (length, heads), (length_kv, heads_kv), (length_kv, heads_kv)
    return [
        torch.randn(batch, tokens, n, 16, generator=generator).to(dtype) for tokens, n in shapes
    ]


def skipped_qkv():
    """The last keys outweigh others, so that a threshold leaves tiles out."""
    q, k, v = qkv(batch=4)
    q[..., 0] = k[:, -64:, :, 0] = 8
    assert (
        sparse_fmha.attention(q, k, v, skip_threshold=0.3, return_stats=True)[1].skipped > 0
    ).all()
    return q, k, v


def block_mask(batch=1, heads=8, *, causal=False, block_q=64, block_kv=32, length_kv=LENGTH):
    sizes = LENGTH, length_kv, block_q, block_kv
    return Drawn(*sizes, batch=batch, heads=heads, causal=causal, seed=heads).mask()


def stripe_mask(batch=1, heads=8, *, causal=False):
    generator = torch.Generator().manual_seed(heads)
    groups = LENGTH // 64
    seen = torch.rand(batch, heads, groups, LENGTH, generator=generator) < 0.2
    seen[..., 128:192] = False  # there the runs may be
    listed = StripeMask.from_columns(seen, LENGTH, 64)
    starts = torch.randint(128, 129, (batch, heads, groups, 1), generator=generator).int()
    counts = torch.randint(0, 2, (batch, heads, groups), generator=generator).int()
    mask = StripeMask(
        listed.columns, listed.counts, LENGTH, LENGTH, 64, starts, counts, causal=causal
    )
    mask.validate()
    return mask


def top_blocks(q, k):
    """A causal mask that depends on the values."""
    grid = BlockGrid.of(q, k, 64, 64, causal=True)
    scores = sparse_fmha.selection.block_scores(q, k, grid)
    return grid.mask(sparse_fmha.selection.top_k_blocks(scores, 2) | grid.diagonal())


def agrees(ranks, call, function, tensors, mask=None, shard=None, tolerance=(1e-5, 1e-6), **kw):
    """call on this rank's parts gives this rank's parts of function on the whole."""
    shard = shard or ranks.part
    arguments = () if mask is None else (mask,)
    whole = function(*tensors, *arguments, return_lse=True, **kw.pop("whole", kw))
    parts = call(*(shard(x) for x in tensors), mask=mask, return_lse=True, **kw)
    for part, expected in zip(parts, whole, strict=True):
        assert part.dtype == expected.dtype
        assert part.is_contiguous()
        rtol, atol = tolerance
        torch.testing.assert_close(part, shard(expected), rtol=rtol, atol=atol)
        assert expected.isfinite().any()
