"""Differentiable communication between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha.distributed import _groups

Context = Any  # torch.autograd.function.FunctionCtx, whose attributes are not typed
# How many entries are sent to each rank, and received from each; None for as many.
Splits = tuple[list[int], list[int]] | None


def all_to_all(
    sent: Tensor, group: dist.ProcessGroup, name: str, splits: Splits = None
) -> Tensor:  # fmt: skip
    """Sends `sent[r]` to rank r; returns `[world, ...]`, what each rank sent to this one.

    With splits, sends as many entries of the first dimension to each rank, and receives as many.
    All functions here take the name of the operation for errors, such as a timeout.
    """
    if derivatives.requires_grad(sent):
        return _AllToAll.apply(sent, group, name, splits)  # type: ignore[no-any-return, no-untyped-call]
    return _all_to_all(sent, group, name, splits)


def all_gather(part: Tensor, group: dist.ProcessGroup, world: int, name: str) -> Tensor:
    """Concatenates the ranks' parts along the first dimension."""
    if derivatives.requires_grad(part):
        return _AllGather.apply(part, group, world, name)  # type: ignore[no-any-return, no-untyped-call]
    return _all_gather(part, group, world, name)


def padded(part: Tensor, lengths: Sequence[int]) -> Tensor:
    """This rank's part, as long as the longest along the first dimension."""
    missing = max(lengths) - part.shape[0]
    if not missing:
        return part
    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])])


def trimmed(whole: Tensor, lengths: Sequence[int]) -> Tensor:
    """What `all_gather` made of the ranks' padded parts, without what was added."""
    most = max(lengths)
    if min(lengths) == most:
        return whole
    parts = zip(whole.split(most), lengths, strict=True)
    return torch.cat([part[:length] for part, length in parts])


def shared(x: Tensor, group: dist.ProcessGroup, name: str) -> Tensor:
    """Marks a tensor that is whole and equal on every rank, of which each rank uses a part.

    Its gradient is then also whole and equal on every rank: the sum of the ranks' gradients.
    """
    if derivatives.requires_grad(x):
        return _Shared.apply(x, group, name)  # type: ignore[no-any-return, no-untyped-call]
    return x


def _all_to_all(sent: Tensor, group: dist.ProcessGroup, name: str, splits: Splits) -> Tensor:
    with _groups.named(name):
        received, _ = start_all_to_all(sent, group, splits, async_op=False)
    return received


def start_all_to_all(
    sent: Tensor, group: dist.ProcessGroup, splits: Splits, async_op: bool
) -> tuple[Tensor, Any]:
    """Returns what is received, and with async_op the work that fills it."""
    sent = sent.contiguous()
    if splits is None:
        received = torch.empty_like(sent)
        return received, dist.all_to_all_single(received, sent, group=group, async_op=async_op)
    out, back = splits
    received = sent.new_empty(sum(back), *sent.shape[1:])
    work = dist.all_to_all_single(received, sent, back, out, group=group, async_op=async_op)
    return received, work


def reverse(splits: Splits) -> Splits:
    """Those of the way back."""
    return None if splits is None else (splits[1], splits[0])


def _all_gather(part: Tensor, group: dist.ProcessGroup, world: int, name: str) -> Tensor:
    part = part.contiguous()
    whole = part.new_empty(world * part.shape[0], *part.shape[1:])
    with _groups.named(name):
        _groups.all_gather(whole, part, group)
    return whole


def _sum_to_parts(whole: Tensor, group: dist.ProcessGroup, world: int, name: str) -> Tensor:
    """Returns this rank's part of the sum over ranks; 16-bit numbers are added in fp32."""
    wide = whole.to(torch.promote_types(whole.dtype, torch.float32)).contiguous()
    part = wide.new_empty(wide.shape[0] // world, *wide.shape[1:])
    with _groups.named(name):
        _groups.reduce_scatter(part, wide, group)
    return part.to(whole.dtype)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, sent: Tensor, group: dist.ProcessGroup, name: str, splits: Splits
    ) -> Tensor:
        ctx.group, ctx.name, ctx.splits = group, name, splits
        return _all_to_all(sent, group, name, splits)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        name = _groups.of_gradients(ctx.name)
        return all_to_all(gradient, ctx.group, name, reverse(ctx.splits)), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, part: Tensor, group: dist.ProcessGroup, world: int, name: str
    ) -> Tensor:
        ctx.group, ctx.world, ctx.name = group, world, name
        return _all_gather(part, group, world, name)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        name = _groups.of_gradients(ctx.name)
        return _sum_to_parts(gradient, ctx.group, ctx.world, name), None, None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, group: dist.ProcessGroup, name: str) -> Tensor:
        ctx.group, ctx.name = group, name
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        wide = wide.contiguous()
        with _groups.named(_groups.of_gradients(ctx.name)):
            dist.all_reduce(wide, group=ctx.group)
        return wide.to(gradient.dtype), None, None
