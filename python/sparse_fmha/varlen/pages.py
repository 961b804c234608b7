"""Attention of packed queries over keys in pages, on block lists.

The sequences become a batch: their queries are padded to the longest, and the pages of each are
copied next to each other. A page that does not exist leaves no gap, so what a query sees stays a
run of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._ops.autocast import cast_where_enabled
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention import block_sparse_attention
from sparse_fmha.masks import packed
from sparse_fmha.masks.block_mask import BlockMask

BLOCK = 128


def over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    causal: bool,
    seqused_k: Tensor | None,
    page_table: Tensor,
    scale: float | None,
    *,
    window: packed.Window = packed.EVERYTHING,
    skip_threshold: float | Tensor = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Runs `block_sparse_attention` on copies of queries and keys, on any device.

    Returns:
        out and lse, as `varlen_attention` returns them.
    """
    if recorded(q, k, v):
        raise NotImplementedError(
            "varlen_attention has no backward pass for keys in pages; call it without page_table, "
            "or under torch.no_grad()"
        )
    rows = ceil_div(min(max_q, q.shape[0]), BLOCK) * BLOCK
    pages = _pages_of(page_table, cu_k, seqused_k, k.shape[0], k.shape[1], max_k)
    batch = page_table.shape[0]
    if not (batch and rows and k.shape[0] and pages.most):
        like = cast_where_enabled(q, k, v)[0]
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        return torch.zeros_like(like, memory_format=torch.contiguous_format), lse
    if causal:
        window = packed.Window(window.left, 0)
    queries = _queries_of(cu_q, q.shape[0], rows)
    keys, values = (_in_order(x, pages) for x in (k, v))
    parts = packed.padded_mask(_seen(queries, pages, window), rows, keys.shape[1], window)
    out, lse = block_sparse_attention(
        torch.where(queries.held[:, :, None, None], q[queries.tokens], 0),
        keys,
        values,
        BlockMask(**vars(parts)),
        scale=scale,
        softcap=softcap,
        skip_threshold=skip_threshold,
        return_lse=True,
    )
    tokens = torch.arange(q.shape[0], device=q.device)
    number = (torch.searchsorted(queries.starts, tokens, right=True) - 1).clamp(0, batch - 1)
    row = tokens - queries.starts[number]
    held = (row >= 0) & (tokens < queries.starts[-1]) & (row < rows)
    row = row.clamp(0, rows - 1)
    return (
        torch.where(held[:, None, None], out[number, row], 0),
        torch.where(held[:, None], lse[number, row], -torch.inf),
    )


def recorded(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the call would have a backward pass."""
    return torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)


class _Queries(NamedTuple):
    starts: Tensor  # [B + 1]
    lengths: Tensor  # [B]
    tokens: Tensor  # [B, rows], of q
    held: Tensor  # [B, rows]; whether the row has a query


def _queries_of(cu_q: Tensor, tokens: int, rows: int) -> _Queries:
    starts = packed.starts_of(cu_q, tokens)
    lengths = starts.diff()
    places = torch.arange(rows, device=cu_q.device)
    found = (starts[:-1, None] + places).clamp(max=tokens - 1)
    return _Queries(starts, lengths, found, places < lengths[:, None])


class _Pages(NamedTuple):
    """The pages of each sequence that exist, in order."""

    lengths: Tensor  # [B], keys in use, with those that do not exist
    exists: Tensor  # [B, n + 1], of page i
    before: Tensor  # [B, n + 1], how many pages before page i exist
    order: Tensor  # [B, n'], which pages are copied; at the end any
    page: int
    most: int  # keys of a sequence, an upper bound

    def keys_before(self, positions: Tensor) -> Tensor:
        """Returns how many keys before the positions `[B, any]` exist."""
        number = positions // self.page
        whole = self.before.gather(1, number) * self.page
        return whole + torch.where(self.exists.gather(1, number), positions % self.page, 0)


def _pages_of(
    table: Tensor,
    cu_k: Tensor | None,
    seqused_k: Tensor | None,
    count: int,
    page: int,
    max_k: int,
) -> _Pages:
    width = min(table.shape[1], ceil_div(max_k, page)) if page else 0
    if seqused_k is not None:
        lengths = seqused_k.long()
    else:
        assert cu_k is not None  # checked
        lengths = packed.starts_of(cu_k, 2**31 - 1).diff()
    lengths = lengths.clamp(0, width * page)
    entries = torch.nn.functional.pad(table[:, :width].long(), (0, 1), value=-1)
    numbers = torch.arange(width + 1, device=table.device)
    exists = (entries >= 0) & (entries < count) & (numbers * page < lengths[:, None])
    before = exists.cumsum(1) - exists.long()
    # Behind the last key there is room for a whole block of zeros.
    room = width + ceil_div(BLOCK, page) if page else 0
    order = torch.zeros(table.shape[0], room + 1, dtype=torch.long, device=table.device)
    order.scatter_(1, torch.where(exists, before, room), entries.clamp(0, max(count - 1, 0)))
    return _Pages(lengths, exists, before, order[:, :room], page, width * page)


def _in_order(cache: Tensor, pages: _Pages) -> Tensor:
    """Returns copies `[B, keys, Hkv, D]` of the pages, with zeros in the block of the last key."""
    rows = cache.index_select(0, pages.order.flatten())
    rows = rows.view(len(pages.order), -1, *cache.shape[2:])
    end = pages.keys_before(pages.lengths[:, None])
    behind = end + torch.arange(BLOCK, device=cache.device)
    # Assigning a number would copy it from the host, which no graph may capture.
    own = torch.arange(len(rows), device=cache.device)[:, None]
    rows.index_put_((own, behind), rows.new_zeros(()))
    return rows


def _seen(queries: _Queries, pages: _Pages, window: packed.Window) -> packed.Seen:
    """What each row sees of the copies."""
    lengths = pages.lengths[:, None]
    places = torch.arange(queries.held.shape[1], device=lengths.device)
    own = places + lengths - queries.lengths[:, None]  # the key at the same distance from the end
    begin, end = torch.zeros_like(own), lengths.expand_as(own)
    if window.left >= 0:
        begin = torch.minimum((own - window.left).clamp(min=0), end)
    if window.right >= 0:
        end = torch.maximum(torch.minimum(end, own + window.right + 1), begin)
    begin, end = pages.keys_before(begin), pages.keys_before(end)
    end = torch.where(queries.held, end, begin)
    return packed.Seen(begin.flatten(), end.flatten(), queries.held.flatten())
