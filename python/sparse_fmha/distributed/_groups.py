"""Resolves process groups and checks that ranks agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from sparse_fmha import _checks
from sparse_fmha._ops import derivatives
from sparse_fmha.distributed import _masks

Group = dist.ProcessGroup | DeviceMesh | None


def resolve(group: Group) -> tuple[dist.ProcessGroup, int, int]:
    """Returns the process group, this process's rank in it, and its size.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError: group is neither a process group nor a mesh.
        ValueError: the mesh has several dimensions, or this process is not in the group.
    """
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised; call torch.distributed.init_process_group first"
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                "group must be a mesh of one dimension, the one that the sequence is sharded over, "
                f"such as mesh['cp'], got {group.ndim} dimensions {group.mesh_dim_names or ''}"
            )
        if group.get_coordinate() is None:
            raise ValueError("the mesh given as group must contain this process")
        group = group.get_group()
    # new_group returns this to a process outside the group; it is not a ProcessGroup.
    outside: object = dist.GroupMember.NON_GROUP_MEMBER
    if group is outside:
        raise ValueError("group must contain this process")
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            "group must be a ProcessGroup, a DeviceMesh of one dimension or None, got "
            f"{type(group).__name__}"
        )
    return group, dist.get_rank(group), dist.get_world_size(group)


def name_of(group: dist.ProcessGroup) -> str:
    """The name by which an op finds the group."""
    name: str = group.group_name
    return name


def of_name(name: str) -> dist.ProcessGroup:
    """The group of that name."""
    found: dist.ProcessGroup = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
    return found


def all_gather(
    whole: Tensor, part: Tensor, group: dist.ProcessGroup, **options: bool
) -> dist.Work | None:
    """Writes the parts of all ranks into `whole`, concatenated along the first dimension."""
    # torch 2.13 renamed this function and warns about the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(whole, part, group=group, **options)  # type: ignore[no-any-return]


def reduce_scatter(
    part: Tensor, whole: Tensor, group: dist.ProcessGroup, **options: bool
) -> dist.Work | None:
    """Writes this rank's part of the sum over the ranks' `whole` into `part`."""
    # Renamed in torch 2.13 too.
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(part, whole, group=group, **options)  # type: ignore[no-any-return]


def of_gradients(name: str) -> str:
    """The name of an operation's way back."""
    return f"{name}, of gradients,"


def named(name: str) -> contextlib.AbstractContextManager[None]:
    """Adds the name of an operation to the error of a collective, such as a timeout."""
    # torch.compile traces no handler of what a collective raises.
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _named(name)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"{name} failed on global rank {dist.get_rank()}; another rank may have raised, or be "
            f"later than the group's timeout: {error}"
        ) from error


def check_local(**tensors: Tensor) -> None:
    """Checks this rank's parts: plain tensors `[B, L / world, H, D]`, one dtype, no tangents."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} must be this rank's part of the sequence, {name}.to_local(), got DTensor"
            )
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have shape [batch, tokens of this rank, heads, head dim], got "
                f"{list(tensor.shape)}"
            )
        check_no_tangent(name, tensor)


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Checks for a tangent: communication into a buffer would silently lose it."""
    if derivatives.has_tangent(tensor):
        raise NotImplementedError(
            f"{name} must not carry a tangent: forward-mode derivatives are not supported; detach "
            "the inputs"
        )


def check_no_derivative(name: str, tensor: Tensor) -> None:
    """Checks a part of which every rank gets the whole sequence."""
    if derivatives.requires_grad(tensor):
        raise NotImplementedError(
            f"{name} must not require grad: every rank gets the whole sequence and has its own "
            "loss, so there is no single gradient; call it under torch.no_grad(), or detach "
            f"{name}"
        )
    check_no_tangent(name, tensor)


def check_options(options: dict[str, Any], function: str) -> None:
    if options.pop("return_stats", False):
        raise ValueError(
            f"{function} does not support return_stats, because each rank counts its own tiles"
        )


def shapes(q: Tensor, k: Tensor, tokens: bool = True) -> dict[str, int]:
    """What ranks must have in common, as numbers."""
    found = {
        "q's batch": q.shape[0], "q's tokens": q.shape[1], "q's heads": q.shape[2],
        "q's head dim": q.shape[3], "k's tokens": k.shape[1], "k's heads": k.shape[2],
        "q's dtype": q.dtype.itemsize * 2 + (q.dtype == torch.bfloat16),
    }  # fmt: skip
    return {name: size for name, size in found.items() if tokens or "tokens" not in name}


def gathered(
    values: list[int], like: Tensor, group: dist.ProcessGroup, world: int
) -> list[list[int]]:
    """The values of each rank; waits for the device."""
    sent = torch.tensor(values, device=like.device)
    received = sent.new_empty(world * len(values))
    with named("the comparison of the ranks' shapes"):
        all_gather(received, sent, group)
    rows: list[list[int]] = received.view(world, -1).tolist()
    return rows


def compare(names: list[str], rows: list[list[int]], hint: str = "") -> None:
    """Checks that all ranks have the values of the first."""
    first, *others = rows
    for rank, row in enumerate(others, 1):
        for name, size, expected in zip(names, row, first, strict=True):
            if size != expected:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {expected} on rank 0 and {size} on "
                    f"rank {rank}{hint}"
                )


def agreed(
    mine: dict[str, int], q: Tensor, k: Tensor, group: dist.ProcessGroup, world: int, hint: str = ""
) -> list[tuple[int, int]]:
    """Returns the tokens in q and k of each rank; all ranks raise if anything in `mine` differs.

    All raise the same error, so no rank waits for the others. Waits for the device.
    """
    rows = gathered([*mine.values(), q.shape[1], k.shape[1]], q, group, world)
    compare(list(mine), [row[:-2] for row in rows], hint)
    return [(row[-2], row[-1]) for row in rows]


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, mask: _masks.MaskOrFunction, flags: dict[str, int],
    group: dist.ProcessGroup, world: int, validate: bool, any_lengths: bool = False,
) -> list[tuple[int, int]]:  # fmt: skip
    """Runs all checks that do not depend on the function, shapes across ranks first.

    Returns:
        The tokens in q and k of each rank; without `validate` as many as on this one.
    """
    check_local(q=q, k=k, v=v)
    kind = _masks.kind(mask)
    lengths = [(q.shape[1], k.shape[1])] * world
    if validate:
        sizes = (0,) * 6
        if isinstance(mask, _masks.MASKS):
            sizes = (*mask.shape, mask.block_q, int(mask.causal))
        names = ("batch", "heads", "q_len", "kv_len", "block_q", "causal")
        mine = shapes(q, k, tokens=not any_lengths) | {"kind of mask": kind} | flags
        mine |= {f"mask's {name}": size for name, size in zip(names, sizes, strict=True)}
        hint = f"; pad a sequence that the {world} ranks do not divide, or use pass_kv"
        lengths = agreed(mine, q, k, group, world, "" if any_lengths else hint)
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    if isinstance(mask, _masks.MASKS):
        _masks.check_whole(mask, *(sum(row[place] for row in lengths) for place in (0, 1)))
    return lengths
