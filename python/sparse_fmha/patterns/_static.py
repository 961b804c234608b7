"""Common code of patterns that do not depend on the input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.block_mask import BlockMask

AT_ONCE = 16  # blocks whose pairs are evaluated together


class Lists(NamedTuple):
    """Lists of blocks on the CPU, int32."""

    counts: Tensor  # [heads, nQ]
    indices: Tensor  # [heads, nQ, width]

    def of_mask(self) -> tuple[Tensor, Tensor]:
        """Returns counts and indices with a batch axis."""
        return self.counts[None], self.indices[None]


def pattern_rows(
    q_len: int,
    kv_len: int,
    block: int,
    block_q: int,
    block_kv: int,
    device: torch.device | str,
) -> Tensor:
    """Returns the pattern block that each query block is in, int64 `[nQ]`.

    Query i is at position `i + kv_len - q_len`.

    Raises:
        ValueError: a query or key block does not lie in one block of the pattern.
    """
    block_checks.check_sizes(q_len, kv_len, block_q, block_kv, True)
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if block % size:
            raise ValueError(f"{name} must divide the pattern's block of {block}, got {size}")
    shift = kv_len - q_len
    if shift % block_q:
        raise ValueError(
            f"kv_len - q_len must be a multiple of block_q = {block_q}, so that each query block "
            f"lies in one block of the pattern, got {shift}"
        )
    rows = torch.arange(ceil_div(q_len, block_q), device=device) * block_q + shift
    return rows // block


def from_pattern(
    make: Callable[[Tensor], tuple[Tensor, Tensor]],
    heads: int,
    columns: int,
    q_len: int,
    kv_len: int,
    block: int,
    block_q: int,
    block_kv: int,
    causal: bool,
    device: torch.device | str,
) -> Lists:
    """Builds lists of full blocks from the key blocks of each query block of a pattern.

    Args:
        make: maps query blocks of the pattern, int64 `[n, 1]`, to its key blocks and whether each
            is seen, which broadcast to `[heads, n, columns]`. Seen blocks ascend. With `causal`,
            it may include blocks above the diagonal.
        heads, columns: sizes of the result of `make`.
    """
    device = torch.device(device)
    rows = pattern_rows(q_len, kv_len, block, block_q, block_kv, device)
    parts = block // block_kv
    part = torch.arange(parts, device=device)
    blocks_kv = ceil_div(kv_len, block_kv)
    ends = block_lists.reached(q_len, kv_len, block_q, block_kv, causal, device)

    def tiles(some: slice) -> tuple[Tensor, Tensor]:
        numbers, seen = torch.broadcast_tensors(*make(rows[some, None]))
        numbers = (numbers[..., None] * parts + part).flatten(-2)
        seen = seen[..., None].expand(*seen.shape, parts).flatten(-2)
        return numbers, seen & (numbers < ends[some, None])

    width = min(columns * parts, blocks_kv)
    return Lists(*block_lists.build_lists(tiles, heads, len(rows), columns * parts, width, device))


def from_ranges(ranges: Sequence[tuple[Tensor, Tensor]]) -> Lists:
    """Builds lists of the blocks in ranges, which must ascend without overlap.

    Args:
        ranges: begin and end, int64 `[nQ]` on the CPU; a range that ends before it begins is empty.
    """
    sizes = [(end - begin).clamp(min=0) for begin, end in ranges]
    rows = len(sizes[0])
    widths = [int(size.max()) if rows else 0 for size in sizes]
    slots = [torch.arange(width, device="cpu") for width in widths]

    def make(some: slice) -> tuple[Tensor, Tensor]:
        numbers = [begin[some, None] + s for (begin, _), s in zip(ranges, slots, strict=True)]
        ends = [end[some, None] for _, end in ranges]
        seen = [number < end for number, end in zip(numbers, ends, strict=True)]
        return torch.cat(numbers, 1), torch.cat(seen, 1)

    width = int(torch.stack(sizes).sum(0).max()) if rows else 0
    cpu = torch.device("cpu")
    return Lists(*block_lists.build_lists(make, 1, rows, sum(widths), width, cpu))


def from_map(blocks: Tensor) -> Lists:
    """Builds lists of the blocks set in bool `[heads, nQ, nK]`, as wide as the longest list."""
    width = int(blocks.sum(-1).max()) if blocks.numel() else 0
    return Lists(*block_lists.list_blocks(blocks, width))


def replace_rows(lists: Lists, rows: Tensor, others: Lists) -> Lists:
    """Replaces the lists at `rows`, int64 `[n]`, by `others`; as wide as the longest list."""
    counts = lists.counts.index_copy(1, rows, others.counts)
    width = int(counts.max()) if counts.numel() else 0
    more = width - lists.indices.shape[-1]
    indices = torch.nn.functional.pad(lists.indices, (0, more), value=block_lists.ABSENT)
    more = width - others.indices.shape[-1]
    replacing = torch.nn.functional.pad(others.indices, (0, more), value=block_lists.ABSENT)
    return Lists(counts, indices.contiguous().index_copy_(1, rows, replacing))


def from_rules(
    rules: Sequence[Callable[[Tensor, Tensor], Tensor]],
    full: Lists,
    partial: Lists,
    special_q: Tensor,
    special_k: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    causal: bool,
    device: torch.device | str,
) -> BlockMask:
    """Builds a token-exact mask; rules are evaluated only in partial blocks.

    Partial blocks of a head at the same distance from the diagonal are equal, except special ones,
    and are evaluated once.

    Args:
        rules: visible(query, key) of token indices, one for each head; `causal` applies on top.
        full: blocks with all pairs visible. partial: blocks that may have visible pairs.
        special_q, special_k: bool `[nQ]` and `[nK]` on the CPU, query and key blocks in which a
            rule depends on more than query - key.
    """
    sizes = (q_len, kv_len, block_q, block_kv)
    counts, indices = (x.to(device) for x in full.of_mask())
    width = partial.indices.shape[-1]
    if width == 0:
        return BlockMask(counts, indices, *sizes, causal=causal)
    special_q, special_k = special_q.clone(), special_k.clone()
    special_q[-1:] |= q_len % block_q != 0
    special_k[-1:] |= kv_len % block_kv != 0
    shape = (*partial.indices.shape, block_q, block_kv // 8)
    bits = torch.empty(shape, dtype=torch.uint8, device=device)
    for head, rule in enumerate(rules):
        rows, columns, which = _unlike(
            partial.counts[head], partial.indices[head], special_q, special_k, block_q, block_kv
        )
        # The last pattern is empty, for slots past the counts.
        patterns = torch.zeros(len(rows) + 1, *shape[3:], dtype=torch.uint8, device=device)
        for first in range(0, len(rows), AT_ONCE):
            some = slice(first, min(first + AT_ONCE, len(rows)))
            patterns[some] = _evaluate(rule, rows[some], columns[some], *sizes, device)
        torch.index_select(
            patterns, 0, which.flatten().to(device), out=bits[head].view(-1, *shape[3:])
        )
    return BlockMask(
        counts,
        indices,
        *sizes,
        partial_counts=partial.counts[None].to(device),
        partial_indices=partial.indices[None].to(device),
        partial_bits=bits[None],
        causal=causal,
    )


def _unlike(
    counts: Tensor,
    indices: Tensor,
    special_q: Tensor,
    special_k: Tensor,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a row and column of each kind of listed block, and the kind in each slot.

    Returns:
        rows, columns int64 `[kinds]`, and kinds int64 `[nQ, width]`; `kinds` past the counts.
    """
    rows, width = indices.shape
    row = torch.arange(rows, device="cpu")[:, None]
    column = indices.clamp(min=0).long()
    there = torch.arange(width, device="cpu") < counts[:, None]
    blocks_kv = len(special_k)
    alone = special_q[:, None] | special_k[column]
    far = row * block_q - column * block_kv + blocks_kv * block_kv  # above 0
    kind = torch.where(alone, -1 - (row * blocks_kv + column), far)
    kinds, inverse = kind[there].unique(return_inverse=True)
    place = torch.empty_like(kinds)
    place[inverse] = (row * width + torch.arange(width, device="cpu"))[there]
    which = torch.full((rows, width), len(kinds), dtype=torch.int64, device="cpu")
    which[there] = inverse
    return place // width, column.flatten()[place], which


def _evaluate(
    rule: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    columns: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    device: torch.device | str,
) -> Tensor:
    """Returns bitmasks uint8 `[n, block_q, block_kv / 8]` of the blocks at rows and columns."""
    tokens_q, tokens_k = (torch.arange(n, device=device) for n in (block_q, block_kv))
    q = (rows[:, None].to(device) * block_q + tokens_q)[:, :, None]
    k = (columns[:, None].to(device) * block_kv + tokens_k)[:, None]
    seen = rule(q.clamp(max=q_len - 1), k.clamp(max=kv_len - 1))
    return block_lists.pack_bits(seen & (q < q_len) & (k < kv_len))
