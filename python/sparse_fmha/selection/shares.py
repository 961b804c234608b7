"""A share of a long row's mass without sorting it, on the CPU.

The largest values that add up to a limit are all above one value, and of those equal to it the
first few. It is found by its bits, as those of floats from 0 on order as they do: masses are added
up by the upper 16, then by the lower 16 of the values that have the upper ones in question.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._sizes import CACHED

HALF = 1 << 16


def smallest_share(row: Tensor, limit: int, one: int) -> Tensor:
    """What `top_p_blocks` takes of one row `[n]`, with a limit above 0 and no bounds of blocks.

    Args:
        one: of a mass that stands for probability 1.
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
    """What is not above 0, also NaN, as 0."""
    return torch.where(part > 0, part, 0).float()


def _mass(values: Tensor, one: int) -> Tensor:
    return (values.clamp(max=1).double() * one).long()


def _last_needed(sums: Tensor, limit: int) -> tuple[int, int]:
    """The lowest bin above which less than the limit lies, and what of the limit is left for it."""
    above = sums.flip(0).cumsum(0).flip(0) - sums
    lowest = int((above >= limit).sum())
    return lowest, limit - int(above[lowest])
