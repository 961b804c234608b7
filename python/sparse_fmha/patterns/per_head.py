"""Heads with different methods in one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_fmha._checks import check_collection, check_flag, check_int, check_qkv, plain_ints
from sparse_fmha.attention import block_sparse_attention, stripe_attention
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.merge import is_plain

Mask = BlockMask | StripeMask


@dataclass(frozen=True)
class WholeMethod:
    """A method that computes outputs instead of a mask, for `per_head_attention`.

    Attributes:
        function: maps q `[B, Lq, n, D]`, k and v `[B, Lkv, n or fewer, D]` of its heads to their
            output `[B, Lq, n, D]`.
    """

    function: Callable[[Tensor, Tensor, Tensor], Tensor]


# A mask with lists for its heads or one for all; what makes one from their q and k; or a method
# that computes their output.
HeadMethod = Mask | Callable[[Tensor, Tensor], Mask] | WholeMethod


@overload
def per_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    methods: Sequence[tuple[Sequence[int], HeadMethod]],
    *,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def per_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    methods: Sequence[tuple[Sequence[int], HeadMethod]],
    *,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def per_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    methods: Sequence[tuple[Sequence[int], HeadMethod]],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]: ...


@plain_ints
def per_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    methods: Sequence[tuple[Sequence[int], HeadMethod]],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes attention of a layer whose heads follow different methods.

    Models that mix methods have them by head: MInference (Jiang et al. 2024, arXiv:2407.02490), MoA
    (Fu et al. 2024, arXiv:2406.14909), MMInference (Li et al. 2025, arXiv:2504.16083). Masks with
    the same block sizes are joined, so there is one launch for each kind of mask, however many
    methods there are, and one or more for each `WholeMethod`. A launch writes zeros for heads that
    are not its own.

        per_head_attention(q, k, v, [
            (range(0, 6), lambda q, k: patterns.vertical_slash(q, k, vertical=500, slash=700)),
            ([6], lambda q, k: patterns.minference_block_sparse(q, k)),
            ([7], WholeMethod(lambda q, k, v: sparse_fmha.attention(q, k, v, causal=True))),
        ])

    Args:
        q: `[B, Lq, Hq, D]`. k, v: `[B, Lkv, Hkv, D]`, as in `attention`.
        methods: query heads, and what they do. Each of the Hq heads is named once. Functions get q,
            k and v of their heads, in the order given: k and v have a head for each of them, or for
            each group if all groups have as many of them.
        scale: scale of q.k in attention under masks; default `D**-0.5`.
        return_lse: also return lse; not with a `WholeMethod`.

    Returns:
        `[B, Lq, Hq, D]` in q's dtype; with `return_lse` also `[B, Lq, Hq]` fp32, natural log. Waits
        for the device only if a method does.

    For autocast and gradients see `attention`.

    Raises:
        ValueError, TypeError, RuntimeError: a head is not named once, a method returns something
            else, or as in `block_sparse_attention` and `stripe_attention`.
    """
    check_collection("methods", methods)
    check_qkv(q, k, v, axes=(1,))
    check_flag("return_lse", return_lse)
    total = q.shape[2]
    named = [[check_int("a head", head) for head in heads] for heads, _ in methods]
    _check_heads([head for heads in named for head in heads], total)
    kinds: dict[object, list[tuple[Sequence[int], Mask]]] = {}
    whole: dict[int, Tensor] = {}
    for heads, (_, method) in zip(named, methods, strict=True):
        if not heads:
            continue
        if isinstance(method, BlockMask | StripeMask):
            mask = method
        else:
            of_keys = _keys_of(heads, total // k.shape[2])
            own = _take(q, heads), _take(k, of_keys)
            if isinstance(method, WholeMethod):
                out = method.function(*own, _take(v, of_keys))
                _check_output(out, own[0])
                whole.update(zip(heads, out.split(1, 2), strict=True))
                continue
            mask = method(*own)
        kinds.setdefault(_kind(mask), []).append((heads, mask))
    if whole and return_lse:
        raise ValueError(
            "return_lse must be False with a WholeMethod, which returns none, got True"
        )
    results = []
    for parts in kinds.values():
        mask = join_heads(parts, total)
        if isinstance(mask, BlockMask):
            results.append(block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True))
        else:
            results.append(stripe_attention(q, k, v, mask, scale=scale, return_lse=True))
    if not results:
        return torch.cat([whole[head] for head in range(total)], 2)
    out, lse = results[0]
    for more, more_lse in results[1:]:  # 0 and -inf for heads of other launches
        if is_plain(out, more, lse, more_lse):
            out.add_(more)
            torch.maximum(lse, more_lse, out=lse)
        else:
            out, lse = out + more, torch.maximum(lse, more_lse)
    if whole:
        slices = out.split(1, 2)
        out = torch.cat([whole.get(head, slices[head]) for head in range(total)], 2)
    return (out, lse) if return_lse else out


