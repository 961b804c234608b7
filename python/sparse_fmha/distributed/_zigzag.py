"""The zig-zag order, which balances the work of a causal mask over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha.distributed import _collectives, _groups


def zigzag_shard(x: Tensor, dim: int = 1, *, group: _groups.Group = None) -> Tensor:
    """Returns this rank's part of a sequence: chunks rank and 2 * world - 1 - rank of 2 * world.

    A causal query sees all earlier keys, so late chunks cost more. An early and a late chunk
    together cost the same on each rank (Llama 3, arXiv:2407.21783, section 3.3.2). Shard positions,
    such as those of rotary embeddings, the same way.

    Args:
        x: the whole sequence on every rank, of any dtype.
        dim: the dimension of the tokens, whose number is a multiple of 2 * world.
        group: process group or one-dimensional mesh; default all ranks.

    Returns:
        A contiguous tensor like x with 1 / world of the tokens.

    Raises:
        ValueError: the number of tokens does not divide; for the group see `all_gather_kv`.
        RuntimeError: torch.distributed is not initialised.
    """
    group, rank, world = _groups.resolve(group)
    if x.shape[dim] % (2 * world):
        raise ValueError(
            f"x must have a multiple of 2 * world = {2 * world} tokens in dimension {dim}, got "
            f"{x.shape[dim]}"
        )
    chunks = x.tensor_split(2 * world, dim)  # chunk() returns one chunk for 0 tokens
    return torch.cat([chunks[rank], chunks[2 * world - 1 - rank]], dim)


def zigzag_unshard(x: Tensor, dim: int = 1, *, group: _groups.Group = None) -> Tensor:
    """Gathers the whole sequence on every rank from the parts of `zigzag_shard`.

    Args:
        x: this rank's part, of the same shape on every rank.
        dim: the dimension of the tokens, whose number is even.
        group: see `zigzag_shard`.

    Returns:
        A tensor like x with world times as many tokens.

    Raises:
        ValueError, RuntimeError: see `zigzag_shard`.
        NotImplementedError: a derivative of the result is required.
    """
    group, _, world = _groups.resolve(group)
    _groups.check_no_derivative("x", x)
    check_even("x", x.shape[dim])
    return gather(x, dim, group, world, zigzag=True, name="zigzag_unshard")


def check_even(name: str, tokens: int) -> None:
    if tokens % 2:
        raise ValueError(
            f"{name} must have an even number of tokens on each rank, for two chunks of the "
            f"zig-zag order, got {tokens}"
        )


def gather(
    x: Tensor, dim: int, group: dist.ProcessGroup, world: int, zigzag: bool, name: str
) -> Tensor:  # fmt: skip
    """Gathers the ranks' parts along a dimension, in sequence order."""
    whole = _collectives.all_gather(x.movedim(dim, 0), group, world, name)
    if zigzag:
        whole = in_order(whole, world)
    return whole.movedim(0, dim)


def in_order(whole: Tensor, world: int) -> Tensor:
    """Puts gathered parts, along the first dimension, in sequence order."""
    # Early chunks are in rank order, late chunks in reverse order.
    chunks = whole.tensor_split(2 * world)
    return torch.cat([*chunks[::2], *chunks[::-2]])
