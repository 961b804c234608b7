"""Token order by region; each region, of any size, is padded to whole blocks."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_fmha._checks import (
    check_device,
    check_floats,
    check_int,
    check_integers,
    check_strided,
    plain_ints,
)
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha.masks import tensor_fields
from sparse_fmha.masks.block_lists import chunks
from sparse_fmha.masks.tensor_fields import TensorFields


class RegionOrder(TensorFields):
    """A permutation that groups tokens by region, and its inverse.

    Regions are in ascending order, and tokens keep their order within a region. Each region is
    padded to a whole number of blocks, so a block has tokens of only one region.

    `to`, saving and use as a pytree node work as for `BlockMask`.

    Attributes:
        length: tokens with padding, a multiple of `block`. tokens: without padding.
        block: tokens per block.
        regions: number of regions; some may be empty.
        padded: whether there is padding.
        slots: int64 `[tokens]`, the new position of each token.
        sizes: int64 `[regions]`, tokens per region.
        block_region: int64 `[length / block]`, the region of each block.
        present: bool `[length / block, block]`, False for padding.
        sources: int64 `[length / block, block]`, the token in each slot; 0 for padding.
        most_blocks: blocks of the largest region.

    Args:
        region: integers `[tokens]`, the region of each token. Read by the host.
        block: at least 1; the mask's `block_q` for queries, `block_kv` for keys.
        regions: number of regions; default `region.max() + 1`.
        device: device of the tensors; default that of `region`.

    Raises:
        ValueError: region is not one-dimensional or not in [0, regions), or block is below 1.
        TypeError: region is not an integer tensor.
    """

    TENSORS = ("slots", "sizes", "block_region", "present", "sources")
    PLAIN: ClassVar[tuple[str, ...]] = (
        "length",
        "tokens",
        "block",
        "regions",
        "padded",
        "most_blocks",
    )

    @plain_ints
    def __init__(
        self,
        region: Tensor,
        block: int,
        *,
        regions: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        check_integers("region", region)
        if region.dim() != 1 or not len(region):
            raise ValueError(f"region must have shape [tokens], got {list(region.shape)}")
        check_int("block", block, 1)
        device = region.device if device is None else torch.device(device)
        region = region.cpu().long()
        least, most = int(region.min()), int(region.max())
        regions = most + 1 if regions is None else check_int("regions", regions, 1)
        if least < 0 or most >= regions:
            raise ValueError(f"region must be from 0 to {regions - 1}, got {least} to {most}")
        sizes = region.bincount(minlength=regions)
        blocks = (sizes + block - 1) // block
        first_slot = (blocks.cumsum(0) - blocks) * block
        order = region.argsort(stable=True)
        ordered = region[order]
        rank = torch.arange(len(region), device="cpu") - (sizes.cumsum(0) - sizes)[ordered]
        slots = torch.empty_like(region)
        slots[order] = first_slot[ordered] + rank
        self.tokens, self.block, self.regions = len(region), block, regions
        self.length = int(blocks.sum()) * block
        self.padded = self.length > self.tokens
        self.most_blocks = int(blocks.max())
        present = torch.zeros(self.length, dtype=torch.bool, device="cpu")
        present[slots] = True
        self.slots = slots.to(device)
        self.sizes = sizes.to(device)
        self.block_region = torch.arange(regions, device="cpu").repeat_interleave(blocks).to(device)
        self.present = present.view(-1, block).to(device)
        sources = torch.zeros(self.length, dtype=torch.int64, device="cpu")
        sources[slots] = torch.arange(len(region), device="cpu")
        self.sources = sources.view(-1, block).to(device)

    def permute(self, x: Tensor) -> Tensor:
        """Brings `[B, tokens, ...]` into region order: `[B, length, ...]`, padded with 0."""
        self._check(x, self.tokens)
        shape = x.shape[0], self.length, *x.shape[2:]
        result = x.new_zeros(shape) if self.padded else x.new_empty(shape)
        return result.index_copy_(1, self.slots, x)

    def undo(self, x: Tensor) -> Tensor:
        """Inverse of `permute`: `[B, length, ...]` to `[B, tokens, ...]`, without padding."""
        self._check(x, self.length)
        return x.index_select(1, self.slots)

    def means(self, x: Tensor) -> Tensor:
        """Returns region means fp32 `[B, regions, H, D]` of `[B, tokens, H, D]`; 0 if empty."""
        check_floats("x", x, 4, "[batch, tokens, heads, head dim]")
        self._check(x, self.tokens)
        shape = x.shape[0], self.regions, *x.shape[2:]
        if len(self.block_region) == self.regions and self.most_blocks == 1:
            return self._means_of_blocks(x)
        means = torch.zeros(shape, dtype=torch.float32, device=x.device)
        number = torch.arange(self.regions, device=self.slots.device)[:, None]
        sizes = self.sizes.clamp(min=1)[:, None].float()
        elements = x.shape[0] * self.block * x.shape[2:].numel()
        for some in chunks(len(self.block_region), elements, x.device, 1 << 20):
            sums = self._sums(x, some)
            weights = (number == self.block_region[some]).float() / sizes
            with without_autocast(x.device):
                means += (weights @ sums.flatten(2)).view(shape)
        return means

    def _means_of_blocks(self, x: Tensor) -> Tensor:
        """Returns `means` where each region is one block."""
        elements = x.shape[0] * self.block * x.shape[2:].numel()
        parts = chunks(len(self.block_region), elements, x.device, 1 << 20)
        sums = [self._sums(x, some) for some in parts]
        return (torch.cat(sums, 1) if len(sums) > 1 else sums[0]) / self.sizes[:, None, None]

    def _sums(self, x: Tensor, some: slice) -> Tensor:
        """Returns sums of some blocks, fp32 `[B, blocks, H, D]`."""
        tokens, absent = self.sources[some], ~self.present[some]
        part = x.index_select(1, tokens.flatten()).unflatten(1, tokens.shape)
        # Padding reads token 0, which `present` masks.
        sums: Tensor = part.masked_fill_(absent[..., None, None], 0).sum(2, dtype=torch.float32)
        return sums

    def check(self, x: Tensor) -> None:
        """Raises ValueError if x is not `[B, tokens, ...]` on the device of the order."""
        self._check(x, self.tokens)

    def _check(self, x: Tensor, tokens: int) -> None:
        check_strided("x", x)
        if x.dim() < 2 or x.shape[1] != tokens:
            raise ValueError(f"x must have {tokens} tokens, got shape {list(x.shape)}")
        check_device("x", x, self.slots.device)


tensor_fields.register(RegionOrder, "sparse_fmha.patterns.RegionOrder")
