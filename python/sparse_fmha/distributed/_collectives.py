"""Differentiable communication between ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha.distributed import _groups

Context = Any  # torch.autograd.function.FunctionCtx, whose attributes are not typed
# How many entries are sent to each rank, and received from each; None for as many.
Splits = tuple[list[int], list[int]] | None


def all_to_all(sent: Tensor, group: dist.ProcessGroup, splits: Splits = None) -> Tensor:
    """Sends `sent[r]` to rank r; returns `[world, ...]`, what each rank sent to this one.

    With splits, sends as many entries of the first dimension to each rank, and receives as many.
    """
    if derivatives.requires_grad(sent):
        return _AllToAll.apply(sent, group, splits)  # type: ignore[no-any-return, no-untyped-call]
    return _all_to_all(sent, group, splits)


def all_gather(part: Tensor, group: dist.ProcessGroup, world: int) -> Tensor:
    """Concatenates the ranks' parts along the first dimension."""
    if derivatives.requires_grad(part):
        return _AllGather.apply(part, group, world)  # type: ignore[no-any-return, no-untyped-call]
    return _all_gather(part, group, world)


def shared(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Marks a tensor that is whole and equal on every rank, of which each rank uses a part.

    Its gradient is then also whole and equal on every rank: the sum of the ranks' gradients.
    """
    if derivatives.requires_grad(x):
        return _Shared.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]
    return x


def _all_to_all(sent: Tensor, group: dist.ProcessGroup, splits: Splits) -> Tensor:
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


def _all_gather(part: Tensor, group: dist.ProcessGroup, world: int) -> Tensor:
    part = part.contiguous()
    whole = part.new_empty(world * part.shape[0], *part.shape[1:])
    _groups.all_gather(whole, part, group)
    return whole


def _sum_to_parts(whole: Tensor, group: dist.ProcessGroup, world: int) -> Tensor:
    """Returns this rank's part of the sum over ranks; 16-bit numbers are added in fp32."""
    wide = whole.to(torch.promote_types(whole.dtype, torch.float32)).contiguous()
    part = wide.new_empty(wide.shape[0] // world, *wide.shape[1:])
    _groups.reduce_scatter(part, wide, group)
    return part.to(whole.dtype)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, sent: Tensor, group: dist.ProcessGroup, splits: Splits) -> Tensor:
        ctx.group, ctx.splits = group, splits
        return _all_to_all(sent, group, splits)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_to_all(gradient, ctx.group, reverse(ctx.splits)), None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, part: Tensor, group: dist.ProcessGroup, world: int) -> Tensor:
        ctx.group, ctx.world = group, world
        return _all_gather(part, group, world)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _sum_to_parts(gradient, ctx.group, ctx.world), None, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        wide = wide.contiguous()
        dist.all_reduce(wide, group=ctx.group)
        return wide.to(gradient.dtype), None
