"""The heads of `ulysses`, all at once or in slices: one is sent while another is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.distributed._head_exchange import HeadExchange, Lengths


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


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Callable[[Tensor, Tensor, Tensor, int], Sequence[Tensor]],
    exchange: HeadExchange,
    lengths: tuple[Lengths, Lengths],
    together: bool,
    slices: int,
) -> list[Tensor]:
    """The exchanges of `ulysses` around `call`, for each slice of a rank's heads.

    A key head that several slices share is sent with the first.

    Args:
        call: computes the results `[B, Lq, heads, ...]` of a slice from its q, k and v
            `[B, L, heads, D]`, and the slice's number.
        lengths: of queries and of keys.
        together: every rank has as many keys as queries, so that they travel in one message.
    """
    world = exchange.world
    heads = q.shape[2] // world
    of_keys = key_slices(heads, k.shape[2] // world, slices)
    size = heads // slices
    # [B, own tokens, world, heads of a rank, D]
    q, k, v = (x.unflatten(2, (world, -1)) for x in (q, k, v))

    def start(i: int) -> list[Callable[[], Sequence[Tensor]]]:
        name = f"ulysses: q, k and v of slice {i}"
        queries = [q[:, :, :, i * size : (i + 1) * size]]
        if i and of_keys[i] == of_keys[i - 1]:
            return [exchange.to_heads(queries, lengths[0], name)]
        keys = [x[:, :, :, of_keys[i]] for x in (k, v)]
        if together:
            return [exchange.to_heads(queries + keys, lengths[0], name)]
        return [
            exchange.to_heads(queries, lengths[0], name),
            exchange.to_heads(keys, lengths[1], name),
        ]

    results: list[list[Callable[[], Tensor]]] = []
    coming = start(0)
    keys: Sequence[Tensor] = ()
    for i in range(slices):
        before, coming = coming, start(i + 1) if i + 1 < slices else []
        whole, *arrived = (x for wait in before for x in wait())
        keys = arrived or keys
        outs = call(whole, keys[0], keys[1], i)
        del whole, arrived, before  # frees memory as large as that of the results
        if not coming:
            keys = ()
        name = f"ulysses: the result of slice {i}"
        results.append([exchange.to_tokens(x, lengths[0], name) for x in outs])
        del outs
    found = []
    for pieces in zip(*results, strict=True):
        # [world, B, own tokens, heads of a slice, ...] each
        joined = pieces[0]()[:, None] if slices == 1 else torch.stack([x() for x in pieces], 1)
        # [B, own tokens, world, slices, heads of a slice, ...]
        joined = joined.movedim((0, 1), (2, 3))
        found.append(joined.flatten(2, 4).contiguous())
    return found
