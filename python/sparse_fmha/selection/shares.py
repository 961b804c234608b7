"""Finds a share of a long row's mass without a sort, on the CPU.

The largest values that sum to a limit are all values above a threshold, and the first few equal to
it. The threshold is found by its bits, because the bits of nonnegative floats order like the
values. Masses are summed by the upper 16 bits, then, within the selected bin, by the lower 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._sizes import CACHED

HALF = 1 << 16


def smallest_share(row: Tensor, limit: int, one: int) -> Tensor:
    """`top_p_blocks` of one row `[n]`, with a limit above 0 and without bounds of blocks.

    Args:
        one: the mass of probability 1.
    """
    parts = row.split(CACHED)
    sums = torch.zeros(HALF, dtype=torch.int64, device=row.device)
    for part in parts:
        values = _values(part)
        sums.index_add_(0, values.view(torch.int32) >> 16, _mass(values, one))
    upper, limit = _last_needed(sums, limit)
    sums.zero_()
    for part in parts:
        values = _values(part)
        values = values[(values.view(torch.int32) >> 16) == upper]
        sums.index_add_(0, values.view(torch.int32) & (HALF - 1), _mass(values, one))
    lower, limit = _last_needed(sums, limit)
    bits = torch.full((1,), upper * HALF + lower, dtype=torch.int32, device=row.device)
    least = bits.view(torch.float32)
    mass = int(_mass(least, one))
    room = -(-limit // mass) if mass else row.numel()
    taken = torch.empty_like(row, dtype=torch.bool)
    for part, own in zip(parts, taken.split(CACHED), strict=True):
        values = _values(part)
        torch.gt(values, least, out=own)
        if room and least > 0:
            equal = (values == least).nonzero()[:room, 0]
            own[equal] = True
            room -= equal.numel()
    return taken


def _values(part: Tensor) -> Tensor:
    """Returns fp32 values; entries that are not above 0, or NaN, become 0."""
    return torch.where(part > 0, part, 0).float()


def _mass(values: Tensor, one: int) -> Tensor:
    return (values.clamp(max=1).double() * one).long()


def _last_needed(sums: Tensor, limit: int) -> tuple[int, int]:
    """Returns the lowest bin with less than the limit above it, and the rest of the limit."""
    above = sums.flip(0).cumsum(0).flip(0) - sums
    lowest = int((above >= limit).sum())
    return lowest, limit - int(above[lowest])
