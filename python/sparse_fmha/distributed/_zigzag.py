"""The zig-zag order, in which every rank has as much to do under a causal mask."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha.distributed import _collectives, _groups


def zigzag_shard(x: Tensor, dim: int = 1, *, group: _groups.Group = None) -> Tensor:
    """This rank's part of a sequence: of 2 * world chunks, numbers rank and 2 * world - 1 - rank.

    A causal query sees all keys before it, so late chunks cost more; an early and a late one
    together cost the same on each rank (Llama 3, arXiv:2407.21783, section 3.3.2). Positions, such
    as of rotary embeddings, are sharded the same way.

    Args:
        x: the whole sequence on every rank, of any dtype.
        dim: of the tokens, whose number is a multiple of 2 * world.
        group: process group or mesh of one dimension; default all ranks.

    Returns:
        Like x with 1 / world of the tokens, contiguous.

    Raises:
        ValueError: a number of tokens that does not divide, or as `all_gather_kv` for the group.
        RuntimeError: torch.distributed is not initialised.
    """
    group, rank, world = _groups.resolve(group)
    if x.shape[dim] % (2 * world):
        raise ValueError(
            f"x has {x.shape[dim]} tokens in dimension {dim}; a multiple of 2 * world = "
            f"{2 * world} is needed"
        )
    chunks = x.tensor_split(2 * world, dim)  # chunk() makes one of no tokens
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim)


def zigzag_unshard(x: Tensor, dim: int = 1, *, group: _groups.Group = None) -> Tensor:
    """The whole sequence on every rank from the parts of `zigzag_shard`: an all-gather.

    Args:
        x: this rank's part; the same shape on every rank.
        dim: of the tokens, whose number is even.
        group: as `zigzag_shard`.

    Returns:
        Like x with world times the tokens.

    Raises:
        ValueError, RuntimeError: as `zigzag_shard`.
        NotImplementedError: a derivative of the result is asked for.
    """
    group, _, world = _groups.resolve(group)
    if derivatives.requires_grad(x):
        raise NotImplementedError(
            "x requires grad; every rank gets the whole sequence, and has a loss of its own: there "
            "is no one gradient. Call it under torch.no_grad(), or detach x"
        )
    _groups.check_no_tangent("x", x)
    check_even("x", x.shape[dim])
    return gather(x, dim, group, world, zigzag=True)


def check_even(name: str, tokens: int) -> None:
    if tokens % 2:
        raise ValueError(
            f"{name} has {tokens} tokens on this rank; the zig-zag order needs two chunks of the "
            "same length"
        )


def gather(x: Tensor, dim: int, group: dist.ProcessGroup, world: int, zigzag: bool) -> Tensor:
    """The ranks' parts along a dimension, in the order of the sequence."""
    whole = _collectives.all_gather(x.movedim(dim, 0), group, world)
    if zigzag:
        # Early chunks lie in the order of the ranks, late ones in the reverse.
        chunks = whole.tensor_split(2 * world)
        whole = torch.cat([*chunks[::2], *chunks[::-2]])
    return whole.movedim(0, dim)
