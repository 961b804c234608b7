"""Which keys the lists of a mask need from which rank, and the lists cut to match."""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.distributed import _cut_lists, _groups, _masks, _sharding
from sparse_fmha.distributed._cut_lists import Keys
from sparse_fmha.distributed._shards import Shards
from sparse_fmha.distributed._steps import Piece, Rows, Step, distances

_numbers = itertools.count()
_plans: weakref.WeakValueDictionary[str, KeyPlan] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False)
class KeyPlan:
    """What `pass_kv` sends and computes on one rank for a mask; made by `plan_kv`.

    Attributes:
        shards: the tokens of each rank.
        key_shards: the keys of each rank.
        received: for each step, the number of keys that come from each rank.
        heads: for how many heads there are lists.
        name: by which the ops of `pass_kv` find it.
    """

    shards: Shards
    key_shards: Shards
    steps: tuple[Step, ...]
    kind: int
    heads: int
    name: str = field(default_factory=lambda: f"plan {next(_numbers)}")

    def __post_init__(self) -> None:
        _plans[self.name] = self

    @property
    def received(self) -> list[tuple[int, ...]]:
        return [step.received for step in self.steps[1:]]


def plan_kv(
    mask: _masks.Mask,
    shards: Shards | None = None,
    *,
    key_shards: Shards | None = None,
    steps: int | None = None,
    group: _groups.Group = None,
) -> KeyPlan:
    """Finds the keys that each rank needs, and cuts the mask's lists; waits for the device.

    A plan serves every call with this mask, forward and backward: `pass_kv(q, k, v, plan)`.

    Args:
        mask: a mask of the whole sequence, the same on every rank. A block of keys (for a
            StripeMask a key) is sent to a rank if any of the rank's rows lists it, for any head.
            With `causal`, queries and keys must have the same shards.
        shards: the tokens of each rank; default even. Spans start at multiples of the mask's
            block_q, and only the last of a rank may end elsewhere.
        key_shards: the same for keys and block_kv; default `shards` if there are as many keys as
            queries, else even. A shorter last block must come last in what a rank receives, as it
            does when the last rank has it.
        steps: see `pass_kv`.
        group: process group or one-dimensional mesh; default all ranks.

    Raises:
        ValueError: spans that cut blocks, or shards of another length or number of ranks.
        TypeError: mask is not a mask, or shards not Shards.
        NotImplementedError: a causal mask where keys have other shards than queries.
        RuntimeError: torch.distributed is not initialised.
    """
    group, rank, world = _groups.resolve(group)
    if not isinstance(mask, _masks.MASKS):
        raise TypeError(f"mask must be a BlockMask or StripeMask, got {type(mask).__name__}")
    unit = _cut_lists.unit_of(mask)
    shards = shards or Shards.even(mask.q_len, world, mask.block_q)
    if key_shards is None:
        same = mask.q_len == mask.kv_len
        key_shards = shards if same else Shards.even(mask.kv_len, world, unit)
    for part in (shards, key_shards):
        _sharding.check_world(part, world)
    _masks.check_whole(mask, shards.length, key_shards.length)
    _check_spans(shards, mask.block_q, "block_q")
    _check_spans(key_shards, unit, "block_kv")
    if mask.causal and shards != key_shards:
        raise NotImplementedError(
            "key_shards must be the shards of the queries with a causal mask, got others; "
            "all_gather_kv takes any number of keys"
        )
    if steps is not None:
        _checks.check_int("steps", steps, 1)
    cut = _cut_lists.Cut(mask, shards.spans[rank], key_shards.spans[rank])
    needed = _gathered(cut.needed(), group, world)
    own = Keys.of_spans(key_shards.spans[rank], unit, mask.device)
    found = [_step(cut, own, (), (), own=True)]
    of_rank = [Keys.of_spans(spans, unit, mask.device) for spans in key_shards.spans]
    arrives = _arrives(needed, of_rank)
    for distance in distances(world, steps):
        to = {(rank + far) % world for far in distance}
        sources = {(rank - far) % world for far in distance}
        sent: list[Rows] = [
            own.tokens_of(needed[other]) if other in to else () for other in range(world)
        ]
        coming = [
            keys.units[needed[rank][keys.units]] if source in sources else keys.units[:0]
            for source, keys in enumerate(of_rank)
        ]
        received = tuple(_cut_lists.tokens(units, unit, mask.kv_len) for units in coming)
        buffer = Keys(torch.cat(coming), unit, mask.kv_len)
        # All ranks must call a collective, so they agree on which steps there are.
        if any(arrives[other][(other - far) % world] for other in range(world) for far in distance):
            found.append(_step(cut, buffer, tuple(sent), received))
    return KeyPlan(shards, key_shards, tuple(found), _masks.kind(mask), mask.counts.shape[1])


def named(name: str) -> KeyPlan:
    """The plan of that name."""
    plan = _plans.get(name)
    if plan is None:
        raise RuntimeError(
            f"the KeyPlan of this call of pass_kv, {name}, does not exist any more; keep it until "
            "the backward pass"
        )
    return plan


def _step(
    cut: _cut_lists.Cut, keys: Keys, sent: tuple[Rows, ...], received: tuple[int, ...],
    own: bool = False,
) -> Step:  # fmt: skip
    length = keys.length
    if not length or not cut.rows:
        return Step(sent, received)
    lists = cut.lists(keys, own)
    piece = Piece(slice(0, lists.q_len), slice(0, length), mask=lists)
    return Step(sent, received, (piece,))


def _arrives(needed: Tensor, of_rank: list[Keys]) -> list[list[bool]]:
    """Whether a rank, by row, receives keys of another, by column."""
    counts = [needed[:, keys.units].sum(1) for keys in of_rank]
    table: list[list[bool]] = (torch.stack(counts, 1) > 0).tolist()
    return table


def _gathered(needed: Tensor, group: dist.ProcessGroup, world: int) -> Tensor:
    """The needed units of all ranks, bool `[world, units]`, on the mask's device."""
    sent = needed.to(torch.uint8)
    received = sent.new_empty(world * len(sent))
    with _groups.named("plan_kv"):
        _groups.all_gather(received, sent, group)
    return received.view(world, -1).bool()


def _check_spans(shards: Shards, unit: int, name: str) -> None:
    for rank, spans in enumerate(shards.spans):
        for start, stop in spans:
            ends = stop == shards.length and (start, stop) == spans[-1]
            if start % unit or (stop % unit and not ends):
                raise ValueError(
                    f"spans must be multiples of the mask's {name} = {unit}, got {(start, stop)} "
                    f"on rank {rank}"
                )
