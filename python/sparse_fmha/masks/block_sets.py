"""Set operations on block masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from sparse_fmha.masks import intersection, union
from sparse_fmha.masks.block_fields import BlockFields
from sparse_fmha.masks.parts import BlockParts

Mask = TypeVar("Mask", bound="BlockSets")


class BlockSets(BlockFields):
    """The set operations of `BlockMask`."""

    # No parameter before the masks: `BlockMask.union(a, b)` and `a.union(b)` are the same call.
    def union(*masks: Mask) -> Mask:
        """Returns the pairs visible in any mask, like `a | b`; adds forced blocks to a mask.

        `BlockMask.union(a, b)` is `a.union(b)`.

        A block that is full in one mask is full; the bitmasks of blocks that are partial in several
        are combined. Batch entries and heads broadcast from 1. The lists have room for those of all
        masks.

        Raises:
            TypeError: one of them is not a BlockMask.
            ValueError: no masks are given, or they differ in lengths, block sizes, causal or
                device.
        """
        joined = union.union(_parts_of(masks))
        return type(masks[0])._of(joined)

    def intersection(*masks: Mask) -> Mask:
        """Returns the pairs visible in all masks, like `a & b`: e.g. documents and a window.

        `BlockMask.intersection(a, b)` is `a.intersection(b)`.

        A block that is full in all masks is full; the bitmasks of blocks that are partial in some
        are intersected. Batch entries and heads broadcast from 1. Does not wait for the device.

        Returns:
            A mask that is causal if one of them is.

        Raises:
            TypeError: one of them is not a BlockMask.
            ValueError: no masks are given, or they differ in lengths, block sizes or device.
        """
        common = intersection.intersection(_parts_of(masks))
        return type(masks[0])._of(common)

    def __or__(self: Mask, other: Mask) -> Mask:
        """See `union`."""
        return self.union(other) if isinstance(other, BlockSets) else NotImplemented

    def __and__(self: Mask, other: Mask) -> Mask:
        """See `intersection`."""
        return self.intersection(other) if isinstance(other, BlockSets) else NotImplemented


def _parts_of(masks: Sequence[BlockSets]) -> list[BlockParts]:
    for mask in masks:
        if not isinstance(mask, BlockSets):
            raise TypeError(f"masks must be BlockMasks, got {type(mask).__name__}")
    return [mask._parts() for mask in masks]
