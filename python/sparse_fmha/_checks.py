"""Argument checks. Messages name the argument, its value, and what is allowed.

A message is formatted only where it is raised: torch.compile cannot print a symbolic number.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar, overload

import torch
from torch import Tensor

DTYPES = {
    "cpu": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16),
}
MAX_HEAD_DIM = 256
LARGEST_FLOAT = sys.float_info.max
LARGEST_INT = 2**31 - 1  # of a window, stride or dilation: the kernels count in 32 bits

Args = ParamSpec("Args")
Result = TypeVar("Result")


def check_strided(name: str, tensor: Tensor) -> None:
    """Checks for a strided tensor: not nested, not sparse."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else f"layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")


def check_tensor(name: str, tensor: Tensor, devices: Sequence[str] = tuple(DTYPES)) -> None:
    """Checks for a strided tensor with a dtype and device that some kernel supports."""
    check_strided(name, tensor)
    device = tensor.device.type
    if device not in devices:
        raise ValueError(f"{name} must be on {one_of(devices)}, got {tensor.device}")
    if tensor.dtype not in DTYPES.get(device, DTYPES["cuda"]):
        allowed = one_of(DTYPES.get(device, DTYPES["cuda"]))
        raise TypeError(f"{name} must have dtype {allowed} on {device}, got {tensor.dtype}")


def check_like(
    name: str, tensor: Tensor, q: Tensor, devices: Sequence[str] = tuple(DTYPES)
) -> None:
    """Checks that an operand has q's dtype and device, and a last stride of 1."""
    check_tensor(name, tensor, devices)
    if tensor.dtype != q.dtype:
        raise TypeError(f"{name} must have q's dtype, {q.dtype}, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
    if tensor.dim() and tensor.numel() and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} must have stride 1 in its last dimension, got {tensor.stride(-1)}"
        )


def check_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: Sequence[int],
    devices: Sequence[str] = tuple(DTYPES),
) -> None:
    """Checks q `[B, *Lq, Hq, D]`, k `[B, *Lkv, Hkv, D]` and v `[B, *Lkv, Hkv, Dv]`.

    Args:
        axes: allowed numbers of token axes.
    """
    check_tensor("q", q, devices)
    if q.dim() - 3 not in axes:
        ranks = " to ".join(str(n + 3) for n in (axes[0], axes[-1])[: len(axes)])
        raise ValueError(
            f"q must have {ranks} dimensions (batch, tokens, heads, head dim), got shape "
            f"{list(q.shape)}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_like(name, tensor, q, devices)
        shape = tensor.shape
        if len(shape) != q.dim():
            raise ValueError(
                f"{name} must have {q.dim()} dimensions like q, got shape {list(shape)}"
            )
        if shape[0] != q.shape[0]:
            raise ValueError(f"{name} must have q's batch, {q.shape[0]}, got {shape[0]}")
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k must have q's head dim, {q.shape[-1]}, got {k.shape[-1]}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v must have k's shape but for the head dim, {list(k.shape)}, got {list(v.shape)}"
        )
    check_head_dim("head dim of q", q.shape[-1])
    check_head_dim("head dim of v", v.shape[-1])
    check_groups(q.shape[-2], k.shape[-2])


def check_one_dim(q: Tensor, v: Tensor, name: str = "v") -> None:
    """Checks that values, which `name` names, have q's head dim."""
    if v.dim() and v.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{name} must have q's head dim, {q.shape[-1]}, got {v.shape[-1]}; attention, "
            "block_sparse_attention, neighborhood_attention and stripe_attention take others"
        )


def check_qkv_of_one_dim(q: Tensor, k: Tensor, v: Tensor, axes: Sequence[int]) -> None:
    """`check_qkv` where v must have q's head dim."""
    check_qkv(q, k, v, axes)
    check_one_dim(q, v)


def check_head_dim(name: str, value: int) -> None:
    if not 8 <= value <= MAX_HEAD_DIM or value % 8:
        raise ValueError(f"{name} must be a multiple of 8 from 8 to {MAX_HEAD_DIM}, got {value}")


def check_groups(heads: int, heads_kv: int, kv: str = "k and v") -> None:
    """Checks that each head of k and v, which `kv` names, serves as many heads of q."""
    if heads % heads_kv if heads_kv else heads:
        raise ValueError(
            f"heads of q must be a multiple of those of {kv}, got {heads} and {heads_kv}"
        )


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None
) -> float | None:
    """Checks the arguments of `attention` except skipping; returns the scale as a float or None."""
    check_qkv(q, k, v, axes=(1,))
    check_flag("causal", causal)
    return finite("scale", scale)


def check_grid(q: Tensor, k: Tensor) -> None:
    """Checks that q and k have the same grid."""
    if q.shape[1:-2] != k.shape[1:-2]:
        raise ValueError(f"k must have q's grid, {list(q.shape[1:-2])}, got {list(k.shape[1:-2])}")


