"""Which heads each rank of `ulysses` computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_fmha.distributed import _deal


def balanced_heads(weights: Sequence[float], heads_kv: int, world: int) -> list[int]:
    """Gives heads out so that the ranks of `ulysses` have about the same weight.

    Heads that share a key head go together if a rank has whole key heads; else they are spread over
    the ranks of their key head. As `Shards.balanced` does, the heaviest are given out first.

    Args:
        weights: of each query head, such as `head_weights(mask)`.
        heads_kv: heads of k.
        world: ranks.

    Returns:
        All query heads, those of rank 0 first: the `head_order` of `ulysses`.

    Raises:
        ValueError: heads that `ulysses` does not take on so many ranks.
    """
    heads = len(weights)
    copies = key_head_copies(heads, heads_kv, world)
    shared = heads // heads_kv
    if copies == 1:
        groups = [sum(weights[i * shared : (i + 1) * shared]) for i in range(heads_kv)]
        dealt = _deal.dealt(groups, world, heads_kv // world)
        return [i * shared + j for own in dealt for i in own for j in range(shared)]
    found: list[int] = []
    for first in range(0, heads, shared):
        dealt = _deal.dealt(weights[first : first + shared], copies, shared // copies)
        found += [first + i for own in dealt for i in own]
    return found


@dataclass(frozen=True)
class HeadOrder:
    """The heads in the order in which they are sent: those of rank 0 first.

    Attributes:
        queries: query heads, each once.
        keys: key heads, as often as they are sent.
        back: the places of the query heads in `queries`.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    back: Sequence[int]

    def of_rank(self, rank: int, world: int) -> tuple[Sequence[int], Sequence[int]]:
        """The query heads and the key heads of a rank."""
        sizes = len(self.queries) // world, len(self.keys) // world
        lists = self.queries, self.keys
        return (
            lists[0][rank * sizes[0] : (rank + 1) * sizes[0]],
            lists[1][rank * sizes[1] : (rank + 1) * sizes[1]],
        )


def checked(given: Sequence[int] | None, heads: int, heads_kv: int, world: int) -> HeadOrder:
    """The order that the user gave, or that of the heads.

    Raises:
        ValueError: heads do not divide, are missing or there twice, or a rank would need more key
            heads than there are places for.
    """
    copies = key_head_copies(heads, heads_kv, world)
    if given is None:
        keys = [i for i in range(heads_kv) for _ in range(copies)]
        return HeadOrder(range(heads), keys, range(heads))
    order = list(given)
    if sorted(order) != list(range(heads)):
        raise ValueError(f"head_order must have each of the {heads} heads once, got {order}")
    size = heads // (heads_kv * copies)  # query heads of a key head on a rank
    of_keys = [[i * heads_kv // heads for i in order[j : j + size]] for j in range(0, heads, size)]
    if any(len(set(some)) > 1 for some in of_keys):
        raise ValueError(
            f"head_order must have heads of one key head in each {size} places, got {order}"
        )
    back = sorted(range(heads), key=order.__getitem__)
    return HeadOrder(order, [some[0] for some in of_keys], back)


def taken(x: Tensor, heads: Sequence[int], dim: int) -> Tensor:
    """Some of a tensor's heads; a view if these lie one after the other."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1] = runs[-1][0], head + 1
        else:
            runs.append((head, head + 1))
    if runs == [(0, x.shape[dim])]:
        return x
    parts = [x.narrow(dim, start, stop - start) for start, stop in runs or [(0, 0)]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def key_head_copies(heads: int, heads_kv: int, world: int) -> int:
    """How often each key head is sent, so that every rank has the key heads of its query heads."""
    if heads % world:
        raise ValueError(
            f"heads of q must be a multiple of the {world} ranks, which ulysses shards them over, "
            f"got {heads}; all_gather_kv takes any number"
        )
    if heads_kv % world == 0:
        return 1
    if world % heads_kv:
        raise ValueError(
            f"heads of k and v must be a multiple or a divisor of the {world} ranks, got "
            f"{heads_kv}; all_gather_kv takes any number"
        )
    return world // heads_kv
