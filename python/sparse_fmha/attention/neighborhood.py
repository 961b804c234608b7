"""Neighborhood attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, overload

from torch import Tensor

from sparse_fmha.attention import _calls
from sparse_fmha.attention._results import Output, run
from sparse_fmha.attention._scores import given
from sparse_fmha.skipping import SkipStats


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    softcap: float = 0.0,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    softcap: float = 0.0,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    softcap: float = 0.0,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
) -> tuple[Tensor, SkipStats]: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    softcap: float = 0.0,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[True],
    return_stats: Literal[True],
) -> tuple[Tensor, Tensor, SkipStats]: ...


@overload
def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    softcap: float = 0.0,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output: ...


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    softcap: float = 0.0,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    key_bias: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Generalized neighborhood attention on a grid of one to three axes.

    Every query sees a window of W keys on each axis. The window lies around the query if `stride`
    is 1, else around the leader of its group of `stride` queries. At the borders the window shifts
    and keeps its size (Hassani et al. 2025, "Generalized Neighborhood Attention",
    arXiv:2504.16922). With dilation d a query sees only keys with its own residue modulo d. On a
    causal axis it sees no later key.

    Args:
        q: `[B, *L, Hq, D]` with one to three token axes `*L`. For dtypes, strides and D see
            `attention`.
        k: `[B, *L, Hkv, D]` on the same grid; Hq is a multiple of Hkv.
        v: `[B, *L, Hkv, Dv]`; see `attention`.
        window: W of each axis in tokens, at least 1; with 1 a query sees only its own position on
            that axis. W * dilation may not exceed the axis's length, unless the axis is causal:
            there a longer window sees every key up to the query.
        stride: of each axis, 1 (neighborhood attention) to W (blocked attention).
        dilation: of each axis, at least 1.
        causal: of each axis.
        scale: factor of q.k; default `D**-0.5`. May be negative.
        extra_k: `[B, N, Hkv, D]`, tokens outside the grid that every query sees too.
        extra_v: `[B, N, Hkv, Dv]`.
        softcap: see `attention`; extra tokens' scores are capped, too.
        key_bias: as in `attention`, `[B or 1, Hq or 1, *L]` or with the grid's tokens in one axis;
            extra tokens have none.
        sink, skip_threshold, return_lse, return_stats: see `attention`.

    One int (or bool) for window, stride, dilation or causal applies to all axes.

    Returns:
        `out`, `[B, *L, Hq, Dv]`, contiguous, in q's dtype; with `return_lse` also `lse`,
        `[B, *L, Hq]` in fp32, natural log, as in `attention`.

    For autocast and gradients see `attention`.

    Raises:
        ValueError, TypeError, RuntimeError: see `attention`; also for a window larger than the
            grid, a stride larger than the window, or a tuple of the wrong length.
    """
    arguments = window, stride, dilation, causal, scale, extra_k, extra_v, softcap, key_bias
    biases = given(softcap, key_bias)
    check = partial(_calls.check_neighborhood, q, k, v, *arguments)
    rest = None
    extra = () if extra_k is extra_v is None else (extra_k, extra_v)
    if q is not None and _calls.op_checks(scale, q, k, v, *extra, *biases):
        axes = q.dim() - 3
        of_axes = (
            _calls.per_axis(window, axes, int),
            _calls.per_axis(stride, axes, int),
            _calls.per_axis(dilation, axes, int),
            _calls.per_axis(causal, axes, bool),
        )
        if None not in of_axes:
            rest = *of_axes, scale, extra_k, extra_v
    return run(
        "neighborhood", q, k, v, rest, check,
        skip_threshold, return_lse, return_stats, sink, biases,
    )  # fmt: skip