def check_extra(
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    devices: Sequence[str] = tuple(DTYPES),
) -> None:
    """Checks extra tokens, `[B, N, Hkv, D]` and `[B, N, Hkv, Dv]`: both tensors or neither."""
    if (extra_k is None) != (extra_v is None):
        given, missing = ("k", "v") if extra_v is None else ("v", "k")
        raise ValueError(f"extra_{missing} must be given with extra_{given}, got only the latter")
    if extra_k is None or extra_v is None:
        return
    for name, tensor, like in (("extra_k", extra_k, k), ("extra_v", extra_v, v)):
        check_like(name, tensor, q, devices)
        batch, heads, dim = like.shape[0], *like.shape[-2:]
        if tensor.dim() != 4 or (tensor.shape[0], *tensor.shape[2:]) != (batch, heads, dim):
            raise ValueError(
                f"{name} must have shape [{batch}, any, {heads}, {dim}], got {list(tensor.shape)}"
            )
    if extra_k.shape[1] != extra_v.shape[1]:
        raise ValueError(
            f"extra_v must have the {extra_k.shape[1]} tokens of extra_k, got {extra_v.shape[1]}"
        )


def check_token_numbers(
    name: str, tensor: Tensor, q: Tensor, tokens: Sequence[int], allow_grid: bool = False
) -> None:
    """Checks numbers of tokens, fp32 `[B or 1, Hq or 1, tokens]` or there `*tokens` of a grid."""
    check_strided(name, tensor)
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must have dtype torch.float32, got {tensor.dtype}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device, {q.device}, got {tensor.device}")
    batch, heads = q.shape[0], q.shape[-2]
    flat = math.prod(tokens)
    shape = tuple(tensor.shape)
    fits = shape[2:] == (flat,) or (allow_grid and shape[2:] == tuple(tokens))
    if not fits or shape[0] not in (1, batch) or shape[1] not in (1, heads):
        ways = str(flat)
        if allow_grid and len(tokens) > 1:
            ways += f"] or [{batch} or 1, {heads} or 1, {', '.join(map(str, tokens))}"
        raise ValueError(
            f"{name} must have shape [{batch} or 1, {heads} or 1, {ways}], batch, query heads and "
            f"tokens, got {list(shape)}"
        )


def one_of(values: Iterable[object]) -> str:
    """Returns the allowed values as a message lists them: "a, b or c"."""
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last


def check_written(name: str, tensor: Tensor) -> None:
    """Checks that a tensor to write to is not expanded."""
    if not tensor.numel():
        return
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            raise ValueError(f"{name} must have each element once, got stride 0 in dimension {dim}")


def check_integers(name: str, tensor: Tensor) -> None:
    """Checks a strided tensor of integers of any width; bool counts."""
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.is_complex():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {got}")
    check_strided(name, tensor)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | str]) -> None:
    """Checks for a strided tensor of a shape; a word stands for any size."""
    check_strided(name, tensor)
    sizes = zip(tensor.shape, shape, strict=False)
    if tensor.dim() != len(shape) or any(not isinstance(n, str) and s != n for s, n in sizes):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def check_numbers(
    name: str, tensor: Tensor, shape: Sequence[int | str], device: torch.device
) -> None:
    """Checks for integers of a shape, as in `check_shape`, on a device."""
    check_integers(name, tensor)
    check_shape(name, tensor, shape)
    check_device(name, tensor, device)


def check_collection(name: str, value: object) -> None:
    if not isinstance(value, Collection) or isinstance(value, str):
        raise TypeError(f"{name} must be a sequence, got {value!r}")


