"""Sharding rules of the ops for DTensor: over the batch and over heads, without communication."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._op_schema import OpSchema, OpStrategy, RuntimeSchemaInfo
from torch.distributed.tensor._ops.utils import expand_to_full_mesh_op_strategy

from sparse_fmha import _ops
from sparse_fmha.distributed import _masks
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask

if TYPE_CHECKING:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

# Arguments [B, *L, H, D], [B, *L, H] and [B]; others are [B, H, ...].
TOKENS = ("q", "k", "v", "extra_k", "extra_v", "out", "dout")
OF_QUERIES = ("lse", "dlse")
WITHOUT_HEADS = ("skip_threshold",)

_registered = False


def register_sharding() -> None:
    """Registers the ops with DTensor. Importing `sparse_fmha.distributed` calls this.

    All attention ops, forward and backward, are sharded over the batch or over heads; a mesh of
    several dimensions may do both. Lists of a mask that are shared by all batch entries or all
    heads are replicated there. With fewer key heads than query heads, heads are sharded only if the
    key heads divide evenly. DTensor redistributes tensors with other placements, as for its own
    ops. Repeated calls do nothing.
    """
    global _registered
    if _registered:
        return
    for name in (f"{mechanism}_{way}" for mechanism in _ops.MECHANISMS for way in ("fwd", "bwd")):
        op = getattr(torch.ops.sparse_fmha, name).default
        names = [argument.name for argument in op._schema.arguments]
        static = names.index("lse" if "lse" in names else "v") + 1
        # torch's own `register_sharding` treats a list of results as one tensor.
        DTensor._op_dispatcher.sharding_propagator.register_op_strategy(
            op, _strategy_of(names), RuntimeSchemaInfo(static_argnum=static, needs_pytree=True)
        )
    _registered = True


def distribute_mask(
    mask: BlockMask | StripeMask, mesh: DeviceMesh, placements: Sequence[Placement]
) -> BlockMask | StripeMask:
    """Distributes a mask's lists as DTensors, for a q `[B, Lq, Hq, D]` with the given placements.

    Args:
        mask: the whole mask, the same on every rank of the mesh.
        mesh: q's mesh.
        placements: q's placements, one for each dimension of the mesh: `Shard(0)` (batch),
            `Shard(2)` (heads) or `Replicate()`. Lists shared by all batch entries or all heads are
            replicated there.

    Returns:
        A mask for `block_sparse_attention` or `stripe_attention` on DTensors. To query what is
        listed, use the whole mask.

    Raises:
        TypeError: mask is not a BlockMask or StripeMask.
        ValueError: another placement, or not one placement for each dimension of the mesh.
    """
    if not isinstance(mask, BlockMask | StripeMask):
        raise TypeError(f"mask must be a BlockMask or StripeMask, got {type(mask).__name__}")
    if len(placements) != mesh.ndim:
        raise ValueError(
            f"placements must have one entry for each of the {mesh.ndim} dimensions of the mesh, "
            f"got {len(placements)}"
        )
    of_list: list[Placement] = []
    for placement in placements:
        list_dim = {Replicate(): None, Shard(0): 0, Shard(2): 1}.get(placement, -1)
        if list_dim == -1:
            raise ValueError(
                "placement of q must be Shard(0) (batch), Shard(2) (heads) or Replicate(), got "
                f"{placement}"
            )
        if list_dim is None or mask.counts.shape[list_dim] == 1:
            of_list.append(Replicate())
        else:
            of_list.append(Shard(list_dim))
    return _masks.with_tensors(mask, lambda lists: distribute_tensor(lists, mesh, of_list))


def _strategy_of(names: Sequence[str]) -> Callable[[OpSchema], OpStrategy]:
    """Returns the strategy function that tells DTensor how an op with these arguments can run."""

    def strategy(called: OpSchema) -> OpStrategy:
        args = [
            arg.strategies[0].output_spec if isinstance(arg, OpStrategy) else arg
            for arg in called.args_schema
        ]
        given = dict(zip(names, args, strict=False))
        found, outputs = _shardings(given)
        mesh = called.get_mesh_from_args()
        return expand_to_full_mesh_op_strategy(mesh, called, found, input_index=outputs)

    return strategy


def _shardings(given: Mapping[str, Any]) -> tuple[list[list[Placement | None]], int]:
    """The alternative placements on one mesh dimension, outputs before inputs; and the number of
    outputs.
    """
    q, k = given["q"], given["k"]
    heads = _heads_of_gradients(given) if "dout" in given else _heads_of_results(given)
    replicated = [Replicate() if _is_tensor(arg) else None for arg in given.values()]
    found: list[list[Placement | None]] = [[*(Replicate() for _ in heads), *replicated]]
    by_batch = [_place(name, arg, 0) for name, arg in given.items()]
    found.append([*(Shard(0) for _ in heads), *by_batch])
    if _heads_divide(q.shape[-2], k.shape[-2], q.mesh.shape):
        by_heads = [_place(name, arg, 1) for name, arg in given.items()]
        outputs = (Replicate() if dim is None else Shard(dim) for dim in heads)
        found.append([*outputs, *by_heads])
    return found, len(heads)


def _heads_of_results(given: Mapping[str, Any]) -> list[int | None]:
    """The head dimension of out, lse, the tile counts and the bits of skipped tiles."""
    dim = len(given["q"].shape) - 2
    if given.get("skip_threshold") is None:
        return [dim, dim]
    return [dim, dim, 1, 1] if given.get("save_skipped") else [dim, dim, 1]


def _heads_of_gradients(given: Mapping[str, Any]) -> list[int | None]:
    """The head dimension of the gradients; one that is not needed is empty and has no heads."""
    dim = len(given["q"].shape) - 2
    dims = [dim if given.get("need_dq", True) else None]
    extra = [2, 2] if given.get("extra_k") is not None else []
    dims += [d if given.get("need_dkv", True) else None for d in (dim, dim, *extra)]
    if given.get("key_bias") is not None:
        dims.append(1 if given.get("need_dbias", True) else None)
    return dims


def _is_tensor(arg: object) -> TypeGuard[DTensorSpec]:
    return hasattr(arg, "placements")  # DTensor passes specs instead of tensors


def _place(name: str, arg: object, axis: int) -> Placement | None:
    """Placement of an argument if the op is sharded over the batch (axis 0) or heads (axis 1)."""
    if not _is_tensor(arg):
        return None
    if name in TOKENS:
        return Shard(0 if axis == 0 else len(arg.shape) - 2)
    if name in OF_QUERIES:
        return Shard(0 if axis == 0 else len(arg.shape) - 1)
    if name in WITHOUT_HEADS:
        return Shard(0) if axis == 0 else Replicate()
    return Replicate() if arg.shape[axis] == 1 else Shard(axis)


def _heads_divide(heads: int, heads_kv: int, mesh: Sequence[int]) -> bool:
    """Whether every shard of query heads has its key heads in the same shard.

    Heads may be sharded over any mesh dimension. DTensor itself excludes dimensions with more ranks
    than heads.
    """
    if heads == heads_kv:
        return True
    ways = {1}
    for size in mesh:
        ways |= {size * other for other in ways}
    return all(heads_kv % way == 0 for way in ways if way <= heads_kv)
