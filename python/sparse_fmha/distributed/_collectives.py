"""Differentiable communication between ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha.distributed import _groups

Context = Any  # torch.autograd.function.FunctionCtx, whose attributes are not typed


def all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sends `sent[r]` to rank r; returns `[world, ...]`, what each rank sent to this one."""
    if derivatives.requires_grad(sent):
        return _AllToAll.apply(sent, group)  # type: ignore[no-any-return, no-untyped-call]
    return _all_to_all(sent, group)


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


def _all_to_all(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    received = torch.empty_like(sent, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, sent.contiguous(), group=group)
    return received


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
    def forward(ctx: Context, sent: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_to_all(sent, group)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
        return all_to_all(gradient, ctx.group), None


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
