"""Merges the results of attention over parts of the keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._checks import check_collection, check_floats
from sparse_fmha._ops import derivatives, merging


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention over disjoint parts of the keys into attention over all keys.

    `out = sum_i exp(lse_i - lse) out_i` with `lse = log sum_i exp(lse_i)`. This is exact: attention
    over all keys is a weighted mean of attention over the parts (Milakov and Gimelshein 2018,
    arXiv:1805.02867). Computed in fp32, or fp64 for fp64 outputs.

    Args:
        outs: one or more tensors `[B, *L, H, D]` with the same shape, dtype and device.
        lses: as many tensors `[B, *L, H]`, natural logs; -inf where a query sees no key of a part.

    Returns:
        out in the dtype of outs, and lse in the dtype of lses. A query that sees no key in any part
        has out 0, lse -inf and derivatives 0.

    Differentiable any number of times, in forward and reverse mode. Without derivatives, up to 32
    parts are merged by one kernel, which reads each element once and takes no memory beside the
    results; out is contiguous there.

    Raises:
        ValueError: no parts, different numbers of outs and lses, shapes that do not match, or
            tensors on different devices.
        TypeError: a part is not a floating point tensor, or the dtypes of outs or lses differ.
    """
    check_collection("outs", outs)
    check_collection("lses", lses)
    if not len(outs) or len(outs) != len(lses):
        raise ValueError(
            "outs and lses must have the same number of parts, at least one, got "
            f"{len(outs)} and {len(lses)}"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part(i, out, lse, outs[0], lses[0])
    if is_plain(*outs, *lses) and merging.takes(outs, lses):
        result: tuple[Tensor, Tensor] = torch.ops.sparse_fmha.merge(outs, lses)
        return result
    return _with_derivatives(outs, lses)


def merge_into_first(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`merge` of results of attention that nothing else uses: where no derivative is wanted, the
    result takes the memory of the first one, in compiled graphs too. A graph would compute another
    form of it in a later, larger kernel, and hold all parts until then."""
    traced = torch.compiler.is_compiling() and not derivatives.wanted_in_graph(*outs, *lses)
    in_place = (traced or is_plain(*outs, *lses)) and outs[0].stride(-1) == 1
    if not in_place or not merging.takes(outs, lses):
        return merge(outs, lses)
    return outs[0], torch.ops.sparse_fmha.merge_into(outs[0], outs[1:], lses)


def is_plain(*tensors: Tensor) -> bool:
    """Whether results may be written in place, some rows or heads at a time: no derivative is
    wanted, and nothing is traced."""
    return not (
        torch.compiler.is_compiling()
        or derivatives.wanted(*tensors)
        or any(type(x) not in (Tensor, torch.nn.Parameter) for x in tensors)
    )


def _with_derivatives(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition, by differentiable functions of torch, for any dtype and number of parts."""
    wide = torch.promote_types(outs[0].dtype, torch.float32)
    stacked = torch.stack([lse.to(wide) for lse in lses])
    empty = (stacked == -torch.inf).all(0)
    total = stacked.masked_fill(empty, 0).logsumexp(0)  # finite, so that derivatives are finite
    lse = total.masked_fill(empty, -torch.inf).to(lses[0].dtype)
    weights = (stacked - total).exp()
    nothing = weights == 0  # such a part contributes nothing, even if it holds NaN
    merged = sum(
        (w[..., None] * out).masked_fill(none[..., None], 0)
        for w, none, out in zip(weights, nothing, outs, strict=True)
    )
    assert isinstance(merged, Tensor)
    return merged.to(outs[0].dtype), lse


def _check_part(i: int, out: Tensor, lse: Tensor, first: Tensor, first_lse: Tensor) -> None:
    for name, tensor, like in ((f"outs[{i}]", out, first), (f"lses[{i}]", lse, first_lse)):
        check_floats(name, tensor)
        if tensor.dtype != like.dtype:
            what = name.partition("[")[0]
            raise TypeError(
                f"{name} must have the dtype of {what}[0], {like.dtype}, got {tensor.dtype}"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of outs[0], {first.device}, got {tensor.device}"
            )
    if out.shape != first.shape or lse.shape != out.shape[:-1]:
        raise ValueError(
            f"outs[{i}] must have the shape of outs[0], {list(first.shape)}, and lses[{i}] that "
            f"without the last dimension, got {list(out.shape)} and {list(lse.shape)}"
        )
