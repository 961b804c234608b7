"""What patterns that do not look at the input have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.block_mask import BlockMask

AT_ONCE = 16  # blocks of which all pairs are evaluated together


class Lists(NamedTuple):
    """Lists of blocks on the CPU, int32."""

    counts: Tensor  # [heads, nQ]
    indices: Tensor  # [heads, nQ, width]

    def of_mask(self) -> tuple[Tensor, Tensor]:
        """Counts and indices with an axis for the batch."""
        return self.counts[None], self.indices[None]


def pattern_rows(
    q_len: int,
    kv_len: int,
    block: int,
    block_q: int,
    block_kv: int,
    device: torch.device | str,
) -> Tensor:
    """Which block of a pattern each query block is in, int64 `[nQ]`.

    Query i stands at position `i + kv_len - q_len`.

    Raises:
        ValueError: a query or key block that does not lie in one block of the pattern.
    """
    block_checks.check_sizes(q_len, kv_len, block_q, block_kv, True)
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if block % size:
            raise ValueError(f"{name} is {size}; it must divide the pattern's block of {block}")
    shift = kv_len - q_len
    if shift % block_q:
        raise ValueError(
            f"kv_len - q_len is {shift}; a multiple of block_q = {block_q} is needed, so that each "
            "query block lies in one block of the pattern"
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
    """Lists of whole blocks of a pattern, from the key blocks of each of its query blocks.

    Args:
        make: of query blocks of the pattern, int64 `[n, 1]`, to key blocks of it and whether each
            is seen, which broadcast to `[heads, n, columns]`: ascending where they are seen. With
            `causal` those behind the diagonal need not be left out.
        heads, columns: of what it makes.
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
    """Lists of the blocks in some ranges, which do not overlap and ascend.

    Args:
        ranges: begin and end, int64 `[nQ]` on the CPU; those that end before they begin are empty.
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
    """Lists of what is set in bool `[heads, nQ, nK]`, as wide as the fullest row."""
    width = int(blocks.sum(-1).max()) if blocks.numel() else 0
    return Lists(*block_lists.list_blocks(blocks, width))


def replace_rows(lists: Lists, rows: Tensor, others: Lists) -> Lists:
    """The lists, at rows int64 `[n]` the `others` of `[heads, n]`; as wide as the fullest row."""
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
    """A mask that is exact for tokens; the rules are evaluated in partial blocks alone.

    Partial blocks that must be alike are evaluated once: those of a head that lie as far from the
    diagonal, but for special ones.

    Args:
        rules: of each head, visible(query, key) of indices; the causal flag comes on top.
        full: blocks where all is visible. partial: blocks where something may be.
        special_q, special_k: bool `[nQ]` and `[nK]` on the CPU, the blocks of queries and of keys
            in which a rule looks at more than query - key.
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
        # The last pattern has no bit, for what is behind the counts.
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
    """A row and a column of each kind of listed block, and the kind in each slot.

    Returns:
        rows, columns int64 `[kinds]`, and int64 `[nQ, width]`; `kinds` behind the counts.
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
    """The bitmasks uint8 `[n, block_q, block_kv / 8]` of blocks."""
    tokens_q, tokens_k = (torch.arange(n, device=device) for n in (block_q, block_kv))
    q = (rows[:, None].to(device) * block_q + tokens_q)[:, :, None]
    k = (columns[:, None].to(device) * block_kv + tokens_k)[:, None]
    seen = rule(q.clamp(max=q_len - 1), k.clamp(max=kv_len - 1))
    return block_lists.pack_bits(seen & (q < q_len) & (k < kv_len))
