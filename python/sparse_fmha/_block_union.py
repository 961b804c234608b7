"""The union of two block masks, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _block_lists
from sparse_fmha.block_mask import BlockMask

SAME = ("q_len", "kv_len", "block_q", "block_kv", "causal", "device")


def union(a: BlockMask, b: BlockMask) -> BlockMask:
    """See `BlockMask.__or__`."""
    for name in SAME:
        if getattr(a, name) != getattr(b, name):
            raise ValueError(
                f"{name} is {getattr(a, name)} in one mask and {getattr(b, name)} in the other; "
                "they must be the same"
            )
    for axis, what in enumerate(("batch entries", "heads")):
        sizes = a.counts.shape[axis], b.counts.shape[axis]
        if sizes[0] != sizes[1] and 1 not in sizes:
            raise ValueError(
                f"the masks have {sizes[0]} and {sizes[1]} {what}; equal or 1 is needed"
            )
    lead = torch.broadcast_shapes(a.counts.shape, b.counts.shape)
    full = _full(a) | _full(b)
    lists = _block_lists.list_blocks(full, a.indices.shape[-1] + b.indices.shape[-1])
    sizes = (a.q_len, a.kv_len, a.block_q, a.block_kv)
    with_partial = [mask for mask in (a, b) if mask.partial_counts is not None]
    if not with_partial:
        return BlockMask(*lists, *sizes, causal=a.causal)
    slots = [
        _block_lists.slot_map(m.partial_counts, m.partial_indices, m.blocks_kv).expand(*lead, -1)
        for m in with_partial
    ]
    partial = ~full & torch.stack([s >= 0 for s in slots]).any(0)
    width = sum(m.partial_indices.shape[-1] for m in with_partial)
    counts, indices = _block_lists.list_blocks(partial, width)
    bits = torch.zeros(
        (*indices.shape, a.block_q, a.block_kv // 8), dtype=torch.uint8, device=a.device
    )
    for mask, slot in zip(with_partial, slots, strict=True):
        taken = slot.gather(-1, indices.clamp(min=0).long())
        own = mask.partial_bits.expand(*lead, *mask.partial_bits.shape[3:])
        bits |= _block_lists.take_slots(own, taken)
    return BlockMask(
        *lists,
        *sizes,
        causal=a.causal,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=bits,
    )


def _full(mask: BlockMask) -> Tensor:
    return _block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
