"""torch.vmap over the ops: folds the mapped dimension into the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo


def register(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Registers vmap for an op whose tensors all have the batch as their first dimension.

    The first argument has the whole batch. Integer tensors may have size 1 there, which broadcasts.
    """

    def run(
        info: VmapInfo, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[Tensor | tuple[Tensor, ...], int | tuple[int, ...]]:
        mapped, first = info.batch_size, in_dims[0]
        batch = args[0].shape[0] if first is None else args[0].movedim(first, 0).shape[1]
        pairs = list(zip(args, in_dims, strict=True))
        lists = any(_is_list(arg) and dim is not None for arg, dim in pairs)
        results = op(*(_fold(arg, dim, mapped, batch, lists) for arg, dim in pairs))
        if isinstance(results, Tensor):
            return results.unflatten(0, (mapped, batch)), 0
        unfolded = tuple(result.unflatten(0, (mapped, batch)) for result in results)
        return unfolded, (0,) * len(unfolded)

    torch.library.register_vmap(op._schema.name, run, lib=library)


def _fold(arg: object, dim: int | None, mapped: int, batch: int, lists: bool) -> object:
    """Folds a tensor `[batch, ...]`, mapped over `dim` or not, to `[mapped * batch, ...]`.

    Args:
        lists: some integer tensor is mapped, so lists of the mask cannot be shared by the batch.
    """
    if not isinstance(arg, Tensor) or (dim is None and arg.dim() == 0):  # a number
        return arg
    is_list = _is_list(arg)
    if dim is None and is_list and not lists and arg.shape[0] == 1:
        return arg
    arg = arg.expand(mapped, *arg.shape) if dim is None else arg.movedim(dim, 0)
    if is_list and arg.shape[1] == 1:
        arg = arg.expand(-1, batch, *arg.shape[2:])
    folded = arg.flatten(0, 1)
    has_strides = not is_list and folded.dim() >= 4  # q, k and v; the ops read others as contiguous
    return folded if has_strides else folded.contiguous()


def _is_list(arg: object) -> bool:
    """Whether the argument is a tensor of a mask."""
    return isinstance(arg, Tensor) and not arg.is_floating_point()
