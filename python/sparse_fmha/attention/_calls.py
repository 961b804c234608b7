"""Calls the op of a public function and checks each argument once.

The ops check their arguments. Python checks first only where an op may not see the actual tensors:
during tracing, or where a tensor subclass handles the op. Elsewhere Python checks only after the op
has raised, to turn its error into a ValueError or TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_fmha import _checks, skipping
from sparse_fmha._ops import derivatives, errors, symbolic
from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.attention import _scores as scores
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.operands import check_block_mask, check_stripe_mask
from sparse_fmha.masks.stripe_mask import StripeMask

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_PLAIN_NUMBERS = (float, type(None))
_namespace = torch.ops.sparse_fmha

Rest = tuple[object, ...]  # the op's arguments after q, k and v
Check = Callable[[], Rest]  # checks and returns them


def op_checks(scale: Any, *values: Any) -> bool:
    """Whether the op receives these arguments unchanged, and so checks them itself.

    As a scale it would take a tensor of one element, too, and wait for its device.
    """
    if torch.compiler.is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if type(scale) not in _PLAIN_NUMBERS:
        return False
    for value in values:
        if type(value) in _PLAIN_NUMBERS:
            continue
        if type(value) not in _PLAIN_TENSORS or value.is_meta:  # also during tracing
            return False
    return True


def per_axis(value: Any, axes: int, kind: type[int]) -> Sequence[int] | None:
    """One entry per axis from a value, tuple or list of exactly type `kind`; None for the rest."""
    if type(value) is kind:
        return [value] * axes
    if type(value) is not tuple and type(value) is not list:
        return None
    for entry in value:
        if type(entry) is not kind:
            return None
    return value


def run(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rest: Rest | None,
    check: Check,
    skip_threshold: float | Tensor,
    counted: bool,
    biases: scores.Biases = (),
) -> list[Tensor]:
    """Calls an op of attention.

    Args:
        rest: the arguments up to the skip threshold, unchecked; None: use those that `check`
            returns.
        skip_threshold: as the user gave it.
        counted: count tiles even if the threshold is 0.
        biases: the op's arguments after the skip threshold.

    Raises:
        ValueError, TypeError: from `check`, which also runs if the op has refused `rest`.
        RuntimeError: from the op; NotImplementedError if no kernel takes the call yet.
    """
    skips = counted or type(skip_threshold) is not float or skip_threshold != 0
    if rest is None:
        rest = check()
        if skips or biases:
            rest = *rest, skipping.threshold_of(skip_threshold, q, counted) if skips else None
        try:
            results: list[Tensor] = symbolic.call(name, q, k, v, *rest, *scores.flat(biases, q))
        except RuntimeError as refusal:
            raise errors.typed(refusal) from None
        return results
    try:
        if skips:
            rest = *rest, skipping.threshold_of(skip_threshold, q, counted)
        if biases:
            rest = *rest, *(() if skips else (None,)), *scores.flat(biases, q)
        op = getattr(_namespace, name)
        if derivatives.wanted(q, k, v, *rest):
            return op(q, k, v, *rest)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():
            results = op(q, k, v, *rest)
    except (RuntimeError, ValueError, TypeError) as refusal:
        try:
            check()
        except (ValueError, TypeError) as error:
            raise error from None
        raise errors.typed(refusal) from None
    return results


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
) -> tuple[bool, float | None]:
    """Checks and returns the op's arguments after v up to the skip threshold.

    There is one such `Check` per mechanism.
    """
    q, k, v = cast_where_enabled(q, k, v)
    checked = causal, _checks.check_attention(q, k, v, causal, scale)
    scores.check(q, k, softcap, key_bias)
    return checked


def check_neighborhood(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    causal: bool | Sequence[bool],
    scale: float | None,
    extra_k: Tensor | None,
    extra_v: Tensor | None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
) -> Rest:
    q, k, v, cast_k, cast_v = cast_where_enabled(q, k, v, extra_k, extra_v)
    _checks.check_qkv(q, k, v, axes=(1, 2, 3))
    _checks.check_grid(q, k)
    _checks.check_extra(cast_k, cast_v, q, k, v)
    scores.check(q, k, softcap, key_bias)
    axes = q.dim() - 3
    windows = _checks.per_axis("window", window, axes)
    strides = _checks.per_axis("stride", stride, axes)
    dilations = _checks.per_axis("dilation", dilation, axes)
    causals = _checks.per_axis("causal", causal, axes, bool)
    _checks.check_neighborhood(q.shape[1:-2], windows, strides, dilations, causals)
    return windows, strides, dilations, causals, _checks.finite("scale", scale), extra_k, extra_v


def check_block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float | None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
) -> Rest:
    q, k, v = cast_where_enabled(q, k, v)
    _checks.check_qkv(q, k, v, axes=(1,))
    check_block_mask(mask, q, k)
    scores.check(q, k, softcap, key_bias, row_threshold)
    return block_arguments(mask, _checks.finite("scale", scale))


def block_arguments(mask: BlockMask, scale: float | None) -> Rest:
    return (
        mask.counts,
        mask.indices,
        mask.partial_counts,
        mask.partial_indices,
        mask.partial_bits,
        mask.block_q,
        mask.block_kv,
        mask.causal,
        scale,
    )


def check_stripe(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: StripeMask,
    scale: float | None,
    softcap: float = 0.0,
    key_bias: Tensor | None = None,
    row_threshold: Tensor | None = None,
) -> Rest:
    q, k, v = cast_where_enabled(q, k, v)
    _checks.check_qkv(q, k, v, axes=(1,))
    check_stripe_mask(mask, q, k)
    scores.check(q, k, softcap, key_bias, row_threshold)
    return stripe_arguments(mask, _checks.finite("scale", scale))


def stripe_arguments(mask: StripeMask, scale: float | None) -> Rest:
    return (
        mask.columns,
        mask.counts,
        mask.range_starts,
        mask.range_counts,
        mask.block_q,
        mask.range_size,
        mask.causal,
        scale,
    )
