"""Softmax skipping: the threshold argument of the ops, and their statistics."""

from __future__ import annotations

from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sparse_fmha import _checks
from sparse_fmha._ops import symbolic


class SkipStats(NamedTuple):
    """Numbers of key tiles visited and skipped, int64 `[B, Hq]` on q's device.

    Counts each pair of a group of 64 query rows and a key tile in which at least one of the rows
    sees a key; the tiles are the kernel's (docs/design.md, "Skipping").
    """

    visited: Tensor  # includes the skipped ones
    skipped: Tensor

    @property
    def sparsity(self) -> Tensor:
        """Share of the visited tiles that were skipped, fp32 `[B, Hq]`; 0 where there were none."""
        return self.skipped / self.visited.clamp(min=1)


pytree._register_namedtuple(SkipStats, serialized_type_name="sparse_fmha.SkipStats")
torch.serialization.add_safe_globals([SkipStats])


def threshold_of(value: float | Tensor, q: Tensor, counted: bool) -> Tensor | None:
    """Returns the thresholds of the batch entries, fp32 `[B]`, or None if skipping is off.

    With `counted`, skipping is always on, so that tiles are counted.
    """
    check(value, q)
    if isinstance(value, Tensor):
        return value.contiguous()
    if value == 0 and not counted:
        return None
    if symbolic.is_symbolic(value):  # a product keeps it symbolic
        return q.new_ones(q.shape[:1], dtype=torch.float32) * value
    return q.new_full(q.shape[:1], float(value), dtype=torch.float32)  # a DTensor if q is


def check(value: float | Tensor, q: Tensor) -> None:
    """Checks a number in [0, 1), or a tensor `[B]`, whose values are not read."""
    if isinstance(value, Tensor):
        _checks.check_strided("skip_threshold", value)
        if value.dtype != torch.float32:
            raise TypeError(f"skip_threshold must have dtype torch.float32, got {value.dtype}")
        if value.shape != q.shape[:1]:
            raise ValueError(
                f"skip_threshold must have shape {list(q.shape[:1])}, one entry for each batch "
                f"entry, got {list(value.shape)}"
            )
        if value.device != q.device:
            raise ValueError(
                f"skip_threshold must be on q's device, {q.device}, got {value.device}"
            )
    elif not isinstance(value, (Real, torch.SymFloat)) or isinstance(value, bool):
        raise TypeError(f"skip_threshold must be a number or a tensor, got {value!r}")
    elif not 0 <= value < 1:
        raise ValueError(f"skip_threshold must be at least 0 and less than 1, got {value}")
