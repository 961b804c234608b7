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
    # A few rows at a time: their maps of blocks are larger than their lists.
    columns = lead[0] * lead[1] * first.blocks_kv
    widths = [m.partial_indices.shape[-1] for m in masks if m.partial_counts is not None]
    if widths:
        columns += lead[0] * lead[1] * min(sum(widths), first.blocks_kv) * first.block_q
    parts = block_lists.chunks(lead[2], columns, first.device)
    lists = block_lists.by_chunks(lambda rows: _union_of_rows(masks, rows, lead), parts, lead[2], 2)
    names = ("partial_counts", "partial_indices", "partial_bits")
    partial = dict(zip(names, lists[2:], strict=False))
    return BlockParts(*lists[:2], *sizes, causal=first.causal, **partial)


def _union_of_rows(
    masks: Sequence[BlockParts], rows: slice, lead: tuple[int, int, int]
) -> list[torch.Tensor]:
    """The lists of some rows, and the partial ones if a mask has such."""
    first = masks[0]
    lead = (*lead[:2], rows.stop - rows.start)
    full = torch.zeros(*lead, first.blocks_kv, dtype=torch.bool, device=first.device)
    for mask in masks:
        lists = mask.counts[:, :, rows], mask.indices[:, :, rows]
        full |= block_lists.block_map(*lists, mask.blocks_kv)
    made = [*block_lists.list_blocks(full, sum(mask.indices.shape[-1] for mask in masks))]
    with_partial = [mask for mask in masks if mask.partial_counts is not None]
    if not with_partial:
        return made
    slots = []
    for mask in with_partial:
        lists = mask.partial_counts[:, :, rows], mask.partial_indices[:, :, rows]
        slots.append(block_lists.slot_map(*lists, mask.blocks_kv).expand(*lead, -1))
    partial = torch.zeros_like(full)
    for slot in slots:
        partial |= slot >= 0
    width = sum(m.partial_indices.shape[-1] for m in with_partial)
    counts, indices = block_lists.list_blocks(partial & ~full, width)
    bits = torch.zeros(
        (*indices.shape, first.block_q, first.block_kv // 8),
        dtype=torch.uint8,
        device=first.device,
    )
    for mask, slot in zip(with_partial, slots, strict=True):
        # Behind the counts block 0 is taken: what is in the bits there is ignored.
        taken = slot.gather(-1, indices.clamp(min=0).long())
        own = mask.partial_bits[:, :, rows].expand(*lead, *mask.partial_bits.shape[3:])
        bits |= block_lists.take_slots(own, taken)
    return [*made, counts, indices, bits]


def check(masks: Sequence[BlockParts]) -> None:
    if not masks:
        raise ValueError("masks are none; at least 1 is needed")
    for name in SAME:
        values = [getattr(mask, name) for mask in masks]
        for value in values:
            if value != values[0]:
                raise ValueError(
                    f"{name} is {values[0]} in one mask and {value} in the other; they must be the "
                    "same"
                )
    for axis, what in enumerate(("batch entries", "heads")):
        several = 1
        for size in (mask.counts.shape[axis] for mask in masks):
            if 1 not in (several, size) and size != several:
                raise ValueError(
                    f"the masks have {several} and {size} {what}; equal or 1 is needed"
                )
            several = size if several == 1 else several
