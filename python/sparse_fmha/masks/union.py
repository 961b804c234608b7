"""The union of block masks, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_fmha.masks import block_lists
from sparse_fmha.masks.parts import BlockParts

SAME = ("q_len", "kv_len", "block_q", "block_kv", "causal", "device")


def union(masks: Sequence[BlockParts]) -> BlockParts:
    """See `BlockMask.union`."""
    check(masks)
    first = masks[0]
    sizes = (first.q_len, first.kv_len, first.block_q, first.block_kv)
    lead = torch.broadcast_shapes(*(mask.counts.shape for mask in masks))
    # A few rows at a time, because block maps are larger than lists.
    columns = lead[0] * lead[1] * first.blocks_kv
    widths = [mask.partial.indices.shape[-1] for mask in masks if mask.partial is not None]
    if widths:
        columns += lead[0] * lead[1] * min(sum(widths), first.blocks_kv) * first.block_q
    parts = block_lists.chunks(lead[2], columns, first.device)
    counts, indices, *partial = block_lists.by_chunks(
        lambda rows: _union_of_rows(masks, rows, lead), parts, lead[2], 2
    )
    made = BlockParts(counts, indices, *sizes, causal=first.causal)
    if partial:
        made.partial_counts, made.partial_indices, made.partial_bits = partial
    return made


def _union_of_rows(
    masks: Sequence[BlockParts], rows: slice, lead: tuple[int, int, int]
) -> list[torch.Tensor]:
    """Returns the full lists of some rows, and the partial ones if a mask has any."""
    first = masks[0]
    lead = (*lead[:2], rows.stop - rows.start)
    full = torch.zeros(*lead, first.blocks_kv, dtype=torch.bool, device=first.device)
    for mask in masks:
        lists = mask.counts[:, :, rows], mask.indices[:, :, rows]
        full |= block_lists.block_map(*lists, mask.blocks_kv)
    made = [*block_lists.list_blocks(full, sum(mask.indices.shape[-1] for mask in masks))]
    partials = [mask.partial for mask in masks if mask.partial is not None]
    if not partials:
        return made
    slots = []
    for own in partials:
        lists = own.counts[:, :, rows], own.indices[:, :, rows]
        slots.append(block_lists.slot_map(*lists, first.blocks_kv).expand(*lead, -1))
    partial = torch.zeros_like(full)
    for slot in slots:
        partial |= slot >= 0
    width = sum(own.indices.shape[-1] for own in partials)
    counts, indices = block_lists.list_blocks(partial & ~full, width)
    bits = torch.zeros(
        (*indices.shape, first.block_q, first.block_kv // 8),
        dtype=torch.uint8,
        device=first.device,
    )
    for own, slot in zip(partials, slots, strict=True):
        # Past the counts, read block 0: the bits there are ignored.
        taken = slot.gather(-1, indices.clamp(min=0).long())
        of_mask = own.bits[:, :, rows].expand(*lead, *own.bits.shape[3:])
        bits |= block_lists.take_slots(of_mask, taken)
    return [*made, counts, indices, bits]


def check(masks: Sequence[BlockParts], same: Sequence[str] = SAME) -> None:
    if not masks:
        raise ValueError("masks must have at least one mask, got none")
    for name in same:
        values = [getattr(mask, name) for mask in masks]
        for value in values:
            if value != values[0]:
                raise ValueError(
                    f"{name} must be the same in all masks, got {values[0]} and {value}"
                )
    for axis, what in enumerate(("batch entries", "heads")):
        several = 1
        for size in (mask.counts.shape[axis] for mask in masks):
            if 1 not in (several, size) and size != several:
                raise ValueError(
                    f"{what} of the masks must be equal or 1, got {several} and {size}"
                )
            several = size if several == 1 else several
