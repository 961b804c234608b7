"""Casts of a call's tensors under `torch.autocast`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")
KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register(library: torch.library.Library, op: torch._ops.OpOverload, end: int) -> None:
    """Registers autocast kernels that cast the arguments before `end`."""
    for device, key in KEYS.items():
        library.impl(op._opname, _casting(op, end, device), key)


def _casting(op: torch._ops.OpOverload, end: int, device: str) -> Callable[..., list[Tensor]]:
    def run(*args: object) -> list[Tensor]:
        with torch.autocast(device, enabled=False):
            results: list[Tensor] = op(*cast(device, *args[:end]), *args[end:])
            return results

    return run


def cast(device: str, *args: T) -> tuple[T | Tensor, ...]:
    """Casts the arguments that are tensors on the device to its autocast dtype.

    fp64 is not cast, as in PyTorch's own ops under autocast.
    """
    dtype = torch.get_autocast_dtype(device)
    casts = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.device.type == device and a.dtype in casts else a
        for a in args
    )


@overload
def cast_where_enabled(q: Tensor, k: Tensor, v: Tensor, /) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def cast_where_enabled(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, /
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]: ...


def cast_where_enabled(q: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Casts the tensors as the op would, so that checks see the tensors that the op gets."""
    device = q.device.type if isinstance(q, Tensor) else "none"
    if device not in KEYS or not torch.is_autocast_enabled(device):
        return q, *others
    return cast(device, q, *others)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Disables autocast on the device, so that products of fp32 tensors stay fp32."""
    # torch.compile before 2.11 cannot trace torch.amp's query of which devices have autocast.
    if device.type in KEYS:
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
