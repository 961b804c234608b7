"""Translates arguments of torch's `scaled_dot_product_attention` to a call of this library."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _python_dispatch

from sparse_fmha import _checks
from sparse_fmha._ops import derivatives
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.attention import attention, block_sparse_attention
from sparse_fmha.masks.block_mask import BlockMask


class Refusal(Exception):  # noqa: N818  (it decides which way a call goes)
    """This library does not compute the call; the message is the reason."""


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Turns errors raised by checks inside into `Refusal`. Nothing may be computed inside."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Refusal(str(error)) from error


class SdpaCall(NamedTuple):
    """A call that has passed the checks of the function that computes it.

    q is `[B, Lq, Hq, D]`, k and v are `[B, Lkv, Hkv, D]`, in the dtype that autocast requires.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None  # bool [B or 1, H or 1, Lq, Lkv]
    causal: bool  # aligned to the first query and key
    scale: float | None
    flat: bool  # torch's tensors are [B, L, D]

    def run(self) -> Tensor:
        """Returns the output in torch's layout, that of query."""
        q, k, v = self.q, self.k, self.v
        if self.mask is not None:
            mask = BlockMask.from_dense(self.mask)
            out = block_sparse_attention(q, k, v, mask, scale=self.scale)
        elif not self.causal:
            out = attention(q, k, v, scale=self.scale)
        else:
            # `attention` aligns to the last query: the first queries form a square with the keys,
            # the rest see all keys.
            square = min(q.shape[1], k.shape[1])
            head = q[:, :square], k[:, :square], v[:, :square]
            out = attention(*head, causal=True, scale=self.scale)
            if square < q.shape[1]:
                out = torch.cat([out, attention(q[:, square:], k, v, scale=self.scale)], 1)
        return out.squeeze(2) if self.flat else out.transpose(1, 2)


def arrange(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> SdpaCall:
    """Returns the call for torch's arguments, in torch's signature. Computes nothing.

    Raises:
        NotImplementedError: a feature of torch that this library lacks, or an argument that the
            checks of `attention` refuse.
        TypeError: an argument of the wrong type.
        ValueError: heads or a mask that do not match, or both a mask and `is_causal`.
    """
    given = {"query": query, "key": key, "value": value}
    for name, tensor in given.items():
        _checks.check_strided(name, tensor)
        if tensor.dim() not in (3, 4) or tensor.dim() != query.dim():
            raise NotImplementedError(
                f"{name} must have 3 or 4 dimensions, as many as query, got {tensor.dim()}"
            )
        _check_tangent(name, tensor)
    _check_float("dropout_p", dropout_p)
    if dropout_p != 0:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}")
    if scale is not None:
        _check_float("scale", scale)
    _checks.check_flag("is_causal", is_causal)
    _checks.check_flag("enable_gqa", enable_gqa)
    flat = query.dim() == 3
    q, k, v = (x.unsqueeze(2) if flat else x.transpose(1, 2) for x in given.values())
    q, k, v = cast_where_enabled(q, k, v)
    try:
        scale = _checks.check_attention(q, k, v, is_causal, scale)
    except (TypeError, ValueError) as error:
        raise NotImplementedError(str(error)) from error
    # One head of keys and values is broadcast to all query heads, even without enable_gqa.
    if not enable_gqa and k.shape[2] not in (1, q.shape[2]):
        raise ValueError(
            f"key must have 1 head or the {q.shape[2]} heads of query unless enable_gqa is True, "
            f"got {k.shape[2]}"
        )
    if attn_mask is not None:
        if is_causal:
            raise ValueError("is_causal must be False with an attn_mask, got True")
        attn_mask = _expanded(attn_mask, q, k, flat)
    return SdpaCall(q, k, v, attn_mask, is_causal, scale, flat)


def _check_tangent(name: str, tensor: Tensor) -> None:
    if derivatives.has_tangent(tensor):
        raise NotImplementedError(
            f"{name} must not have a tangent: forward-mode derivatives are not supported"
        )


def _check_float(name: str, value: float) -> None:
    """Checks the type as torch's own functions do, which take no other number."""
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a float, got {value!r}")


def _expanded(mask: Tensor, q: Tensor, k: Tensor, flat: bool) -> Tensor:
    """Returns the mask as a bool view `[B or 1, H or 1, Lq, Lkv]`."""
    _checks.check_strided("attn_mask", mask)
    if mask.dtype != torch.bool:
        raise NotImplementedError(f"attn_mask must have dtype torch.bool, got {mask.dtype}")
    if mask.device != q.device:
        raise ValueError(f"attn_mask must be on the device of query, {q.device}, got {mask.device}")
    heads = () if flat else (q.shape[2],)
    whole = (q.shape[0], *heads, q.shape[1], k.shape[1])
    fits = zip(reversed(mask.shape), reversed(whole), strict=False)
    if not 2 <= mask.dim() <= len(whole) or any(m not in (1, n) for m, n in fits):
        raise ValueError(
            f"attn_mask must have 2 to {len(whole)} dimensions that broadcast to {list(whole)}, "
            f"got shape {list(mask.shape)}"
        )
    if flat and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    return mask[(None,) * (4 - mask.dim())].expand(-1, -1, q.shape[1], k.shape[1])


def check_kernel(call: SdpaCall) -> None:
    """Checks that this device has kernels for such tensors, including gradients if required.

    Raises:
        NotImplementedError: with the op's message.
    """
    gradients = any(derivatives.requires_grad(x) for x in (call.q, call.k, call.v))
    kind = (
        call.q.device,
        call.q.dtype,
        call.q.shape[-1],
        call.v.shape[-1],
        call.causal,
        call.mask is not None,
    )
    problem = _problem_with(*kind, gradients)
    if problem is not None:
        raise NotImplementedError(problem)


@functools.cache
def _problem_with(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    causal: bool,
    masked: bool,
    gradients: bool,
) -> str | None:
    """Runs the ops on one token and returns their error message, if any.

    This is the only way to find a missing kernel or an unsupported GPU. It runs once for each kind
    of tensors.
    """
    with (
        torch.set_grad_enabled(gradients),
        torch.autocast(device.type, enabled=False),
        torch._C.DisableTorchFunction(),
        _python_dispatch._disable_current_modes(),
    ):
        x, v = (
            torch.zeros(1, 1, 1, dim, dtype=dtype, device=device, requires_grad=gradients)
            for dim in (head_dim, value_dim)
        )
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device) if masked else None
        try:
            out = SdpaCall(x, x, v, mask, causal, None, False).run()
            if gradients:
                torch.autograd.grad(out.sum(), (x, v))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return str(error).partition("\n")[0]
    return None
