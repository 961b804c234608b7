"""Ops over packed sequences: their vmap, and their error on CUDA, where they have no kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo

from sparse_fmha._ops import errors


def register(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Registers vmap of an op, and the error that it raises for CUDA tensors."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeExplicitAutograd"):
        library.impl(op._opname, on_cuda(op), "CUDA")
    torch.library.register_vmap(op._schema.name, _one_by_one(op), lib=library)


def on_cuda(op: torch._ops.OpOverload) -> Callable[..., NoReturn]:
    def refuse(*_args: object) -> NoReturn:
        raise errors.on_cpu_only(
            op._schema.name,
            " or call sparse_fmha.varlen_attention, which takes CUDA tensors, over block lists",
        )

    return refuse


def _one_by_one(op: torch._ops.OpOverload) -> Callable[..., tuple[Any, Any]]:
    """Makes vmap of an op: a call for each entry, since sequences differ between entries."""

    def run(
        info: VmapInfo, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        calls = [
            op(*(x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return run
