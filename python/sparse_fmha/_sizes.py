"""Sizes: the number of blocks, and limits on temporaries."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Count = TypeVar("Count", int, Tensor)

SLICE = 1 << 24  # elements; limits temporaries that could be as large as the input

CACHED = 1 << 18  # elements; limits CPU temporaries to what fits in a core's cache


def ceil_div(a: Count, b: int) -> Count:
    return -(-a // b)


def head_parts(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Cuts the heads of q and k, `[B, L, H, D]`, so that a part of q has at most `4 * SLICE`
    elements; whole groups of query heads, at least one. A dispatch mode with `whole_heads` is to
    see all heads in one part."""
    heads, heads_kv = q.shape[2], k.shape[2]
    group = heads // max(1, heads_kv)
    step = max(1, 4 * SLICE * heads_kv // max(1, q.numel()))
    if torch._C._len_torch_dispatch_stack() and any(
        getattr(mode, "whole_heads", False) for mode in _get_current_dispatch_mode_stack()
    ):
        step = max(1, heads_kv)
    return [
        (slice(first * group, (first + step) * group), slice(first, first + step))
        for first in range(0, heads_kv, step)
    ]
