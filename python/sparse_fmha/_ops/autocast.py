"""What `torch.autocast` does to the tensors of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register(library: torch.library.Library, op: torch._ops.OpOverload, end: int) -> None:
    """Registers that the arguments before `end` are cast."""
    for device, key in KEYS.items():
        library.impl(op._opname, _casting(op, end, device), key)


def _casting(op: torch._ops.OpOverload, end: int, device: str) -> Callable[..., list[Tensor]]:
    def run(*args: object) -> list[Tensor]:
        with torch.autocast(device, enabled=False):
            return op(*cast(device, *args[:end]), *args[end:])

    return run


def cast(device: str, *args: object) -> tuple:
    """The arguments, with tensors of that device in the dtype `torch.autocast` asks for there.

    As PyTorch's own ops under autocast, fp64 is left alone.
    """
    dtype = torch.get_autocast_dtype(device)
    casts = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.device.type == device and a.dtype in casts else a
        for a in args
    )


def cast_where_enabled(q: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as the op would cast them, so that what is checked is what it gets."""
    device = q.device.type if isinstance(q, Tensor) else "none"
    if device not in KEYS or not torch.is_autocast_enabled(device):
        return q, *others
    return cast(device, q, *others)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Products of fp32 tensors stay fp32."""
    # Asking torch.amp which devices have autocast is not traced by torch.compile before 2.11.
    if device.type in KEYS:
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()
