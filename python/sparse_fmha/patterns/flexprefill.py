"""FlexPrefill's query-aware branch: blocks that cover a share of the estimated probability."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_flag, check_number, plain_ints
from sparse_fmha._sizes import CACHED
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_lists import by_chunks, chunks, reached
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.selection import pool_blocks, pooled_scores, top_p_blocks


@plain_ints
def flexprefill_query_aware(
    q: Tensor,
    k: Tensor,
    *,
    gamma: float = 0.9,
    forced: bool = True,
    causal: bool = True,
    scale: float | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Returns the mask of a query-aware head of FlexPrefill.

        P = softmax over J of scale * mean of q over block I . mean of k over block J,
        the fewest pairs (I, J) of the whole map whose P add up to gamma * the number of rows.

    All rows of a head share one budget, so rows with spread probability take more blocks than
    others. Source: Lai et al. 2025, "FlexPrefill: A Context-Aware Sparse Attention Mechanism for
    Efficient Long-Sequence Inference", arXiv:2502.20766, section 3, query-aware index search;
    defaults of its code: blocks of 128, gamma 0.9. `flexprefill_mask` has the test that makes a
    head query-aware (tau) and the vertical-slash branch.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`.
        gamma: share of the probability, 0 to 1.
        forced: also take the first key block and the diagonal, as the released code does; without
            them a query may see nothing.
        causal, scale: as in `block_sparse_attention`.
        block_q, block_kv: block sizes of the mask.

    Returns:
        A mask with lists for each batch entry and query head, built without waiting for the device.
        Because of the shared budget, all `nQ * nK` scores of a head are in memory at once: about 6
        bytes per score on the CPU, about 40 on other devices, which sort them.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_number("gamma", gamma, 0, 1)
    check_flag("forced", forced)
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=causal)
    blocks = query_aware_blocks(q, k, grid, gamma, scale)
    if forced:
        blocks = blocks | grid.sink(1).logical_or_(grid.diagonal())
    return grid.mask(blocks)


def query_aware_blocks(
    q: Tensor, k: Tensor, grid: BlockGrid, gamma: float, scale: float | None
) -> Tensor:
    """Returns the blocks of the query-aware branch, bool `[B, Hq, nQ, nK]`."""
    block_q, block_kv, causal = grid.block_q, grid.block_kv, grid.causal
    keys, sizes = pool_blocks(k, block_kv), (grid.q_len, grid.kv_len, block_q, block_kv)
    number = torch.arange(grid.shape[1], device=q.device)
    ends = reached(*sizes, causal, q.device)

    def shares(part: slice) -> list[Tensor]:
        queries = pool_blocks(q[:, part.start * block_q : part.stop * block_q], block_q)
        allowed = number < ends[part, None]
        return [pooled_scores(queries, keys, scale=scale, allowed=allowed, softmax=True)]

    parts = chunks(grid.shape[0], q.shape[0] * q.shape[2] * grid.shape[1], q.device, CACHED)
    (scores,) = by_chunks(shares, parts, grid.shape[0], 2)
    rows = (ends > 0).sum()  # with fewer keys than queries, some rows see no key
    return top_p_blocks(scores.flatten(2), gamma * rows.double()).view(scores.shape)
