"""Selection of key blocks by scores of pooled queries and keys.

    scores = pooled_scores(pool_blocks(q, 128), pool_blocks(k, 128), allowed=grid.reachable())
    mask = grid.mask(top_k_blocks(scores, 16) | grid.sink(64) | grid.diagonal())

Scoring blocks by products of their means is from MInference (Jiang et al. 2024, arXiv:2407.02490,
algorithm 3). Taking blocks until they cover a share of the probability is from FlexPrefill (Lai et
al. 2025, arXiv:2502.20766, section 3).

No function waits for the device or has shapes that depend on data, so a CUDA graph can capture
everything from q and k to the mask. Token-level scores are never stored: the largest tensors are
the pooled scores `[B, H, nQ, nK]` and temporaries of bounded size.
"""

from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.selection.choosing import top_k_blocks, top_k_indices, top_p_blocks
from sparse_fmha.selection.pooling import block_scores, pool_blocks, pooled_scores

__all__ = [
    "BlockGrid",
    "block_scores",
    "pool_blocks",
    "pooled_scores",
    "top_k_blocks",
    "top_k_indices",
    "top_p_blocks",
]
