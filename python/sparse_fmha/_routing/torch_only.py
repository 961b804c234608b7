"""Finds calls of torch's functions that must stay with torch, whatever their arguments are.

`route_sdpa` and `Calibration.collecting` intercept calls before torch does. Transforms, tracing and
tensor subclasses must still reach torch. All checks here raise NotImplementedError with the reason,
and compute nothing that is recorded anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils import _python_dispatch


def _override(kind: type[Tensor]) -> object:
    function = kind.__torch_function__
    return getattr(function, "__func__", function)


_WITHOUT_OVERRIDE = (torch._C._disabled_torch_function_impl, _override(Tensor))


def check_eager(arguments: Iterable[object]) -> None:
    """Checks that the call runs eagerly, on plain tensors."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError("inside a transform of torch.func")
    if torch._C._is_tracing():
        raise NotImplementedError("inside torch.jit.trace")
    for argument in arguments:
        if isinstance(argument, Tensor) and _overrides(type(argument)):
            raise NotImplementedError(f"{type(argument).__name__} handles torch's functions itself")


def _overrides(kind: type[Tensor]) -> bool:
    """Whether a tensor subclass overrides torch's functions."""
    return (
        _override(kind) not in _WITHOUT_OVERRIDE
        or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def check_readable() -> None:
    """Checks that the host can read tensor values at this point."""
    if _python_dispatch._get_current_dispatch_mode() is not None:
        raise NotImplementedError("values cannot be read inside a TorchDispatchMode")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError("values cannot be read while a CUDA graph is captured")


def check_values(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    """Checks for numbers for which every kernel gives the same result.

    For others torch's result depends on the kernel it picks: several multiply hidden scores, -inf,
    by a scale that is negative or 0 (also 0 after rounding). Values that are not finite and scores
    that overflow are checked on the CPU only: reading them elsewhere would wait for the device.
    """
    numbers = torch.finfo(torch.promote_types(q.dtype, torch.float32))
    if scale is not None and scale < numbers.tiny:
        raise NotImplementedError("a scale of 0 or less, for which torch's kernels differ")
    if q.device.type != "cpu" or _python_dispatch._get_current_dispatch_mode() is not None:
        return
    largest_q, largest_k, largest_v = (_largest(x) for x in (q, k, v))
    factor = 1.0 if scale is None else max(1.0, abs(scale))
    score = largest_q * largest_k * q.shape[-1] * factor
    if not all(x <= numbers.max for x in (factor, score, largest_v * k.shape[1])):
        raise NotImplementedError("values that are not finite, or scores that overflow")


def _largest(x: Tensor) -> float:
    """Returns the largest absolute value, or NaN if there is one."""
    if not x.numel():
        return 0.0
    return float(torch.linalg.vector_norm(x.detach(), torch.inf))
