"""MInference's block-sparse heads: the blocks with the largest scores of means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha._checks import check_int, plain_ints
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_lists import ABSENT, by_chunks, chunks, reached, reached_before
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_indices


@plain_ints
def minference_block_sparse(
    q: Tensor,
    k: Tensor,
    *,
    top_k: int = 100,
    causal: bool = True,
    block_q: int = 64,
    block_kv: int = 64,
) -> BlockMask:
    """Returns the block-sparse pattern of MInference, for each head and input.

        S[I, J] = mean of q over block I . mean of k over block J, J not above the diagonal;
        query block I sees the `top_k` key blocks with the largest S[I, J].

    Source: Jiang et al. 2024, "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via
    Dynamic Sparse Attention", arXiv:2407.02490, algorithm 3; defaults: blocks of 64, the top 100.
    No block is forced, not even the diagonal, so a query may see nothing. To force the diagonal,
    combine with `BlockGrid(...).mask(grid.diagonal())` by `|`. The mean of a shorter last block is
    over its tokens; the reference divides by the block size.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`.
        top_k: key blocks for each query block.
        causal: as in `BlockMask`.
        block_q, block_kv: block sizes of the mask.

    Returns:
        A mask with lists for each batch entry and query head, built without waiting for the device.
        All `nQ * nK` scores of blocks are computed, a few rows at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or size is not allowed.
    """
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=causal)
    return blocks_of_means(q, k, grid, check_int("top_k", top_k))


def blocks_of_means(
    q: Tensor,
    k: Tensor,
    grid: BlockGrid,
    top_k: int,
    *,
    forced: bool = False,
    shared: bool = False,
) -> BlockMask:
    """Lists the `top_k` key blocks of each query block by the products of block means.

    Args:
        forced: the first and the last block that a row may see come before all others.
        shared: one list for all heads, by the means over heads.
    """
    rows, columns = grid.shape
    block_q = grid.block_q
    sizes = (grid.q_len, grid.kv_len, block_q, grid.block_kv)
    width = min(top_k, columns)
    keys = pool_blocks(k, grid.block_kv)
    if shared:
        keys = keys.mean(2, keepdim=True)
    number = torch.arange(columns, device=q.device)
    ends = reached(*sizes, grid.causal, q.device)

    heads = 1 if shared else q.shape[2]
    parts = chunks(rows, q.shape[0] * heads * columns, q.device, 1 << 18)

    def chosen(part: slice) -> tuple[Tensor, Tensor]:
        queries = pool_blocks(q[:, part.start * block_q : part.stop * block_q], block_q)
        if shared:
            queries = queries.mean(2, keepdim=True)
        seen = columns if len(parts) <= 1 else reached_before(part.stop, *sizes, grid.causal)
        allowed = number[:seen] < ends[part, None]
        scores = pooled_scores(queries, keys[:, :seen], allowed=allowed)
        if forced:
            at = number[:seen]
            scores.masked_fill_(allowed & ((at == 0) | (at == ends[part, None] - 1)), torch.inf)
        counts, indices = top_k_indices(scores, width)
        return counts, pad(indices, (0, width - indices.shape[-1]), value=ABSENT)

    counts, indices = by_chunks(chosen, parts, rows, 2)
    return BlockMask(counts, indices, *sizes, causal=grid.causal)
