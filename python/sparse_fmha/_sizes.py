"""Sizes: how many blocks there are, and how large a temporary may be."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Count = TypeVar("Count", int, Tensor)

SLICE = 1 << 24  # elements of a temporary, where one could be as large as the input

CACHED = 1 << 18  # elements of one on the CPU that stays in a core's cache


def ceil_div(a: Count, b: int) -> Count:
    return -(-a // b)
