"""Checks of the small tensors beside q: lengths, tables of pages, lists of keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_fmha._checks import check_strided, one_of

Axis = int | tuple[int, ...] | str  # the allowed sizes; a word: any size, and the message has it


def check_table(
    name: str,
    tensor: Any,
    device: torch.device,
    *shapes: tuple[Axis, ...],
    dtype: torch.dtype = torch.int32,
) -> None:
    """Checks for a tensor on q's device with the dtype and one of the shapes."""
    check_strided(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on q's device, {device}, got {tensor.device}")
    if not any(_fits(tensor, shape) for shape in shapes):
        allowed = one_of(f"[{', '.join(map(_text, shape))}]" for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {list(tensor.shape)}")


def _fits(tensor: Tensor, shape: tuple[Axis, ...]) -> bool:
    if tensor.dim() != len(shape):
        return False
    return all(
        isinstance(axis, str)
        or any(size == n for n in (axis if isinstance(axis, tuple) else [axis]))
        for size, axis in zip(tensor.shape, shape, strict=True)
    )


def _text(axis: Axis) -> str:
    return one_of(axis) if isinstance(axis, tuple) else str(axis)
