"""Differentiable communication that runs while a rank computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha.distributed import _collectives, _groups

Context = Any  # torch.autograd.function.FunctionCtx, whose attributes are not typed
# Takes what is sent; returns the tensor that is received, and the work that fills it.
Collective = Callable[[Tensor], tuple[Tensor, Any]]


class Transfer:
    """One collective that is started here and finished by `wait`, in both passes.

    The backward pass of `wait` starts the reverse collective, and that of the start finishes it.
    Autograd runs the nodes that were made last first, so gradients travel while earlier slices
    compute. The tensors of a collective are referenced until the current stream waits for it,
    which is why they need no `record_stream`.
    """

    def __init__(self, sent: Tensor, forward: Collective, backward: Collective, name: str) -> None:
        self._forward, self._backward, self._name = forward, backward, name
        self._back_name = _groups.of_gradients(name)
        self._flight: tuple[Tensor, Tensor, Any] | None = None
        self._received: Tensor | None
        if derivatives.requires_grad(sent):
            self._received = _Start.apply(sent, self)  # type: ignore[no-untyped-call]
        else:
            self._received = self.start(sent, forward)

    def wait(self) -> Tensor:
        """Returns what was received; the current stream waits for it."""
        received, self._received = self._received, None
        assert received is not None, "a transfer is waited for once"
        if received.requires_grad:
            return _Wait.apply(received, self)  # type: ignore[no-any-return, no-untyped-call]
        return self.finish()

    def start(self, sent: Tensor, collective: Collective) -> Tensor:
        with _groups.named(self._name):
            received, work = collective(sent)
        self._flight = sent, received, work
        return received

    def finish(self) -> Tensor:
        assert self._flight is not None, "a transfer is finished once"
        (_, received, work), self._flight = self._flight, None
        if work is not None:
            with _groups.named(self._name):
                work.wait()
        return received

    def start_reverse(self, gradient: Tensor) -> None:
        self._name = self._back_name
        self.start(gradient, self._backward)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, sent: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer, ctx.dtype = transfer, sent.dtype
        return transfer.start(sent, transfer._forward)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, _: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.finish().to(ctx.dtype), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, received: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.finish()
        return received.view_as(received)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.transfer.start_reverse(gradient)
        return gradient, None  # only passes through; _Start returns what was received


def all_to_all(
    sent: Tensor, group: dist.ProcessGroup, name: str, splits: _collectives.Splits = None
) -> Transfer:
    """`_collectives.all_to_all` as a transfer."""

    def run(way: _collectives.Splits) -> Collective:
        return lambda x: _collectives.start_all_to_all(x, group, way, async_op=True)

    return Transfer(sent, run(splits), run(_collectives.reverse(splits)), name)


def all_gather(part: Tensor, group: dist.ProcessGroup, world: int, name: str) -> Transfer:
    """Concatenates the ranks' parts along the first dimension.

    Gradients are added up over the ranks in fp32, or fp64 for fp64 tensors.
    """

    def gather(x: Tensor) -> tuple[Tensor, Any]:
        x = x.contiguous()
        whole = x.new_empty(world * x.shape[0], *x.shape[1:])
        return whole, _groups.all_gather(whole, x, group, async_op=True)

    def scatter(gradient: Tensor) -> tuple[Tensor, Any]:
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).contiguous()
        own = wide.new_empty(wide.shape[0] // world, *wide.shape[1:])
        return own, _groups.reduce_scatter(own, wide, group, async_op=True)

    return Transfer(part, gather, scatter, name)
