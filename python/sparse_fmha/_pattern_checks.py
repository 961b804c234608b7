"""Checks of what selects blocks. Messages name the argument, its value, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor


def check_int(name: str, value: int, low: int = 0) -> int:
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; an int is needed")
    if value < low:
        raise ValueError(f"{name} is {value}; at least {low} is needed")
    return int(value)


def check_number(name: str, value: float, low: float, high: float) -> float:
    """A number in [low, high]."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; a number is needed")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; {low} to {high} are allowed")
    return float(value)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are: {', '.join(allowed)}")


def check_floats(name: str, tensor: Tensor, dims: int | None = None, shape: str = "") -> None:
    """A tensor of floating point numbers, with `dims` dimensions if that is given."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}, not a tensor")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} has dtype {tensor.dtype}; a floating point dtype is needed")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} has shape {list(tensor.shape)}; {shape} is needed")


def check_q_and_k(q: Tensor, k: Tensor, names: tuple[str, str] = ("q", "k")) -> None:
    """q `[B, Lq, Hq, D]` and k `[B, Lkv, Hkv, D]`, Hq a multiple of Hkv, on one device."""
    for name, tensor in zip(names, (q, k), strict=True):
        check_floats(name, tensor, 4, "[batch, tokens, heads, head dim]")
    first, second = names
    if q.device != k.device:
        raise ValueError(f"{second} is on {k.device}, {first} on {q.device}; one device is needed")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"{second} has shape {list(k.shape)}, {first} has {list(q.shape)}; batch and head dim "
            "must be the same"
        )
    heads, heads_kv = q.shape[2], k.shape[2]
    if not heads_kv or heads % heads_kv:
        raise ValueError(
            f"{first} has {heads} heads, {second} has {heads_kv}; the first must be a multiple of "
            "the second"
        )
