"""Lists of blocks and bitmasks, built on the device without host synchronization.

Unless a function says otherwise, its shapes are static and it does not synchronize, so that a CUDA
graph can capture everything from scores to mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div

ONES = 0x0101010101010101  # eight bools, all true
ABSENT = -1  # fills lists past their count
FEW = 1 << 20  # elements; see `is_launches`


def chunks(
    rows: int,
    columns: int,
    device: torch.device,
    elements: int | None = None,
    *,
    on_gpu: int = 1 << 26,
) -> list[slice]:
    """Splits the rows of a table into slices, so that temporaries of one slice stay small.

    On the CPU a slice has `elements` of the table: by default as many as fit in the cache, at most
    an eighth of the table. On other devices each slice costs launches, so slices are larger, with
    `on_gpu` elements. A slice has at least one row. Under tracing there is one slice, as the number
    of slices would become a constant of the graph.
    """
    symbolic = isinstance(rows, torch.SymInt) or isinstance(columns, torch.SymInt)
    if symbolic or torch.compiler.is_compiling():
        return [slice(0, rows)]
    if device.type != "cpu":
        elements = on_gpu
    elif elements is None:
        elements = min(1 << 16, max(1 << 14, rows * columns >> 3))
    step = max(1, elements // max(1, columns))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def by_chunks(
    make: Callable[[slice], Sequence[Tensor]], parts: Sequence[slice], rows: int, dim: int
) -> list[Tensor]:
    """Returns the tables whose rows, along `dim`, `make` computes for each slice."""
    # `if parts` would not do: dynamo takes the truth of the list for that of the slice's end.
    made = make(parts[0] if len(parts) > 0 else slice(0, 0))
    if len(parts) <= 1:
        return list(made)
    tables = [own.new_empty((*own.shape[:dim], rows, *own.shape[dim + 1 :])) for own in made]
    for part in parts:
        made = make(part) if part.start else made
        for table, own in zip(tables, made, strict=True):
            table.narrow(dim, part.start, part.stop - part.start).copy_(own)
    return tables


def list_blocks(
    blocks: Tensor, width: int | None = None, ends: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns ascending lists of the blocks that are set.

    Args:
        blocks: bool `[..., rows, n]`.
        width: capacity of the lists, default n; longer rows are truncated.
        ends: int64 `[rows]`, where each row ends; default n.

    Returns:
        counts int32 `[..., rows]` and indices int32 `[..., rows, width]`.
    """
    *lead, rows, n = blocks.shape
    heads = math.prod(lead)
    width = n if width is None else min(width, n)
    if ends is None and is_launches(blocks):
        return _list_sorted(blocks, width)
    numbers = torch.arange(n, dtype=torch.int32, device=blocks.device)
    blocks = blocks.reshape(heads, rows, n)

    def make(some: slice) -> tuple[Tensor, Tensor]:
        seen = blocks[:, some]
        return numbers, seen if ends is None else seen & (numbers < ends[some, None])

    counts, indices = build_lists(make, heads, rows, n, width, blocks.device)
    return counts.view(*lead, rows), indices.view(*lead, rows, width)


def is_launches(table: Tensor) -> bool:
    """Whether launches would take most of the time of what is made of a table: on a GPU, up to
    `FEW` elements. Then few kernels that do more are faster."""
    if table.device.type == "cpu" or torch.compiler.is_compiling():
        return False
    return table.numel() <= FEW


