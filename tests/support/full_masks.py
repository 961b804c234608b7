"""Lists that show every pair that causal attention does."""

import torch

import sparse_fmha
from sparse_fmha import BlockMask, StripeMask


def block_sparse(q, k, v, **options):
    blocks = (-(-x.shape[1] // 64) for x in (q, k))
    seen = torch.ones(1, 1, *blocks, dtype=torch.bool)
    mask = BlockMask.from_blocks(seen, q.shape[1], k.shape[1], 64, 64, causal=True)
    return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)


def stripe(q, k, v, **options):
    seen = torch.ones(1, 1, -(-q.shape[1] // 64), k.shape[1], dtype=torch.bool)
    mask = StripeMask.from_columns(seen, q.shape[1], 64, causal=True, width=k.shape[1])
    return sparse_fmha.stripe_attention(q, k, v, mask, **options)
