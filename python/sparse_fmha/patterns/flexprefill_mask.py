"""FlexPrefill: for each head the query-aware or the vertical-slash branch, chosen by the input."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha import _checks
from sparse_fmha._checks import check_int, check_number, plain_ints
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns.flexprefill import query_aware_blocks
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_blocks, top_p_blocks
from sparse_fmha.selection.reductions import reductions


@torch.no_grad()
@plain_ints
def flexprefill_mask(
    q: Tensor,
    k: Tensor,
    *,
    gamma: float = 0.9,
    tau: float = 0.1,
    min_budget: int = 1,
    max_budget: int | None = None,
    scale: float | None = None,
    block: int = 128,
) -> BlockMask:
    """Returns the causal mask of FlexPrefill, for each head and input.

        A = softmax of the last `block` queries over the keys they may see,
        a, g = column and diagonal sums of A, divided by the number of queries,
        e[J] = softmax over J of scale * mean of the last queries . mean of k over block J,
        d = sqrt of the Jensen-Shannon divergence of e and of a summed in blocks.

    A head with d < tau is query-aware: `flexprefill_query_aware`. Any other is vertical-slash: it
    takes the `n_a // block + 1` blocks of columns and the `n_g // block + 1` blocks of diagonals
    with the largest sums, where n_a and n_g are how many entries of a and of g it takes to add up
    to gamma; query block I then sees key block J iff J is among the former or I - J among the
    latter. The first column block and the diagonal block are always taken. Source: Lai et al. 2025,
    "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    arXiv:2502.20766, algorithms 1 to 4; defaults of its code. The code divides n_a and n_g by 128
    whatever the block, and counts blocks of diagonals from the far end; here from the near one,
    which is the same for lengths that are multiples of the block. Its switch to dense attention for
    two blocks or less is not included.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`, Lkv - Lq a multiple of
            `block`, at least 0.
        gamma: share of the probability, 0 to 1.
        tau: 0 makes all heads vertical-slash; sqrt(ln 2) = 0.83 is the largest distance.
        min_budget, max_budget: bounds of the numbers of blocks of columns and of diagonals.
        scale: scale of q.k; default `D**-0.5`.
        block: 64 or 128, of queries and keys.

    Returns:
        A mask with lists for each batch entry and query head, built without waiting for the device.
        Memory is that of `flexprefill_query_aware`, whose scores are computed for all heads, and of
        `score_sums`.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    gamma, tau = check_number("gamma", gamma, 0, 1), check_number("tau", tau, 0, 1)
    check_int("min_budget", min_budget, 1)
    if max_budget is not None:
        check_int("max_budget", max_budget, min_budget)
    grid = BlockGrid.of(q, k, block, block, causal=True)
    shift, columns = grid.kv_len - grid.q_len, grid.shape[1]
    if shift < 0 or shift % block:
        raise ValueError(
            f"k must have the {grid.q_len} tokens of q and a multiple of block = {block} more, got "
            f"{grid.kv_len}"
        )
    scale = _checks.finite("scale", scale)
    if not q.numel():
        return grid.mask(grid.none().expand(q.shape[0], q.shape[2], -1, -1))
    last = min(block, grid.q_len)
    sums = reductions(q, k, ("columns", "diagonals"), rows=last, causal=True, scale=scale)
    pools, budgets = [], []
    for own in sums:
        shares = own / last
        number = top_p_blocks(shares, gamma).sum(-1) // block + 1
        budgets.append(number.clamp(min_budget, max_budget)[..., None])
        pools.append(pad(shares, (0, -grid.kv_len % block)).unflatten(-1, (-1, block)).sum(-1))
    queries = pool_blocks(q[:, -last:], last)
    estimate = pooled_scores(queries, pool_blocks(k, block), scale=scale, softmax=True)[:, :, 0]
    aware = _distance(estimate, pools[0]) < tau
    for pool in pools:
        pool[..., 0].fill_(torch.inf)
    vertical, slash = (
        top_k_blocks(pool, budget) for pool, budget in zip(pools, budgets, strict=True)
    )
    row = torch.arange(grid.shape[0], device=q.device)[:, None] + shift // block
    back = row - torch.arange(columns, device=q.device)
    lines = slash[..., back.clamp(min=0)] | vertical[..., None, :]
    forced = grid.sink(1).logical_or_(grid.diagonal())
    blocks = query_aware_blocks(q, k, grid, gamma, scale) | forced
    return grid.mask(torch.where(aware[..., None, None], blocks, lines))


def _distance(p: Tensor, q: Tensor) -> Tensor:
    """Returns the square root of the Jensen-Shannon divergence along the last dimension."""
    mean = ((p + q) / 2).clamp(min=torch.finfo(torch.float32).tiny)
    both = torch.xlogy(p, p / mean) + torch.xlogy(q, q / mean)
    return (both.sum(-1) / 2).clamp(min=0).sqrt()
