"""Whether the ranks of `pass_kv` agree, and how many tokens each has."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from sparse_fmha.distributed import _groups
from sparse_fmha.distributed._shards import Shards


def lengths(
    q: Tensor, k: Tensor, flags: dict[str, int], shards: Sequence[Shards | None],
    group: dist.ProcessGroup, world: int,
) -> list[tuple[int, int]]:  # fmt: skip
    """Returns the tokens in q and k of each rank; all ranks raise if anything else differs."""
    mine = _groups.shapes(q, k, tokens=False) | flags
    for name, part in zip(("shards", "key_shards"), shards, strict=True):
        mine[name] = 0 if part is None else hash(part.spans)
    return _groups.agreed(mine, q, k, group, world)


def check_lengths(shards: Shards, key_shards: Shards, found: Sequence[tuple[int, int]]) -> None:
    """Checks that every rank has the tokens of its shard, on all ranks alike."""
    for name, part, place in (("q", shards, 0), ("k", key_shards, 1)):
        for rank, own in enumerate(found):
            _check_length(name, own[place], part, rank)


def check_own(name: str, x: Tensor, shards: Shards | None, rank: int) -> None:
    """Checks that this rank has the tokens of its shard, where ranks are not compared."""
    if shards is not None:
        _check_length(name, x.shape[1], shards, rank)


def _check_length(name: str, length: int, shards: Shards, rank: int) -> None:
    expected = shards.lengths[rank]
    if length != expected:
        raise ValueError(
            f"{name} must have the {expected} tokens of its shard on rank {rank}, got {length}"
        )