def check_instance(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def plain_ints(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Converts other integers, such as NumPy's, among the arguments of a function to ints.

    NumPy's have the arithmetic of their width, and torch and `bit_length` do not take all of them.
    """

    @functools.wraps(function)
    def call(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        given: list[Any] = [_plain(value) for value in args]
        named: dict[str, Any] = {name: _plain(value) for name, value in kwargs.items()}
        return function(*given, **named)

    return call


def _plain(value: object) -> object:
    if type(value) is tuple or type(value) is list:
        return type(value)(map(_plain, value))
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return value


def as_int(value: int) -> int:
    """Converts to a Python int. A SymInt is kept, or the graph would be specialized to it."""
    return value if isinstance(value, torch.SymInt) else int(value)


@overload
def finite(name: str, value: float) -> float: ...


@overload
def finite(name: str, value: float | None) -> float | None: ...


def finite(name: str, value: float | None) -> float | None:
    """Returns a finite number as a float, a symbolic one as a SymFloat, and None as None."""
    if value is None:
        return None
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return torch.sym_float(value)
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a finite number or None, got {value!r}")
    number = as_float(value)
    if not abs(number) <= LARGEST_FLOAT:  # not math.isfinite, which is not traced
        raise ValueError(f"{name} must be a finite number, got {value}")
    return number


def as_float(value: Any) -> float:
    """Converts to a Python float; an int too large for one becomes infinite.

    Before comparing: NumPy would convert the bounds to the type of a smaller number, and warn.
    """
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def per_axis(name: str, value: object, axes: int, kind: type = Integral) -> list[int]:
    """Expands one value, or a sequence of values, to one entry for each token axis."""
    values: list[Any] = list(value) if isinstance(value, Sequence) else [value] * axes
    for entry in values:
        if kind is Integral and isinstance(entry, torch.SymInt):
            continue
        if not isinstance(entry, kind) or (kind is not bool and isinstance(entry, bool)):
            wanted = "a bool" if kind is bool else "an int"
            raise TypeError(f"{name} must be {wanted} or a tuple of them, got {value!r}")
    if len(values) != axes:
        raise ValueError(
            f"{name} must have one entry for each of q's {axes} token axes, got {value!r}"
        )
    return [as_int(entry) for entry in values]


def check_neighborhood(
    grid: Sequence[int],
    window: list[int],
    stride: list[int],
    dilation: list[int],
    causal: list[int],
) -> None:
    """Checks the rules of generalized neighborhood attention on each axis."""
    axes = zip(grid, window, stride, dilation, causal, strict=True)
    for axis, (length, w, s, d, ends) in enumerate(axes):
        if d < 1:
            raise ValueError(f"dilation[{axis}] must be at least 1, got {d}")
        if w < 1:
            raise ValueError(f"window[{axis}] must be at least 1, got {w}")
        if length == 0 if ends else w * d > length:
            raise ValueError(
                f"window[{axis}] * dilation[{axis}] must be at most the {length} tokens of that "
                f"axis, got {w} * {d}"
            )
        if not torch.compiler.is_compiling() and max(w, d) > LARGEST_INT:  # would limit a program
            name, value = ("window", w) if w > LARGEST_INT else ("dilation", d)
            raise ValueError(f"{name}[{axis}] must be at most 2^31 - 1, got {value}")
        if not 1 <= s <= w:
            raise ValueError(f"stride[{axis}] must be from 1 to window[{axis}] = {w}, got {s}")


def check_int(name: str, value: int, low: int = 0) -> int:
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if _is_known(value < low):
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if _is_known(value >= 1 << 63):
        raise ValueError(f"{name} must be less than 2^63, got {value}")
    return as_int(value)


def _is_known(fact: bool) -> bool:
    """False while a number is traced that only a run knows, such as `lengths.max().item()`."""
    if torch.compiler.is_dynamo_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        return guard_or_false(fact)
    return fact


def check_number(name: str, value: float | None, low: float, high: float) -> float:
    """Checks for a number in [low, high]; returns it as a float."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = as_float(value)
    if not low <= number <= high:
        allowed = f"from {low} to {high}"
        if high == LARGEST_FLOAT:
            allowed = "finite" if low == -high else f"finite and at least {low}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return number


def check_positive(name: str, value: float) -> float:
    """Checks for a finite number above 0; returns it as a float."""
    number = check_number(name, value, 0, LARGEST_FLOAT)
    if not number:
        raise ValueError(f"{name} must be above 0, got {value}")
    return number


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be {one_of(allowed)}, got {value!r}")


def check_floats(name: str, tensor: Tensor, dims: int | None = None, shape: str = "") -> None:
    """Checks for a strided floating point tensor, with `dims` dimensions if that is given."""
    check_strided(name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must have a floating point dtype, got {tensor.dtype}")
    if dims is not None and tensor.dim() != dims:
        raise ValueError(f"{name} must have shape {shape}, got {list(tensor.shape)}")


def check_q_and_k(q: Tensor, k: Tensor, names: tuple[str, str] = ("q", "k")) -> None:
    """Checks q `[B, Lq, Hq, D]` and k `[B, Lkv, Hkv, D]`: one device, Hq a multiple of Hkv."""
    for name, tensor in zip(names, (q, k), strict=True):
        check_floats(name, tensor, 4, "[batch, tokens, heads, head dim]")
    first, second = names
    if q.device != k.device:
        raise ValueError(f"{second} must be on {first}'s device, {q.device}, got {k.device}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(
            f"{second} must have the batch and head dim of {first}, of shape {list(q.shape)}, got "
            f"shape {list(k.shape)}"
        )
    heads, heads_kv = q.shape[2], k.shape[2]
    if not heads_kv or heads % heads_kv:
        raise ValueError(
            f"heads of {first} must be a multiple of those of {second}, got {heads} and {heads_kv}"
        )