def _list_sorted(blocks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`list_blocks` in few kernels: a stable sort has the blocks that are set first, in order."""
    counts = blocks.sum(-1, dtype=torch.int32).clamp_(max=width)
    order = blocks.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    slots = torch.arange(width, device=blocks.device)
    indices = order[..., :width].int().masked_fill_(slots >= counts[..., None], ABSENT)
    return counts, indices


def build_lists(
    make: Callable[[slice], tuple[Tensor, Tensor]],
    heads: int,
    rows: int,
    columns: int,
    width: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Returns lists of the blocks that `make` keeps; its tables exist a few rows at a time.

    Args:
        make: maps a slice of rows to integers and bools that broadcast to
            `[heads, rows of the slice, columns]`: block numbers and which to keep. Kept numbers
            ascend.
        width: capacity of the lists; longer rows are truncated.

    Returns:
        counts int32 `[heads, rows]` and indices int32 `[heads, rows, width]`.
    """

    def lists(some: slice) -> tuple[Tensor, Tensor]:
        return list_kept(*make(some), heads, some.stop - some.start, width)

    counts, indices = by_chunks(lists, chunks(rows, heads * columns, device), rows, 1)
    return counts, indices


def list_kept(
    numbers: Tensor, keep: Tensor, heads: int, rows: int, width: int
) -> tuple[Tensor, Tensor]:
    """Returns the lists of one slice of `build_lists`."""
    columns = torch.broadcast_shapes(numbers.shape[-1:], keep.shape[-1:])[0]
    keep = keep.expand(heads, rows, columns)
    # In place, as these are the largest temporaries. Blocks that are not kept go to an extra column
    # before the list, those behind its capacity to one after it; both are dropped.
    place = keep.cumsum(-1, dtype=torch.int32).mul_(keep).clamp_(max=width + 1)
    indices = torch.full((heads, rows, width + 2), ABSENT, dtype=torch.int32, device=keep.device)
    indices.scatter_(-1, place.long(), numbers.int().expand(place.shape))
    counts = keep.sum(-1, dtype=torch.int32).clamp_(max=width)
    return counts, indices[..., 1 : width + 1].contiguous()


def in_order(counts: Tensor, indices: Tensor, blocks: int, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts lists and removes duplicates; keeps the width, limited to `blocks`.

    Args:
        counts: int32 `[..., rows]`. indices: int32 `[..., rows, width]`.
        ends: int64 `[rows]`, where each row ends.
    """
    *lead, rows, given = indices.shape
    heads, width = math.prod(lead), min(given, blocks)
    counts, indices = counts.reshape(heads, rows), indices.reshape(heads, rows, given)

    def make(part: slice) -> tuple[Tensor, Tensor]:
        some = indices[:, part]
        there = is_listed(counts[:, part], some, blocks) & (some < ends[part, None])
        return distinct(some, there)

    counts, indices = build_lists(make, heads, rows, given, width, indices.device)
    return counts.view(*lead, rows), indices.view(*lead, rows, width)


def distinct(numbers: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts the numbers of each row and keeps each once, as `build_lists` needs them.

    Args:
        numbers: integers `[..., n]` below 2^31 - 1, in any order. keep: bool `[..., n]`.
    """
    behind = torch.iinfo(torch.int32).max
    ordered = numbers.int().masked_fill(~keep, behind).sort(-1).values
    changes = ordered[..., 1:].ne(ordered[..., :-1])
    first = torch.cat([torch.ones_like(ordered[..., :1], dtype=torch.bool), changes], -1)
    return ordered, first & (ordered < behind)


def is_listed(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Returns which slots hold an existing block: bool, with the shape of indices."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return (slots < counts[..., None]) & (indices >= 0) & (indices < blocks)


def scattered(counts: Tensor, indices: Tensor, blocks: int, values: Tensor, empty: int) -> Tensor:
    """Returns `[..., blocks]`: the slot's value at each listed block, `empty` elsewhere."""
    target = torch.where(is_listed(counts, indices, blocks), indices, blocks).long()
    result = torch.full(
        (*indices.shape[:-1], blocks + 1), empty, dtype=values.dtype, device=indices.device
    )
    return result.scatter_(-1, target, values.expand(indices.shape))[..., :blocks]


def block_map(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Returns bool `[..., blocks]`: which blocks are listed."""
    true = torch.ones((), dtype=torch.bool, device=indices.device)
    return scattered(counts, indices, blocks, true, False)


def slot_map(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Returns int64 `[..., blocks]`: the slot of each listed block, -1 for other blocks."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return scattered(counts, indices, blocks, slots, -1)


def kinds(seen: Tensor, block_kv: int) -> tuple[Tensor, Tensor]:
    """Returns which blocks have all pairs visible, and which have any.

    Args:
        seen: bool `[..., block_q, n * block_kv]`.

    Returns:
        Two tensors, bool `[..., n]`.
    """
    # Eight pairs to a word: among words of bools, ONES is the largest and 0 the smallest.
    words: Tensor = seen.contiguous().view(torch.int64).unflatten(-1, (-1, block_kv // 8))
    least, most = words.amin(-3), words.amax(-3)
    return least.amin(-1) == ONES, most.amax(-1) > 0


def pack_bits(visible: Tensor) -> Tensor:
    """Packs bool `[..., n]`, n a multiple of 8, into uint8 `[..., n / 8]`, lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=visible.device)
    bits: Tensor = visible.to(torch.uint8).unflatten(-1, (-1, 8)) << shifts
    return bits.sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """Inverse of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(-2)


def interval_bits(begin: Tensor, end: Tensor, block_kv: int) -> Tensor:
    """Returns bitmasks of rows that see the columns `[begin, end)`, clamped to 0 and block_kv.

    Args:
        begin, end: integers `[..., rows]`, `begin <= end`.

    Returns:
        uint8 `[..., rows, block_kv / 8]`, as from `pack_bits`.
    """
    first = torch.arange(0, block_kv, 8, dtype=torch.int16, device=begin.device)

    def ones(column: Tensor) -> Tensor:
        """Returns 2^n, where n is the number of columns of each byte before `column`."""
        before = column.clamp(0, block_kv).to(torch.int16)[..., None] - first
        return torch.ones_like(before) << before.clamp_(0, 8)

    return (ones(end) - ones(begin)).to(torch.uint8)


def take_slots(bits: Tensor, slots: Tensor) -> Tensor:
    """Gathers bitmasks `[..., width, block_q, bytes]` at slots `[..., n]`; zeros for slot -1."""
    tail = bits.shape[-2:]
    index = slots.clamp(min=0)[..., None, None].expand(*slots.shape, *tail)
    if bits.shape[-3] == 0:
        return bits.new_zeros(*slots.shape, *tail)
    return bits.gather(-3, index) * (slots >= 0)[..., None, None]


def key_limits(q_len: int, kv_len: int, causal: bool, rows: int, device: torch.device) -> Tensor:
    """Returns int64 `[rows]`: query i sees keys below this limit; 0 for rows past q_len."""
    i = torch.arange(rows, device=device)
    limit = (i + 1 + kv_len - q_len).clamp(0, kv_len) if causal else torch.full_like(i, kv_len)
    return torch.where(i < q_len, limit, 0)


def reached(
    q_len: int, kv_len: int, block_q: int, block_kv: int, causal: bool, device: torch.device
) -> Tensor:
    """Returns int64 `[nQ]`: how many key blocks, from the first, each query block may see."""
    last = torch.arange(1, ceil_div(q_len, block_q) + 1, device=device) * block_q
    last = last.clamp(max=q_len) - 1
    keys = (last + 1 + kv_len - q_len) if causal else torch.full_like(last, kv_len)
    return ceil_div(keys.clamp(0, kv_len), block_kv)


def reached_before(
    row: int, q_len: int, kv_len: int, block_q: int, block_kv: int, causal: bool
) -> int:
    """Returns how many key blocks the query blocks before `row` may see: the last of `reached`."""
    keys = min(row * block_q, q_len) + kv_len - q_len if causal else kv_len
    return ceil_div(min(max(keys, 0), kv_len), block_kv)


def reachable_blocks(
    q_len: int, kv_len: int, block_q: int, block_kv: int, causal: bool, device: torch.device
) -> Tensor:
    """Returns bool `[nQ, nK]`: blocks with a pair that `causal` allows."""
    columns = torch.arange(ceil_div(kv_len, block_kv), device=device)
    return columns < reached(q_len, kv_len, block_q, block_kv, causal, device)[:, None]
