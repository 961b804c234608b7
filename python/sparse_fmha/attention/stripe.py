"""Attention over lists of keys and of runs of keys."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

from torch import Tensor

from sparse_fmha.attention import _calls
from sparse_fmha.attention._results import Output, run
from sparse_fmha.attention._scores import given
from sparse_fmha.masks.operands import has_lengths
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.skipping import SkipStats


@overload
def stripe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
) -> Tensor: ...


@overload
def stripe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
) -> tuple[Tensor, Tensor]: ...


@overload
def stripe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
) -> tuple[Tensor, SkipStats]: ...


@overload
def stripe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: Literal[True],
    return_stats: Literal[True],
) -> tuple[Tensor, Tensor, SkipStats]: ...


@overload
def stripe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output: ...


def stripe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
    sink: Tensor | None = None,
    skip_threshold: float | Tensor = 0.0,
    return_lse: bool = False,
    return_stats: bool = False,
) -> Output:
    """Attention over single keys and runs of keys that a mask lists for each group of queries.

    This is the third stage of AnchorAttention (Zhang et al. 2025, arXiv:2505.23520), and serves
    vertical-slash patterns (Jiang et al. 2024, arXiv:2407.02490). Single keys are gathered one by
    one, runs are read as contiguous memory, and one softmax covers both.

    Args:
        q: `[B, Lq, Hq, D]`. For dtypes, strides and D see `attention`.
        k: `[B, Lkv, Hkv, D]`; Hq is a multiple of Hkv.
        v: `[B, Lkv, Hkv, Dv]`; see `attention`.
        mask: on q's device, for lengths Lq and Lkv, with lists for B or 1 batch entries and Hq or 1
            heads. Keys out of range are ignored; a key listed twice counts twice.
            `StripeMask.validate` finds both.
        scale: factor of q.k; default `D**-0.5`. May be negative.
        row_threshold: fp32 `[B or 1, Hq or 1, Lq]`: of the keys that the mask shows, query i sees
            key j only if `key_bias[j] >= row_threshold[i]`, which needs key_bias; NaN hides all.
            It has no gradient.
        softcap, key_bias, sink, skip_threshold, return_lse, return_stats: see `attention`.

    Returns:
        `out`, `[B, Lq, Hq, Dv]`, contiguous, in q's dtype; with `return_lse` also `lse`,
        `[B, Lq, Hq]` in fp32, natural log. A query that sees no key has out 0 and lse -inf.

    For autocast and gradients see `attention`.

    Raises:
        ValueError, TypeError, RuntimeError: see `attention`; also for a mask with other lengths, on
            another device, or with lists for another number of heads or batch entries.
    """
    biases = given(softcap, key_bias, row_threshold)
    scores = softcap, key_bias, row_threshold
    check = partial(_calls.check_stripe, q, k, v, mask, scale, *scores)
    rest = None
    if type(mask) is StripeMask and _calls.op_checks(scale, q, k, v, mask.counts, *biases):
        rest = _calls.stripe_arguments(mask, scale) if has_lengths(mask, q, k) else None
    return run(
        "stripe", q, k, v, rest, check,
        skip_threshold, return_lse, return_stats, sink, biases,
    )  # fmt: skip
