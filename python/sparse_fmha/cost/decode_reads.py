"""What a decode call reads of its cache, and in how many parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.cost import model
from sparse_fmha.decode import arguments
from sparse_fmha.decode.arguments import TILE, Keys

# Of a sum over 6 GB on an H200, bytes in a microsecond. No call reads faster.
READ_RATE = 4.361e6
CPU_SPLIT = 1024  # where split_tokens is None
FEW_ROWS_HEAD_DIM = 128  # of the kernel for few rows, at most
ROWS = 64  # of a group: query tokens times query heads of a KV head


class Reads(NamedTuple):
    """Of one call."""

    bytes: int  # keys and values, each once for each list; q and out
    all_bytes: int  # the same if all keys of the cache that are in use were read
    parts: int  # splits, or what the workers of a GPU take one after the other
    assumed: bool  # lengths and counts could not be read: caches and lists are taken to be full

    @property
    def least_us(self) -> tuple[float, float]:
        """Of the call, and of one that reads all keys, at the rate of a read-only stream."""
        return self.bytes / READ_RATE, self.all_bytes / READ_RATE


def keys_of(given: Mapping[str, Any]) -> Keys:
    """The arguments of the op that say which keys are seen."""
    rest = ("head_starts", "head_lengths", "tree_mask", "causal", "window", "scale", "sink")
    return Keys(
        given["page_table"],
        *arguments.of_blocks(given["blocks"]),
        *arguments.of_tokens(given["tokens"]),
        *(given[name] for name in rest),
    )


def _parts_of_tiles(tiles: int, dim: int, rows: int) -> int:
    """On a GPU: thread blocks have two workers, or one at head dims above 128."""
    from sparse_fmha._extension import _C

    parts = _C.decode
    workers = model.MULTIPROCESSORS * (2 if dim <= 128 else 1)
    return parts.Parts(tiles, workers, parts.short_parts(rows)).count()


def few_rows_blocks(given: Mapping[str, Any], keys: Keys) -> int:
    """On Hopper: the thread blocks that share a KV head of a request, in the kernel for few rows.

    Zero if the call takes the other kernel.
    """
    from sparse_fmha._extension import _C

    q, cache = given["q"], given["k_cache"]
    heads = cache.shape[2]
    threshold = given["skip_threshold"]
    votes = isinstance(threshold, Tensor) or threshold > 0 or given["return_stats"]
    if not heads or q.shape[-1] > FEW_ROWS_HEAD_DIM or votes:
        return 0
    paged = keys.page_table is not None
    page = cache.shape[1] if paged else 0
    lists = keys.block_indices if keys.block_indices is not None else keys.token_indices
    return _C.decode.few_rows_blocks(
        q.shape[0],
        heads,
        q.shape[1],
        q.shape[2] // heads,
        cache.shape[1] * (1 if keys.page_table is None else keys.page_table.shape[-1]),
        page=page,
        block=0 if keys.block_indices is None else keys.block,
        width=0 if lists is None else lists.shape[-1],
        tokens=keys.token_indices is not None,
        by_query=keys.token_indices is not None and keys.token_indices.shape[1] > 1,
        spans=keys.head_starts is not None,
        tree=keys.tree_mask is not None,
        split=given["split_tokens"] or 0,
    )


def reads_of(given: Mapping[str, Any], keys: Keys, on_cpu: bool) -> Reads:
    """Of checked arguments; reads lengths and lists, which waits for their device."""
    q, cache = given["q"], given["k_cache"]
    batch, len_q, heads_q, dim = q.shape
    heads = cache.shape[2]
    capacity = cache.shape[1] * (1 if keys.page_table is None else keys.page_table.shape[-1])
    seq_lens: Tensor = given["seq_lens"]
    lists = (keys.block_counts, keys.block_indices, keys.token_indices, keys.token_counts)
    small = (seq_lens, keys.head_starts, keys.head_lengths, *lists)
    assumed = any(x is not None and x.device.type == "meta" for x in small)

    def read(x: Tensor, otherwise: int) -> Tensor:
        if assumed:
            return torch.full(x.shape, otherwise, dtype=torch.int64, device="cpu")
        return x.long().cpu()

    end = read(seq_lens, capacity).clamp(0, capacity)
    end = end[:, None].expand(batch, heads) if end.dim() == 1 else end
    start = torch.zeros_like(end)
    everything = int(end.sum())
    if keys.head_starts is not None and keys.head_lengths is not None:
        start = torch.minimum(read(keys.head_starts, 0).clamp(min=0), end)
        spans = start + read(keys.head_lengths, capacity)
        end = torch.minimum(spans.clamp(min=0), end).maximum(start)
    begin = start
    if keys.window is not None:  # of the first query
        begin = torch.maximum(start, (end - len_q - keys.window + 1).clamp(min=0))
        begin = torch.minimum(begin, end)
    row_groups = ceil_div(len_q * (heads_q // heads if heads else 0), ROWS)
    if keys.block_indices is not None and keys.block_counts is not None:
        count = read(keys.block_counts, keys.block_indices.shape[-1])
        first = read(keys.block_indices, 0) * keys.block
        if assumed:
            first = first + torch.arange(first.shape[-1], device="cpu") * keys.block
        rows = torch.minimum(first + keys.block, end[..., None])
        rows = (rows - torch.maximum(first, begin[..., None])).clamp(0, keys.block)
        rows = torch.where(_listed(count, first), rows, 0)
        slots = count.clamp(0, first.shape[-1]).expand(batch, heads) * keys.block
    elif keys.token_indices is not None:
        at = read(keys.token_indices, 0)
        count = torch.full(at.shape[:-1], at.shape[-1], dtype=torch.int64, device="cpu")
        if keys.token_counts is not None:
            count = read(keys.token_counts, at.shape[-1])
        seen = (at >= begin[:, None, :, None]) & (at < end[:, None, :, None])
        listed = _listed(count, at)
        rows = (listed if assumed else seen & listed).expand(-1, -1, heads, -1)
        slots = count.clamp(0, at.shape[-1]).expand(batch, -1, heads)
        if slots.shape[1] > 1:  # a list for each query
            row_groups = ceil_div(heads_q // heads if heads else 0, ROWS)
    else:
        rows, slots = end - begin, end - start
    if on_cpu or given["split_tokens"] is not None:
        split = given["split_tokens"] or CPU_SPLIT
        before = 0 if keys.block_indices is not None or keys.token_indices is not None else begin
        skipped = (before - start) // split if isinstance(before, Tensor) else 0
        parts = int((-(-slots // split) - skipped).clamp(min=0).sum()) * row_groups
    else:
        tiles = int((-(-slots // TILE)).sum()) * row_groups
        parts = _parts_of_tiles(tiles, dim, min(ROWS, len_q * (heads_q // heads if heads else 0)))
    width = dim * q.element_size() * 2  # of keys and values, and of q and out
    own = batch * len_q * heads_q
    return Reads((int(rows.sum()) + own) * width, (everything + own) * width, parts, assumed)


def _listed(count: Tensor, entries: Tensor) -> Tensor:
    return torch.arange(entries.shape[-1], device="cpu") < count[..., None]