@plain_ints
def join_heads(parts: Sequence[tuple[Sequence[int], Mask]], heads: int) -> Mask:
    """Joins masks of different heads into one.

    Lists become as wide as the widest, so one head with long lists costs memory for all.

    Args:
        parts: query heads and their mask, which has a list for each of them in this order, or one
            for all. Masks are all of one kind, with the same lengths, block sizes and causal.
        heads: heads of the result. A head that is not named sees nothing.

    Returns:
        A `BlockMask` or `StripeMask`, built without waiting for the device.

    Raises:
        ValueError: masks do not fit each other or their heads, a head is named twice or does not
            exist, or no mask is given.
        TypeError: a part has no mask.
    """
    check_collection("parts", parts)
    if not parts:
        raise ValueError("parts must have at least one mask, got none")
    first = parts[0][1]
    named = [[check_int("a head", head) for head in own] for own, _ in parts]
    for own, (_, mask) in zip(named, parts, strict=True):
        if _kind(mask) != _kind(first):
            raise ValueError(
                "masks must have one kind, lengths, block sizes and causal, got "
                f"{_kind(first)} and {_kind(mask)}"
            )
        if mask.counts.shape[1] not in (1, len(own)):
            raise ValueError(
                f"the mask of heads {own} must have lists for 1 or {len(own)} heads, got "
                f"{mask.counts.shape[1]}"
            )
    flat = [head for own in named for head in own]
    if len(set(flat)) < len(flat) or not all(0 <= head < heads for head in flat):
        raise ValueError(f"parts must name each head of 0 to {heads - 1} at most once, got {flat}")
    batch = max(mask.counts.shape[0] for _, mask in parts)
    where = {
        head: (n, at) for n, own in enumerate(named) for at, head in enumerate(own)
    }  # which mask, and which of its heads
    masks = [mask for _, mask in parts]

    def table(name: str, empty: int, tail: tuple[int, ...] | None) -> Tensor:
        """Joins a field; `tail` follows the groups: None for counts, () for lists."""
        given = [getattr(mask, name) for mask in masks]
        there = [field for field in given if field is not None]
        shape = [batch, 1, *first.counts.shape[2:]]
        if tail is not None:
            shape += [max(field.shape[3] for field in there), *tail]
        none = torch.full(shape, empty, dtype=there[0].dtype, device=first.device)
        rows = []
        for head in range(heads):
            n, at = where.get(head, (0, -1))
            field = given[n] if at >= 0 else None
            if field is None:
                rows.append(none)
                continue
            row = field if field.shape[1] == 1 else field[:, at : at + 1]
            if tail is not None:
                room = shape[3] - row.shape[3]
                row = pad(row, (0, 0) * len(tail) + (0, room), value=empty) if room else row
            rows.append(row.expand(shape))
        return torch.cat(rows, 1)

    counts = table("counts", 0, None)
    sizes = first.q_len, first.kv_len, first.block_q
    if isinstance(first, StripeMask):
        columns = table("columns", block_lists.ABSENT, ())
        starts = number = None
        if any(getattr(mask, "range_starts", None) is not None for mask in masks):
            starts = table("range_starts", block_lists.ABSENT, ())
            number = table("range_counts", 0, None)
        runs = (starts, number, first.range_size)
        return StripeMask(columns, counts, *sizes, *runs, causal=first.causal)
    joined = BlockMask(
        counts,
        table("indices", block_lists.ABSENT, ()),
        *(*sizes, first.block_kv),
        causal=first.causal,
    )
    if any(getattr(mask, "partial_counts", None) is not None for mask in masks):
        joined.partial_counts = table("partial_counts", 0, None)
        joined.partial_indices = table("partial_indices", block_lists.ABSENT, ())
        joined.partial_bits = table("partial_bits", 0, (first.block_q, first.block_kv // 8))
    return joined


def _kind(mask: Mask) -> tuple[object, ...]:
    """Returns what masks need to share to be joined."""
    if isinstance(mask, BlockMask):
        return ("BlockMask", mask.q_len, mask.kv_len, mask.block_q, mask.block_kv, mask.causal)
    if isinstance(mask, StripeMask):
        return ("StripeMask", mask.q_len, mask.kv_len, mask.block_q, mask.range_size, mask.causal)
    raise TypeError(f"masks must be BlockMasks or StripeMasks, got {type(mask).__name__}")


def _take(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Returns some heads of `[B, L, H, D]`; a view if they are neighbors."""
    first, n = heads[0], len(heads)
    if list(heads) == list(range(first, first + n)):
        return x[:, :, first : first + n]
    return torch.cat([x[:, :, head : head + 1] for head in heads], 2)


def _keys_of(heads: Sequence[int], group: int) -> list[int]:
    """Returns the key heads of query heads: one for each, or one for each group if these are even.

    Query head n of m reads key head `n * len(keys) // m` of the result.
    """
    each = [head // group for head in heads]
    once = list(dict.fromkeys(each))
    times = len(each) // len(once)
    return once if each == [key for key in once for _ in range(times)] else each


def _check_heads(named: list[int], total: int) -> None:
    if sorted(named) != list(range(total)):
        raise ValueError(f"methods must name each head of 0 to {total - 1} once, got {named}")


def _check_output(out: object, own: Tensor) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"a WholeMethod must return a tensor, got {type(out).__name__}")
    if out.shape != own.shape:
        raise ValueError(
            f"a WholeMethod must return shape {list(own.shape)}, got {list(out.shape)}"
        )
