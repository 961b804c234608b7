"""torch.vmap over the ops: folds the mapped dimension into the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo

SHARED = ("key_bias", "row_threshold")
SAVED = "skipped"  # by the forward op, for each entry of its batch


def register(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Registers vmap for an op whose tensors all have the batch as their first dimension.

    The first argument has the whole batch. Integer tensors, and numbers of tokens (`SHARED`), may
    have size 1 there, which broadcasts.
    """
    names = [argument.name for argument in op._schema.arguments]

    def run(
        info: VmapInfo, in_dims: tuple[int | None, ...], *args: Any
    ) -> tuple[Tensor | tuple[Tensor, ...], int | tuple[int, ...]]:
        mapped, first = info.batch_size, in_dims[0]
        batch = args[0].shape[0] if first is None else args[0].movedim(first, 0).shape[1]
        pairs = list(zip(args, in_dims, strict=True))
        lists = any(_is_list(arg) and dim is not None for arg, dim in pairs)

        def fold(name: str, arg: object, dim: int | None) -> object:
            if name in SHARED:
                return _fold_shared(arg, dim, batch, mapped, own=False)
            if _is_list(arg) and name != SAVED:
                return _fold_shared(arg, dim, batch, mapped, own=lists)
            return _fold(arg, dim, mapped)

        # Only for the given arguments: the dispatcher drops trailing defaults.
        results = op(*(fold(name, *pair) for name, pair in zip(names, pairs, strict=False)))
        if isinstance(results, Tensor):
            return results.unflatten(0, (mapped, batch)), 0
        unfolded = tuple(result.unflatten(0, (mapped, batch)) for result in results)
        return unfolded, (0,) * len(unfolded)

    torch.library.register_vmap(op._schema.name, run, lib=library)


def _fold(arg: object, dim: int | None, mapped: int) -> object:
    """Folds a tensor `[batch, ...]`, mapped over `dim` or not, to `[mapped * batch, ...]`."""
    if not isinstance(arg, Tensor) or (dim is None and arg.dim() == 0):  # a number
        return arg
    folded = _mapped(arg, dim, mapped).flatten(0, 1)
    has_strides = folded.dim() >= 4  # q, k and v; the ops read others as contiguous
    return folded if has_strides else folded.contiguous()


def _fold_shared(arg: object, dim: int | None, batch: int, mapped: int, own: bool) -> object:
    """The same for a tensor that may have one entry for the whole batch.

    Args:
        own: each mapped entry needs its own: lists of one mask are shared together or not at all.
    """
    if not isinstance(arg, Tensor) or (dim is None and not own and arg.shape[0] == 1):
        return arg
    arg = _mapped(arg, dim, mapped)
    if arg.shape[1] == 1:
        arg = arg.expand(-1, batch, *arg.shape[2:])
    return arg.flatten(0, 1).contiguous()


def _mapped(arg: Tensor, dim: int | None, mapped: int) -> Tensor:
    return arg.expand(mapped, *arg.shape) if dim is None else arg.movedim(dim, 0)


def _is_list(arg: object) -> bool:
    """Whether the argument is a tensor of a mask."""
    return isinstance(arg, Tensor) and not arg.is_floating_point()
