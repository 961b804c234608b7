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

    @classmethod
    def union(cls: type[Mask], *masks: Mask) -> Mask:
        """Returns the pairs visible in any mask, like `a | b`; adds forced blocks to a mask.

        A block that is full in one mask is full; the bitmasks of blocks that are partial in several
        are combined. Batch entries and heads broadcast from 1. The lists have room for those of all
        masks.

        Raises:
            TypeError: one of them is not a BlockMask.
            ValueError: no masks are given, or they differ in lengths, block sizes, causal or
                device.
        """
        return cls._of(union.union(_parts_of(masks)))

    @classmethod
    def intersection(cls: type[Mask], *masks: Mask) -> Mask:
        """Returns the pairs visible in all masks, like `a & b`: e.g. documents and a window.

        A block that is full in all masks is full; the bitmasks of blocks that are partial in some
        are intersected. Batch entries and heads broadcast from 1. Does not wait for the device.

        Returns:
            A mask that is causal if one of them is.

        Raises:
            TypeError: one of them is not a BlockMask.
            ValueError: no masks are given, or they differ in lengths, block sizes or device.
        """
        return cls._of(intersection.intersection(_parts_of(masks)))

    def __or__(self: Mask, other: Mask) -> Mask:
        """See `union`."""
        return self.union(self, other) if isinstance(other, BlockSets) else NotImplemented

    def __and__(self: Mask, other: Mask) -> Mask:
        """See `intersection`."""
        return self.intersection(self, other) if isinstance(other, BlockSets) else NotImplemented


def _parts_of(masks: Sequence[BlockSets]) -> list[BlockParts]:
    for mask in masks:
        if not isinstance(mask, BlockSets):
            raise TypeError(f"masks must be BlockMasks, got {type(mask).__name__}")
    return [mask._parts() for mask in masks]
