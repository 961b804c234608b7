"""Tokens of a video or image in the order of cubes, and masks of cubes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparse_fmha._checks import check_collection, check_int, one_of, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists, tensor_fields
from sparse_fmha.masks.block_checks import BLOCKS_Q
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns.regions import RegionOrder


class CubeOrder(RegionOrder):
    """The order of cubes: a block for each cube of a grid, and blocks of the tokens around it.

    Cubes and their tokens are in row-major order. A cube at the end of an axis may be smaller; it
    is padded to a whole block. Other tokens, such as text, stand before or after the grid's, in
    blocks of their own.

    It is a `RegionOrder` in which each block is a region.

    Attributes:
        grid, cube: as given. cubes: number of cubes on each axis.
        before, after: as given. first: the first block that is a cube.
        ragged: number of blocks with padding.

    Args:
        grid: one to three lengths, such as frames, height and width.
        cube: as many; the product is a block, 64 or 128 tokens.
        before, after: tokens before and after those of the grid.
        device: device of the tensors.

    Raises:
        ValueError, TypeError: a length is not allowed.
    """

    PLAIN: ClassVar[tuple[str, ...]] = (
        *RegionOrder.PLAIN,
        "grid",
        "cube",
        "cubes",
        "before",
        "after",
        "first",
        "ragged",
    )

    @plain_ints
    def __init__(
        self,
        grid: Sequence[int],
        cube: Sequence[int],
        *,
        before: int = 0,
        after: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_collection("grid", grid)
        check_collection("cube", cube)
        if not 1 <= len(grid) <= 3 or len(cube) != len(grid):
            raise ValueError(
                "grid must have one to three entries, and cube as many, got "
                f"{list(grid)} and {list(cube)}"
            )
        self.grid = tuple(check_int(f"grid[{n}]", x, 1) for n, x in enumerate(grid))
        self.cube = tuple(check_int(f"cube[{n}]", x, 1) for n, x in enumerate(cube))
        block = math.prod(self.cube)
        if block not in BLOCKS_Q:
            raise ValueError(
                f"cube must have {one_of(BLOCKS_Q)} tokens, as blocks of queries have, got "
                f"{list(cube)}, which has {block}"
            )
        self.before, self.after = check_int("before", before), check_int("after", after)
        self.cubes = tuple(ceil_div(n, c) for n, c in zip(self.grid, self.cube, strict=True))
        self.first = ceil_div(before, block)
        number = torch.zeros((), dtype=torch.int64, device="cpu")
        for length, size, cubes in zip(self.grid, self.cube, self.cubes, strict=True):
            own = torch.arange(length, device="cpu") // size
            number = number[..., None] * cubes + own
        behind = self.first + math.prod(self.cubes)
        region = torch.cat(
            [
                torch.arange(before, device="cpu") // block,
                self.first + number.flatten(),
                behind + torch.arange(after, device="cpu") // block,
            ]
        )
        super().__init__(region, block, device=device)
        self.ragged = int((region.bincount() < block).sum())

    @property
    def inside(self) -> slice:
        """The blocks that are cubes; the others have tokens before or after the grid."""
        return slice(self.first, self.first + math.prod(self.cubes))

    def others(self) -> Tensor:
        """Returns the blocks outside the grid, bool `[regions]`."""
        number = torch.arange(self.regions, device=self.slots.device)
        outside: Tensor = (number < self.inside.start) | (number >= self.inside.stop)
        return outside

    def with_others(self, cubes: Tensor) -> Tensor:
        """Returns a map of all blocks from one of cubes; other blocks see all and are seen by all.

        Args:
            cubes: bool `[B, H, cubes, cubes]`.
        """
        others = self.others()
        blocks = (others | others[:, None]).expand(*cubes.shape[:2], -1, -1).clone()
        blocks[:, :, self.inside, self.inside] = cubes
        return blocks

    @plain_ints
    def mask(self, blocks: Tensor, width: int | None = None) -> BlockMask:
        """Returns the mask of a map of blocks, for tokens in this order; padding is not seen.

        Blocks with padding take bitmasks of `block**2 / 8` bytes, in lists of the smaller one of
        `ragged` and `width` for each block of queries and head. Grids whose axes are multiples of
        the cube's need none.

        Args:
            blocks: bool `[B|1, H|1, regions, regions]`.
            width: capacity of the lists, default `regions`. A row with more loses its last ones.
        """
        whole = self.present.all(1)
        sizes = (self.length, self.length, self.block, self.block)
        if not self.padded:
            return BlockMask.from_blocks(blocks, *sizes, width=width)
        few = self.ragged if width is None else min(width, self.ragged)
        counts, indices = block_lists.list_blocks(blocks & ~whole, few)
        seen = block_lists.pack_bits(self.present)[indices.clamp(min=0).long()]
        return BlockMask(
            *block_lists.list_blocks(blocks & whole, width),
            *sizes,
            partial_counts=counts,
            partial_indices=indices,
            partial_bits=seen[..., None, :].expand(*indices.shape, self.block, -1),
        )

    @plain_ints
    def near(self, window: Sequence[int]) -> Tensor:
        """Returns the cubes within `window // 2` cubes of each other on every axis.

        Args:
            window: cubes on each axis, at least 1.

        Returns:
            bool `[regions, regions]`; False for blocks that are not cubes.
        """
        check_collection("window", window)
        if len(window) != len(self.cubes):
            raise ValueError(
                f"window must have {len(self.cubes)} entries, one for each axis, got {list(window)}"
            )
        device = self.slots.device
        near = torch.ones(1, 1, dtype=torch.bool, device=device)
        for n, (size, cubes) in enumerate(zip(window, self.cubes, strict=True)):
            place = torch.arange(cubes, device=device)
            reach = check_int(f"window[{n}]", size, 1) // 2
            own = (place[:, None] - place).abs() <= reach
            near = near[:, None, :, None] & own[None, :, None, :]
            near = near.flatten(2, 3).flatten(0, 1)
        result = torch.zeros(self.regions, self.regions, dtype=torch.bool, device=device)
        result[self.inside, self.inside] = near
        return result


tensor_fields.register(CubeOrder, "sparse_fmha.patterns.CubeOrder")
