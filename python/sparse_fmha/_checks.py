"""Checks of arguments. Messages name the argument, its value, and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16),
}
MAX_HEAD_DIM = 256


def require(condition: bool, message: str, error: type[Exception] = ValueError) -> None:
    if not condition:
        raise error(message)


def check_tensor(name: str, tensor: Tensor) -> None:
    """A tensor of a dtype and on a device that some kernel takes, with a unit last stride."""
    require(
        isinstance(tensor, Tensor), f"{name} is a {type(tensor).__name__}, not a tensor", TypeError
    )
    device = tensor.device.type
    require(device in DTYPES, f"{name} is on {tensor.device}; allowed are: {', '.join(DTYPES)}")
    require(
        tensor.dtype in DTYPES[device],
        f"{name} has dtype {tensor.dtype}; allowed on {device} are: "
        + ", ".join(map(str, DTYPES[device])),
        TypeError,
    )


def check_like(name: str, tensor: Tensor, q: Tensor) -> None:
    """What an operand shares with q besides its shape."""
    check_tensor(name, tensor)
    require(
        tensor.dtype == q.dtype,
        f"{name} has dtype {tensor.dtype}, q has {q.dtype}; all must have one",
        TypeError,
    )
    require(
        tensor.device == q.device,
        f"{name} is on {tensor.device}, q on {q.device}; all must be on one device",
    )
    require(
        tensor.numel() == 0 or tensor.stride(-1) == 1,
        f"{name} has stride {tensor.stride(-1)} in its last dimension; 1 is needed",
    )


def check_qkv(q: Tensor, k: Tensor, v: Tensor, axes: int | None = None) -> None:
    """q `[B, *Lq, Hq, D]`, k and v `[B, *Lkv, Hkv, D]`; `axes` token axes, None: one to three."""
    check_tensor("q", q)
    ranks = range(4, 7) if axes is None else (axes + 3,)
    require(
        q.dim() in ranks,
        f"q has shape {list(q.shape)}; {' to '.join(str(r) for r in {min(ranks), max(ranks)})} "
        "dimensions are needed: batch, tokens, heads, head dim",
    )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_like(name, tensor, q)
        shape = list(tensor.shape)
        require(tensor.dim() == q.dim(), f"{name} has shape {shape}; q has {q.dim()} dimensions")
        require(shape[0] == q.shape[0], f"{name} has batch {shape[0]}, q has {q.shape[0]}")
        require(shape[-1] == q.shape[-1], f"{name} has head dim {shape[-1]}, q has {q.shape[-1]}")
    require(
        k.shape == v.shape,
        f"k has shape {list(k.shape)}, v has {list(v.shape)}; they must be the same",
    )
    head_dim, heads, heads_kv = q.shape[-1], q.shape[-2], k.shape[-2]
    require(
        8 <= head_dim <= MAX_HEAD_DIM and head_dim % 8 == 0,
        f"q has head dim {head_dim}; multiples of 8 from 8 to {MAX_HEAD_DIM} are allowed",
    )
    require(
        heads % heads_kv == 0 if heads_kv else heads == 0,
        f"q has {heads} heads, k and v have {heads_kv}; q's must be a multiple of theirs",
    )


def check_extra(extra_k: Tensor | None, extra_v: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Extra tokens `[B, N, Hkv, D]`: both tensors or neither."""
    given, missing = ("k", "v") if extra_v is None else ("v", "k")
    require(
        (extra_k is None) == (extra_v is None),
        f"extra_{given} is given without extra_{missing}; both or neither",
    )
    if extra_k is None or extra_v is None:
        return
    for name, tensor in (("extra_k", extra_k), ("extra_v", extra_v)):
        check_like(name, tensor, q)
        require(
            tensor.dim() == 4
            and (tensor.shape[0], *tensor.shape[2:]) == (q.shape[0], *k.shape[-2:]),
            f"{name} has shape {list(tensor.shape)}; "
            f"[{q.shape[0]}, any, {k.shape[-2]}, {k.shape[-1]}] is needed",
        )
    require(
        extra_k.shape == extra_v.shape,
        f"extra_k has shape {list(extra_k.shape)}, extra_v has {list(extra_v.shape)}; "
        "they must be the same",
    )


def finite(name: str, value: float | None) -> float | None:
    """A finite number as a float; None stays None."""
    if value is None:
        return None
    require(
        isinstance(value, Real),
        f"{name} is {value!r}; a finite number or None is needed",
        TypeError,
    )
    require(math.isfinite(value), f"{name} is {value}; a finite number is needed")
    return float(value)


def check_skip_threshold(value: float) -> None:
    """In [0, 1); and for now 0."""
    require(isinstance(value, Real), f"skip_threshold is {value!r}; a number is needed", TypeError)
    require(0 <= value < 1, f"skip_threshold is {value}; 0 <= skip_threshold < 1 is needed")
    require(
        value == 0,
        f"skip_threshold is {value}; softmax skipping is not there yet, only 0 works",
        NotImplementedError,
    )


def per_axis(name: str, value: object, axes: int, kind: type = Integral) -> list[int]:
    """One entry for each token axis, from one value or a sequence of them."""
    values = list(value) if isinstance(value, Sequence) else [value] * axes
    wanted = "a bool" if kind is bool else "an int"
    for entry in values:
        fits = isinstance(entry, kind) and (kind is bool or not isinstance(entry, bool))
        require(fits, f"{name} is {value!r}; {wanted} or a tuple of them is needed", TypeError)
    require(
        len(values) == axes,
        f"{name} is {value!r}: {len(values)} entries, but q has {axes} token axes",
    )
    return [int(entry) for entry in values]


def check_neighborhood(
    grid: Sequence[int], window: list[int], stride: list[int], dilation: list[int]
) -> None:
    """The rules of generalized neighborhood attention on each axis."""
    for axis, (length, w, s, d) in enumerate(zip(grid, window, stride, dilation, strict=True)):
        require(d >= 1, f"dilation[{axis}] is {d}; at least 1 is needed")
        require(w >= 2, f"window[{axis}] is {w}; at least 2 is needed")
        require(
            w * d <= length,
            f"window[{axis}] * dilation[{axis}] is {w} * {d}; "
            f"the grid has {length} tokens on that axis",
        )
        require(1 <= s <= w, f"stride[{axis}] is {s}; 1 to window[{axis}] = {w} are allowed")
