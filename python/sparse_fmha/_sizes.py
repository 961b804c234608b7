"""Sizes: the number of blocks, and limits on temporaries."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Count = TypeVar("Count", int, Tensor)

SLICE = 1 << 24  # elements; limits temporaries that could be as large as the input

CACHED = 1 << 18  # elements; limits CPU temporaries to what fits in a core's cache


def ceil_div(a: Count, b: int) -> Count:
    return -(-a // b)
