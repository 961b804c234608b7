"""Takes a rank's tokens of a sequence, and gathers a sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.distributed import _groups
from sparse_fmha.distributed._shards import Shards


def shard(x: Tensor, shards: Shards, dim: int = 1, *, group: _groups.Group = None) -> Tensor:
    """Returns this rank's tokens of a sequence that every rank has.

    Args:
        x: the whole sequence, of any dtype.
        shards: which tokens each rank has.
        dim: the dimension of the tokens.
        group: process group or one-dimensional mesh; default all ranks.

    Returns:
        A contiguous tensor. Positions, such as those of rotary embeddings, are sharded likewise.

    Raises:
        ValueError: x has another length, or the shards are for another number of ranks.
        RuntimeError: torch.distributed is not initialised.
    """
    _, rank, world = _groups.resolve(group)
    check_world(shards, world)
    if x.shape[dim] != shards.length:
        raise ValueError(
            f"x must have the {shards.length} tokens of the shards in dimension {dim}, got "
            f"{x.shape[dim]}"
        )
    return taken(x, shards, rank, dim)


def unshard(x: Tensor, shards: Shards, dim: int = 1, *, group: _groups.Group = None) -> Tensor:
    """Gathers the whole sequence on every rank from the parts of `shard`.

    Args:
        x: this rank's tokens.
        shards, dim, group: see `shard`.

    Returns:
        A contiguous tensor with the tokens in the order of the sequence.

    Raises:
        ValueError, RuntimeError: see `shard`.
        NotImplementedError: a derivative of the result is required.
    """
    group, rank, world = _groups.resolve(group)
    check_world(shards, world)
    _groups.check_no_derivative("x", x)
    if x.shape[dim] != shards.lengths[rank]:
        raise ValueError(
            f"x must have the {shards.lengths[rank]} tokens of this rank in dimension {dim}, got "
            f"{x.shape[dim]}"
        )
    most = max(shards.lengths)
    sent = x.movedim(dim, 0)
    padded = sent.new_zeros(most, *sent.shape[1:])
    padded[: sent.shape[0]] = sent
    received = sent.new_empty(world * most, *sent.shape[1:])
    with _groups.named("unshard"):
        _groups.all_gather(received, padded, group)
    whole = sent.new_empty(shards.length, *sent.shape[1:])
    for part, spans in zip(received.unflatten(0, (world, most)), shards.spans, strict=True):
        first = 0
        for start, stop in spans:
            whole[start:stop] = part[first : first + stop - start]
            first += stop - start
    return whole.movedim(0, dim).contiguous()


def taken(x: Tensor, shards: Shards, rank: int, dim: int) -> Tensor:
    """The tokens of a rank, contiguous."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in shards.spans[rank]]
    return torch.cat(parts or [x.narrow(dim, 0, 0)], dim).contiguous()


def check_world(shards: Shards, world: int) -> None:
    if not isinstance(shards, Shards):
        raise TypeError(f"shards must be Shards, got {type(shards).__name__}")
    if shards.world != world:
        raise ValueError(f"shards must be for the {world} ranks of the group, got {shards.world}")
