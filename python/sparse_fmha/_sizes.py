"""Sizes: how many blocks there are, and how large a temporary may be."""

from __future__ import annotations

SLICE = 1 << 24  # elements of a temporary, where one could be as large as the input


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
