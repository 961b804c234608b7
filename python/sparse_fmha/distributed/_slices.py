"""`ulysses` in slices of heads: one slice is sent while another is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.distributed import _attend, _masks, _transfers


def check_slices(slices: int) -> None:
    if _checks.check_int("slices", slices, 1) > 1 and torch.compiler.is_compiling():
        raise NotImplementedError("slices must be 1 inside torch.compile, got more")


def key_slices(heads: int, heads_kv: int, slices: int) -> list[slice]:
    """The key heads of each slice of a rank's query heads.

    Raises:
        ValueError: the slices do not divide the heads, or cut groups of a key head unevenly.
    """
    size, shared = heads // slices, heads // heads_kv
    if heads % slices or (size % shared and shared % size):
        raise ValueError(
            f"slices must divide the {heads} query heads of a rank into whole groups of {shared} "
            f"or parts of one, got {slices}"
        )
    return [slice(i * size // shared, -(-(i + 1) * size // shared)) for i in range(slices)]


def ulysses_in_slices(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None,
    mask: _masks.MaskOrFunction,
    group: dist.ProcessGroup,
    world: int,
    copies: int,
    grid: Sequence[int] | None,
    slices: int,
    return_lse: bool,
    options: dict[str, Any],
) -> Tensor | tuple[Tensor, Tensor]:
    """`ulysses` after its checks. A key head that several slices share is sent with the first."""
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
    heads = q.shape[2] // world
    of_keys = key_slices(heads, k.shape[2] // world, slices)
    size = heads // slices
    # [B, L / world, world, heads of a rank, D]
    q, k, v = (x.unflatten(2, (world, -1)) for x in (q, k, v))

    def start(i: int) -> list[_transfers.Transfer]:
        sent = [q[:, :, :, i * size : (i + 1) * size]]
        if i == 0 or of_keys[i] != of_keys[i - 1]:
            keys = [x[:, :, :, of_keys[i]] for x in (k, v)]
            if q.shape[1] != k.shape[1]:
                return [_send(sent, group, i), _send(keys, group, i)]
            sent += keys
        return [_send(sent, group, i)]

    results: list[list[_transfers.Transfer]] = []
    coming = start(0)
    whole_k = whole_v = k  # those of the first slice take their place
    for i in range(slices):
        arrived, coming = coming, start(i + 1) if i + 1 < slices else []
        sizes = [size] if len(arrived) == 1 else []
        if i == 0 or of_keys[i] != of_keys[i - 1]:
            count = of_keys[i].stop - of_keys[i].start
            sizes = [size, count, count]
        received = [_arrived(transfer) for transfer in arrived]
        if len(received) == 2:
            whole_q = received[0]
            whole_k, whole_v = received[1].split(sizes[1:], 2)
        elif len(sizes) == 3:
            whole_q, whole_k, whole_v = received[0].split(sizes, 2)
        else:
            whole_q = received[0]
        lists = mask
        if isinstance(lists, _masks.MASKS):
            lists = _masks.some_heads(lists, slice(i * size, (i + 1) * size), heads)
        elif callable(lists):
            lists = _masks.made(lists, whole_q, whole_k)
        tensors = whole_q, whole_k, whole_v
        if grid is not None:
            axes = tuple(grid)
            tensors = (
                whole_q.unflatten(1, axes), whole_k.unflatten(1, axes), whole_v.unflatten(1, axes)
            )  # fmt: skip
        result = _attend.attend(attention, *tensors, lists, return_lse=return_lse, **options)
        outs = list(result) if return_lse else [result]
        if grid is not None:
            outs = [x.flatten(1, len(grid)) for x in outs]
        results.append([_send_back(x, group, world, i) for x in outs])
        del received, whole_q, tensors, result, outs
    found = []
    for pieces in zip(*results, strict=True):
        # [world, B, L / world, heads of a slice, ...] each
        joined = torch.stack([x.wait() for x in pieces], 1)
        # [B, L / world, world, slices, heads of a slice, ...]
        joined = joined.movedim((0, 1), (2, 3))
        found.append(joined.flatten(2, 4).contiguous())
    return (found[0], found[1]) if return_lse else found[0]


def _send(parts: list[Tensor], group: dist.ProcessGroup, i: int) -> _transfers.Transfer:
    sent = torch.cat([x.movedim(2, 0) for x in parts], 3)
    return _transfers.all_to_all(sent, group, f"ulysses: q, k and v of slice {i}")


def _arrived(transfer: _transfers.Transfer) -> Tensor:
    return transfer.wait().movedim(0, 1).flatten(1, 2)


def _send_back(x: Tensor, group: dist.ProcessGroup, world: int, i: int) -> _transfers.Transfer:
    sent = x.unflatten(1, (world, -1)).movedim(1, 0)
    return _transfers.all_to_all(sent, group, f"ulysses: the result of slice {i}")
