"""The union of block masks, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_fmha import _block_lists
from sparse_fmha.block_mask import BlockMask

SAME = ("q_len", "kv_len", "block_q", "block_kv", "causal", "device")


def union(masks: Sequence[BlockMask]) -> BlockMask:
    """See `BlockMask.union`."""
    check(masks)
    first = masks[0]
    sizes = (first.q_len, first.kv_len, first.block_q, first.block_kv)
    lead = torch.broadcast_shapes(*(mask.counts.shape for mask in masks))
    full = torch.zeros(*lead, first.blocks_kv, dtype=torch.bool, device=first.device)
    for mask in masks:
        full |= _block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    lists = _block_lists.list_blocks(full, sum(mask.indices.shape[-1] for mask in masks))
    with_partial = [mask for mask in masks if mask.partial_counts is not None]
    if not with_partial:
        return BlockMask(*lists, *sizes, causal=first.causal)
    slots = [
        _block_lists.slot_map(m.partial_counts, m.partial_indices, m.blocks_kv).expand(*lead, -1)
        for m in with_partial
    ]
    partial = torch.zeros_like(full)
    for slot in slots:
        partial |= slot >= 0
    width = sum(m.partial_indices.shape[-1] for m in with_partial)
    counts, indices = _block_lists.list_blocks(partial & ~full, width)
    bits = torch.zeros(
        (*indices.shape, first.block_q, first.block_kv // 8),
        dtype=torch.uint8,
        device=first.device,
    )
    for mask, slot in zip(with_partial, slots, strict=True):
        # Behind the counts block 0 is taken: what is in the bits there is ignored.
        taken = slot.gather(-1, indices.clamp(min=0).long())
        own = mask.partial_bits.expand(*lead, *mask.partial_bits.shape[3:])
        bits |= _block_lists.take_slots(own, taken)
    return BlockMask(
        *lists,
        *sizes,
        causal=first.causal,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=bits,
    )


def check(masks: Sequence[BlockMask]) -> None:
    if not masks:
        raise ValueError("masks are none; at least 1 is needed")
    for mask in masks:
        if not isinstance(mask, BlockMask):
            raise TypeError(f"masks have a {type(mask).__name__} among them; BlockMask is needed")
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
