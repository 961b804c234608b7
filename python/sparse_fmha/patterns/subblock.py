"""Block top-k by scores of smaller pieces of blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha._checks import check_int, plain_ints
from sparse_fmha._sizes import CACHED
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_lists import by_chunks, chunks
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._maps import map_like
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_blocks
from sparse_fmha.selection.choosing import shares_of


@plain_ints
def subblock(
    q: Tensor,
    k: Tensor,
    *,
    keep: float | Sequence[float] = 0.25,
    piece: int = 16,
    forced: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 64,
    block_kv: int = 64,
) -> BlockMask:
    """Returns the mask of the blocks with the largest sums of exponentials over their pieces.

        score of blocks I, J = log of the sum over pieces i of I and j of J
                               of exp(scale * mean of q over i . mean of k over j)

    Pieces are `piece` tokens. A row takes the share `keep` of its blocks that are not forced,
    rounded up, those with the largest scores, and the forced ones. One piece of a block that
    matters counts, where the mean of the whole block would hide it.

    Source: the backend "subblock sparse" of SGLang for MiniMax-H3: blocks of 64 in pieces of 16,
    a quarter kept, the first 10 of 50 steps dense. There, the number of blocks is rounded up to a
    multiple of 8, and the top-k is approximate.

    Args:
        q: `[B, Lq, Hq, D]`. k: `[B, Lkv, Hkv, D]`.
        keep: 0 to 1; a sequence has one for each head of q. piece: divides both block sizes.
        forced: bool map that broadcasts to `[B, Hq, nQ, nK]`, such as `BlockGrid.tokens` for text.
        causal, scale, block_q, block_kv: as in `block_sparse_attention`. Pieces above the diagonal
            have no part in scores.

    Returns:
        A mask with lists for each batch entry and head, built without waiting for the device, a few
        rows of blocks at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=causal)
    always = grid.none().expand(q.shape[0], q.shape[2], -1, -1)
    shares_of("keep", keep, always)
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size % check_int("piece", piece, 1):
            raise ValueError(f"piece must divide {name} = {size}, got {piece}")
    rows, columns = grid.shape
    in_q, in_k = block_q // piece, block_kv // piece
    if forced is not None:
        always = map_like("forced", forced, always)
    shift = grid.kv_len - grid.q_len
    with torch.no_grad():
        keys = pool_blocks(k, piece)
        there_k = keys.shape[1]
        keys = pad(keys, (0, 0, 0, 0, 0, -there_k % in_k))  # to whole blocks; scores are larger
        first_key = torch.arange(keys.shape[1], device=q.device) * piece

        def choose(part: slice) -> list[Tensor]:
            own = q[:, part.start * block_q : part.stop * block_q]
            pooled = pool_blocks(own, piece)
            there_q = pooled.shape[1]
            pooled = pad(pooled, (0, 0, 0, 0, 0, -there_q % in_q))
            number = torch.arange(pooled.shape[1], device=q.device)
            last = (part.start * block_q + (number + 1) * piece).clamp(max=grid.q_len) - 1
            allowed = first_key <= (last + shift)[:, None] if causal else None
            found = pooled_scores(pooled, keys, scale=scale, allowed=allowed)
            found[..., there_k:].fill_(-torch.inf)
            found[:, :, there_q:].fill_(-torch.inf)
            found = found.unflatten(3, (columns, in_k)).unflatten(2, (-1, in_q)).logsumexp((3, 5))
            kept = always[:, :, part]
            return [top_k_blocks(found.masked_fill(kept, -torch.inf), density=keep) | kept]

        one_row = q.shape[0] * q.shape[2] * in_q * keys.shape[1]
        (blocks,) = by_chunks(choose, chunks(rows, one_row, q.device, CACHED), rows, 2)
    return grid.mask(blocks)
