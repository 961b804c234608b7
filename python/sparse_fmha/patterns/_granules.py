"""Block masks from maps of small runs of keys ("granules"), such as pooled keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_checks import BLOCKS_KV
from sparse_fmha.masks.block_mask import BlockMask


def pooled_tokens(x: Tensor, size: int) -> Tensor:
    """Returns the means of `size` tokens each, in the dtype of x; tokens that are left are dropped.

    Like `pool_blocks`, but fp64 stays fp64.
    """
    whole = x.shape[1] // size
    if size == 1:
        return x
    runs: Tensor = x[:, : whole * size].unflatten(1, (whole, size))
    with without_autocast(x.device):
        wide = torch.promote_types(x.dtype, torch.float32)
        return runs.mean(2, dtype=wide).to(x.dtype)


def granule_mask(
    listed: Tensor,
    granule: int,
    q_len: int,
    block_q: int,
    *,
    block_kv: int | None = None,
    limits: Tensor | None = None,
    spread: int = 0,
) -> BlockMask:
    """Returns the mask of the listed granules, in blocks of one or more of them.

    Args:
        listed: bool `[B|1, H|1, nQ, n]`, the granules that each query block sees.
        granule: keys per granule, a power of two up to 128.
        block_kv: key blocks of the mask, a multiple of granule; default the smallest one.
        limits: int64 `[nQ * block_q]`, row i sees only keys below `limits[i]`; ascending.
        spread: the most by which limits of one query block differ.

    Returns:
        A mask of `q_len` queries and `n * granule` keys, built without waiting for the device.
        Granules below 16 keys, and limits, take bitmasks.
    """
    if block_kv is None:
        block_kv = max(granule, BLOCKS_KV[0])
    per = block_kv // granule
    lead, n = listed.shape[:3], listed.shape[3]
    kv_len, blocks = n * granule, ceil_div(n, per)
    sizes = (q_len, kv_len, block_q, block_kv)
    if per == 1 and limits is None:
        return BlockMask.from_blocks(listed, *sizes)
    missing = blocks * per - n
    grouped: Tensor = torch.nn.functional.pad(listed, (0, missing)).unflatten(-1, (blocks, per))
    some = grouped.any(-1)
    there = torch.arange(blocks * per, device=listed.device).view(blocks, per) < n
    whole = (grouped | ~there).all(-1)
    width = blocks
    rows = None
    if limits is not None:
        rows = limits.view(-1, block_q)
        first = torch.arange(blocks, device=listed.device) * block_kv
        some = some & (first < rows[:, -1:])
        whole &= (first + block_kv).clamp(max=kv_len) <= rows[:, :1]
        if per == 1:
            width = min(ceil_div(spread, block_kv) + 1, blocks)
    partial = some & ~whole

    def lists(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        counts, indices = block_lists.list_blocks(partial[:, :, part], width)
        taken = indices.clamp(min=0).long()
        seen = grouped[:, :, part].gather(3, taken[..., None].expand(*taken.shape, per))
        seen = seen[..., None].expand(*seen.shape, granule).flatten(-2)
        bits = block_lists.pack_bits(seen)[..., None, :]
        if rows is None:
            return counts, indices, bits.expand(*indices.shape, block_q, -1)
        end = rows[part, None] - taken[..., None] * block_kv
        return counts, indices, bits & block_lists.interval_bits(end.clamp(max=0), end, block_kv)

    columns = lead[0] * lead[1] * width * block_q * block_kv // 8
    parts = block_lists.chunks(lead[2], columns, listed.device, 1 << 20)
    counts, indices, bits = block_lists.by_chunks(lists, parts, lead[2], 2)
    return BlockMask(
        *block_lists.list_blocks(whole & some),
        *sizes,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=bits,
    )
