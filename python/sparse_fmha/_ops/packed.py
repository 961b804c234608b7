"""Ops over packed sequences: their vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo


def register(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    torch.library.register_vmap(op._schema.name, _one_by_one(op), lib=library)


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
