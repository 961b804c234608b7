"""Sequence parallel attention by all-to-all: tokens are sharded outside, heads inside."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha.distributed import _attend, _collectives, _groups, _masks, _slices


@overload
def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: Literal[False] = False,
    validate: bool = True,
    **options: Any,
) -> Tensor: ...


@overload
def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: Literal[True],
    validate: bool = True,
    **options: Any,
) -> tuple[Tensor, Tensor]: ...


@overload
def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: bool,
    validate: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]: ...


def ulysses(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Any] | None = None,
    mask: _masks.MaskOrFunction = None,
    *,
    group: _groups.Group = None,
    grid: Sequence[int] | None = None,
    slices: int = 1,
    return_lse: bool = False,
    validate: bool = True,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over a sequence sharded over ranks; each rank computes some of the heads.

    An all-to-all gives every rank the whole sequence of Hq / world heads, the function runs on
    them, and a second all-to-all shards its result like q (DeepSpeed-Ulysses, Jacobs et al. 2023,
    arXiv:2309.14509). The result equals that of the function on the whole sequence.

    Args:
        q: `[B, Lq / world, Hq, D]`, the same number of tokens on each rank. Rank r has the Lq /
            world tokens from r * Lq / world. Hq is a multiple of world. For dtypes, strides and D
            see `sparse_fmha.attention`.
        k: `[B, Lkv / world, Hkv, D]`. Hkv is a multiple or a divisor of world. If it is a divisor,
            world / Hkv ranks share a key head, which is sent to each of them.
        v: like k.
        attention: the function to run, called as `attention(q, k, v, **options)`, or
            `attention(q, k, v, mask, **options)` with a mask. The default depends on the mask:
            `attention`, `block_sparse_attention` or `stripe_attention` of sparse_fmha.
        mask: a mask of the whole sequence on every rank, with lists for 1 head, all Hq heads, or
            the Hq / world heads of the rank. Or a function that makes a mask of this rank's heads
            from q and k of the whole sequence, `[B, Lq, Hq / world, D]` and `[B, Lkv, heads of this
            rank, D]`, for selection by scores.
        group: process group or one-dimensional mesh; default all ranks.
        grid: `*L` of `neighborhood_attention`; its product is Lq. Default one axis.
        slices: pieces that the rank's query heads are cut into. A piece is sent while the one
            before it is computed, in both passes, and its result returns meanwhile. The result is
            that of one piece bit by bit. It divides Hq / world, and a piece has whole groups of
            query heads that share a key head, or a part of one group. A mask function is called
            for each piece, with the heads of the piece.
        return_lse: also return the log-sum-exp.
        validate: compare the ranks' shapes first, which waits for the device. Without it, different
            shapes are undefined behavior and may deadlock.
        options: passed to the function, such as `causal`, `scale` or `window`. `extra_k` and
            `extra_v` `[B, N, Hkv, D]` are whole and equal on every rank; so are their gradients.

    Returns:
        `out`, `[B, Lq / world, Hq, D]`, contiguous; with `return_lse` also `lse`,
        `[B, Lq / world, Hq]` in fp32, as returned by the function. The backward pass sends
        gradients back along the same paths.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: heads that do not divide, ranks that do not agree, a mask or a grid of another
            length, a mesh of several dimensions, a group without this process, or `return_stats`.
        TypeError: a DTensor, or a mask, group or tensor of the wrong type.
        NotImplementedError: an input with a forward-mode tangent, or `slices` above 1 together
            with `extra_k`, or inside torch.compile.
    """
    group, rank, world = _groups.resolve(group)
    _groups.check_options(options, "ulysses")
    q, k, v = cast_where_enabled(q, k, v)
    _groups.check_inputs(q, k, v, mask, {}, group, world, validate)
    copies = key_head_copies(q.shape[2], k.shape[2], world)
    heads_kv = k.shape[2] * copies // world
    if isinstance(mask, _masks.MASKS):
        mask = _masks.heads(mask, rank, world, q.shape[2])
    if grid is not None and math.prod(grid) != q.shape[1] * world:
        raise ValueError(
            f"grid must have the {q.shape[1] * world} tokens that the ranks have together, got "
            f"{math.prod(grid)} in {list(grid)}"
        )
    first = rank * k.shape[2] // world
    for name in ("extra_k", "extra_v"):
        if options.get(name) is not None:
            extra = _collectives.shared(options[name], group)
            options[name] = extra[:, :, first : first + heads_kv]

    _slices.check_slices(slices)
    if slices > 1:
        if options.get("extra_k") is not None:
            raise NotImplementedError("slices must be 1 with extra_k, got more")
        return _slices.ulysses_in_slices(
            q, k, v, attention, mask, group, world, copies, grid, slices, return_lse, options
        )
    if copies > 1:
        k, v = (x.repeat_interleave(copies, 2) for x in (k, v))
    if q.shape[1] == k.shape[1]:
        q, k, v = _to_heads([q, k, v], group, world)
    else:
        (q,), (k, v) = _to_heads([q], group, world), _to_heads([k, v], group, world)
    if callable(mask):
        mask = _masks.made(mask, q, k)
    if grid is not None:
        q, k, v = (x.unflatten(1, tuple(grid)) for x in (q, k, v))
    result = _attend.attend(attention, q, k, v, mask, return_lse=return_lse, **options)
    del q, k, v  # frees memory as large as that of the results
    outs: Sequence[Tensor] = result if return_lse else (result,)
    if grid is not None:
        outs = [x.flatten(1, len(grid)) for x in outs]
    outs = [_to_tokens(x, group, world) for x in outs]
    return (outs[0], outs[1]) if return_lse else outs[0]


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


def _to_heads(parts: list[Tensor], group: dist.ProcessGroup, world: int) -> list[Tensor]:
    """Exchanges each `[B, L / world, H, D]` for `[B, L, H / world, D]`, in one message.

    The results are strided views of one tensor.
    """
    heads = [x.shape[2] // world for x in parts]
    sent = torch.cat([x.unflatten(2, (world, -1)).movedim(2, 0) for x in parts], 3)
    received = _collectives.all_to_all(sent, group)
    # [world, B, L / world, H / world, D], already in order if B is 1.
    return list(received.movedim(0, 1).flatten(1, 2).split(heads, 2))


def _to_tokens(x: Tensor, group: dist.ProcessGroup, world: int) -> Tensor:
    """Exchanges `[B, L, H / world, ...]` for `[B, L / world, H, ...]`, contiguous."""
    sent = x.unflatten(1, (world, -1)).movedim(1, 0).contiguous()
    received = _collectives.all_to_all(sent, group)
    return received.movedim(0, 2).flatten(2, 3).contiguous()
