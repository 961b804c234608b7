"""Conversion of block masks from and to token masks, and their number of visible pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.parts import BlockParts, PartialLists

PAIRS = 1 << 19  # read at a time on the CPU; at least one row of blocks


def from_dense(
    visible: Tensor, block_q: int, block_kv: int, partial_width: int | None
) -> BlockParts:
    """See `BlockMask.from_dense`."""
    block_checks.check_dense(visible)
    visible = visible[(None,) * (4 - visible.dim())]
    q_len, kv_len = visible.shape[2:]
    block_checks.check_sizes(q_len, kv_len, block_q, block_kv, False)
    block_checks.check_width("partial_width", partial_width)
    device = visible.device
    lead, rows = visible.shape[:2], ceil_div(q_len, block_q)
    columns = ceil_div(kv_len, block_kv)
    shape = (*lead, rows, columns)
    full, some = (torch.empty(shape, dtype=torch.bool, device=device) for _ in range(2))
    one_row = lead.numel() * block_q * block_kv * columns
    parts = block_lists.chunks(rows, one_row, device, PAIRS) if columns else []
    for part in parts:
        seen = _in_blocks(visible, part, block_q, block_kv)
        full[:, :, part], some[:, :, part] = block_lists.kinds(seen, block_kv)
    partial = some & ~full
    if partial_width is None:
        partial_width = int(partial.sum(-1).max()) if partial.numel() else 0
    counts, indices = block_lists.list_blocks(partial, partial_width)
    bits = torch.empty((*indices.shape, block_q, block_kv // 8), dtype=torch.uint8, device=device)
    last = torch.arange(columns * block_kv, device=device) < kv_len
    for part in parts:
        packed = block_lists.pack_bits(_in_blocks(visible, part, block_q, block_kv) & last)
        there = torch.arange(part.start * block_q, part.stop * block_q, device=device) < q_len
        packed = packed * there.view(-1, block_q, 1)
        packed = packed.unflatten(-1, (columns, -1)).transpose(3, 4)
        slots = indices[:, :, part].clamp(min=0).long()[..., None, None]
        bits[:, :, part] = packed.gather(3, slots.expand(*slots.shape[:4], *packed.shape[4:]))
    return BlockParts(
        *block_lists.list_blocks(full),
        q_len,
        kv_len,
        block_q,
        block_kv,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=bits,
    )


def _in_blocks(visible: Tensor, part: slice, block_q: int, block_kv: int) -> Tensor:
    """Returns the rows `[B, H, n, block_q, columns * block_kv]` of some query blocks.

    Padding repeats the last token's row or column, which does not change a block's kind.
    """
    seen = visible[:, :, part.start * block_q : part.stop * block_q]
    missing = -visible.shape[3] % block_kv
    if missing:
        seen = torch.cat([seen, seen[..., -1:].expand(*seen.shape[:3], missing)], 3)
    missing = (part.stop - part.start) * block_q - seen.shape[2]
    if missing:
        seen = torch.cat([seen, seen[:, :, -1:].expand(-1, -1, missing, -1)], 2)
    blocks: Tensor = seen.unflatten(2, (-1, block_q))
    return blocks


def to_dense(mask: BlockParts) -> Tensor:
    """See `BlockMask.to_dense`."""
    full = block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    lead = full.shape[:3]
    dense = full[:, :, :, None, :, None].repeat(1, 1, 1, mask.block_q, 1, mask.block_kv)
    if mask.partial is not None:
        counts, indices, all_bits = mask.partial
        slots = block_lists.slot_map(counts, indices, mask.blocks_kv)
        for n in range(mask.blocks_kv):
            bits = block_lists.take_slots(all_bits, slots[..., n : n + 1])
            masks = block_lists.unpack_bits(bits)
            dense[:, :, :, :, n] |= masks.view(*lead, mask.block_q, mask.block_kv)
    dense = dense.flatten(4).flatten(2, 3)[:, :, : mask.q_len, : mask.kv_len]
    if mask.causal:
        limit = _limits(mask)[: mask.q_len]
        dense = dense & (torch.arange(mask.kv_len, device=mask.device) < limit[:, None])
    return dense.contiguous()


def visible_pairs(mask: BlockParts) -> int:
    """See `BlockMask.visible_pairs`."""
    limits = _limits(mask).view(-1, mask.block_q)
    first = torch.arange(mask.blocks_kv, device=mask.device) * mask.block_kv
    of_block = torch.zeros(mask.blocks_q, mask.blocks_kv, dtype=torch.int64, device=mask.device)
    for limit in limits.T:  # the same row of each query block
        of_block += (limit[:, None] - first).clamp(0, mask.block_kv)
    full = block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    pairs = (full.sum((0, 1)) * of_block).sum()
    if mask.partial is not None:
        pairs += _pairs_of_bits(mask, mask.partial, limits)
    return int(pairs)


def _pairs_of_bits(mask: BlockParts, partial: PartialLists, limits: Tensor) -> Tensor:
    """Counts the pairs of partial blocks byte by byte, one slot of all lists at a time."""
    listed = block_lists.is_listed(partial.counts, partial.indices, mask.blocks_kv)
    columns = torch.arange(0, mask.block_kv, 8, dtype=torch.int32, device=mask.device)
    limits = limits.int()[..., None]
    pairs = torch.zeros((), dtype=torch.int64, device=mask.device)
    for slot in range(partial.indices.shape[-1]):
        here = listed[..., slot]
        # Entries past the count may be any number; 0 keeps the first key from overflowing.
        block = torch.where(here, partial.indices[..., slot], 0)
        first = block[..., None, None] * mask.block_kv + columns
        keys = (limits - first).clamp_(0, 8)  # per byte, how many bits are keys below the limit
        bytes_seen = partial.bits[..., slot, :, :] & ((1 << keys) - 1).to(torch.uint8)
        seen = _bits_set(bytes_seen).sum((-2, -1), dtype=torch.int64)
        pairs += (seen * here).sum()
    return pairs


def _bits_set(x: Tensor) -> Tensor:
    """Returns the number of bits set in each byte."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


def _limits(mask: BlockParts) -> Tensor:
    """Returns int64 `[nQ * block_q]`: query i sees keys below this limit."""
    rows = mask.blocks_q * mask.block_q
    return block_lists.key_limits(mask.q_len, mask.kv_len, mask.causal, rows, mask.device)
