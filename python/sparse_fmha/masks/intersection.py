"""The intersection of block masks, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha.masks import block_lists
from sparse_fmha.masks.parts import BlockParts
from sparse_fmha.masks.union import check

ALL_PAIRS = 0xFF  # a byte of a bitmask with all pairs visible
SAME = ("q_len", "kv_len", "block_q", "block_kv", "device")


def intersection(masks: Sequence[BlockParts]) -> BlockParts:
    """See `BlockMask.intersection`."""
    check(masks, SAME)
    first = masks[0]
    sizes = (first.q_len, first.kv_len, first.block_q, first.block_kv)
    lead = torch.broadcast_shapes(*(mask.counts.shape for mask in masks))
    full_width = min(mask.indices.shape[-1] for mask in masks)
    partial_width = _partial_width(masks)
    # A few rows at a time, because block maps are larger than lists.
    columns = lead[0] * lead[1] * (first.blocks_kv + partial_width * first.block_q)
    parts = block_lists.chunks(lead[2], columns, first.device)
    counts, indices, *partial = block_lists.by_chunks(
        lambda rows: _rows(masks, rows, lead, full_width, partial_width), parts, lead[2], 2
    )
    causal = any(mask.causal for mask in masks)
    made = BlockParts(counts, indices, *sizes, causal=causal)
    if partial:
        made.partial_counts, made.partial_indices, made.partial_bits = partial
    return made


def _partial_width(masks: Sequence[BlockParts]) -> int:
    """Returns the most partial blocks of a row: each is partial in one mask and listed in all."""
    listed, partial = [], 0
    for mask in masks:
        own = 0 if mask.partial is None else mask.partial.indices.shape[-1]
        listed.append(mask.indices.shape[-1] + own)
        partial += own
    return min(*listed, partial, masks[0].blocks_kv)


def _rows(
    masks: Sequence[BlockParts],
    rows: slice,
    lead: tuple[int, int, int],
    full_width: int,
    partial_width: int,
) -> list[Tensor]:
    """Returns the full lists of some rows, and the partial ones if a mask has any."""
    first = masks[0]
    lead = (*lead[:2], rows.stop - rows.start)
    ones = torch.ones(*lead, first.blocks_kv, dtype=torch.bool, device=first.device)
    all_full, all_listed = ones, ones
    maps = []
    for mask in masks:
        lists = mask.counts[:, :, rows], mask.indices[:, :, rows]
        full = block_lists.block_map(*lists, mask.blocks_kv)
        all_full = all_full & full
        slots = None
        listed = full
        if mask.partial is not None:
            lists = mask.partial.counts[:, :, rows], mask.partial.indices[:, :, rows]
            slots = block_lists.slot_map(*lists, mask.blocks_kv)
            listed = full | (slots >= 0)
        all_listed = all_listed & listed
        maps.append((full, slots))
    made = [*block_lists.list_blocks(all_full, full_width)]
    if all(mask.partial is None for mask in masks):
        return made
    counts, indices = block_lists.list_blocks(all_listed & ~all_full, partial_width)
    # Past the counts, read block 0: the bits there are ignored.
    taken = indices.clamp(min=0).long()
    shape = (*indices.shape, first.block_q, first.block_kv // 8)
    bits = torch.full(shape, ALL_PAIRS, dtype=torch.uint8, device=first.device)
    for mask, (full, slots) in zip(masks, maps, strict=True):
        if mask.partial is None or slots is None:
            continue  # all listed blocks are full
        of_mask = mask.partial.bits[:, :, rows].expand(*lead, *mask.partial.bits.shape[3:])
        own = block_lists.take_slots(of_mask, slots.expand(*lead, -1).gather(-1, taken))
        whole = full.expand(*lead, -1).gather(-1, taken)[..., None, None]
        bits &= own.masked_fill_(whole, ALL_PAIRS)
    return [*made, counts, indices, bits]
