"""Block masks of packed documents, from cumulative lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.parts import BlockParts


class Spans(NamedTuple):
    """The key blocks `[first, stop)` of each query block's documents; int64 `[nQ]`."""

    first: Tensor  # key blocks with a visible key
    stop: Tensor
    full_first: Tensor  # key blocks seen whole, causality apart; empty if the query block
    full_stop: Tensor  # has tokens of several documents

    def full_counts(self) -> Tensor:
        return self.full_stop - self.full_first

    def partial_counts(self) -> Tensor:
        return self.stop - self.first - self.full_counts()


def from_documents(
    cu: Tensor,
    block_q: int,
    block_kv: int,
    causal: bool,
    length: int | None,
    max_len: int | None,
    validate: bool,
) -> BlockParts:
    """See `BlockMask.from_documents`."""
    block_checks.check_sizes(0, 0, block_q, block_kv, causal)
    for name, value in (("length", length), ("max_len", max_len)):
        block_checks.check_width(name, value)
    _checks.check_flag("validate", validate)
    check_starts(cu)
    if validate or length is None or max_len is None:
        host = cu.cpu()
        check_values(host, length, max_len)
        length = int(host[-1])
        spans = _spans(host, length, block_q, block_kv, causal)
        each = (spans.full_counts(), spans.partial_counts())
        widths = [int(count.max()) if length else 0 for count in each]
    if max_len is not None:
        widths = _bounds(length, max_len, block_q, block_kv, causal)
    spans = _spans(cu, length, block_q, block_kv, causal)
    return parts_of(
        spans,
        widths,
        (length, length, block_q, block_kv),
        causal,
        lambda indices: _bits(cu, indices, length, block_q, block_kv),
    )


def parts_of(
    spans: Spans,
    widths: Sequence[int],
    sizes: tuple[int, int, int, int],
    causal: bool,
    bits: Callable[[Tensor], Tensor],
) -> BlockParts:
    """Returns the mask of runs of key blocks.

    Args:
        widths: capacities of the lists of full and of partial blocks.
        sizes: q_len, kv_len, block_q and block_kv.
        bits: returns the bitmasks `[nQ, width, block_q, block_kv / 8]` of the partial blocks
            `[nQ, width]`.
    """
    rows, device = spans.first.shape[0], spans.first.device

    def make(width: int, partial: bool) -> tuple[Tensor, Tensor]:
        slots = torch.arange(width, device=device)

        def candidates(part: slice) -> tuple[Tensor, Tensor]:
            first, stop, full_first, full_stop = (x[part, None] for x in spans)
            if not partial:
                return full_first + slots, full_first + slots < full_stop
            number = first + slots  # full blocks are contiguous: skip them
            number = torch.where(number < full_first, number, number + (full_stop - full_first))
            return number, number < stop

        return block_lists.build_lists(candidates, 1, rows, width, width, device)

    counts, indices = make(widths[0], False)
    lists = (counts[None], indices[None])
    if not widths[1]:
        return BlockParts(*lists, *sizes, causal=causal)
    counts, indices = make(widths[1], True)
    return BlockParts(
        *lists,
        *sizes,
        partial_counts=counts[None],
        partial_indices=indices[None],
        partial_bits=bits(indices[0])[None, None],
        causal=causal,
    )


def document_of(cu: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the document of each token begins and ends; skips empty documents."""
    number = torch.searchsorted(cu, tokens, right=True).clamp_(max=cu.shape[0] - 1)
    return cu[(number - 1).clamp(min=0)].long(), cu[number].long()


def _spans(cu: Tensor, length: int, block_q: int, block_kv: int, causal: bool) -> Spans:
    rows = torch.arange(ceil_div(length, block_q), device=cu.device)
    last = ((rows + 1) * block_q).clamp(max=length) - 1
    begin, end_of_first = document_of(cu, (rows * block_q).int())
    _, end = document_of(cu, last.int())
    one = end_of_first == end
    seen = torch.minimum(end, last + 1) if causal else end
    first, stop = begin // block_kv, ceil_div(seen, block_kv)
    # The last key block is full if it ends with the document and the sequence.
    inside = torch.where(end == length, ceil_div(length, block_kv), end // block_kv)
    full_first = torch.minimum(ceil_div(begin, block_kv), stop)
    full_stop = torch.minimum(inside, stop)
    full_stop = torch.where(one, torch.maximum(full_stop, full_first), full_first)
    return Spans(first, stop, full_first, full_stop)


def _bounds(length: int, max_len: int, block_q: int, block_kv: int, causal: bool) -> list[int]:
    """Returns the most full and partial blocks of a row, for documents of max_len tokens."""
    blocks = ceil_div(length, block_kv)
    # Documents extend a query block by max_len - 1 tokens at each end, causal ones at one end.
    span = block_q + (max_len - 1) * (1 if causal else 2) if max_len else 0
    partial = ceil_div(max(span - 1, 0), block_kv) + 1
    return [min(ceil_div(max_len, block_kv), blocks), min(partial, blocks)]


def _bits(cu: Tensor, indices: Tensor, length: int, block_q: int, block_kv: int) -> Tensor:
    """Returns uint8 bitmasks `[nQ, width, block_q, block_kv / 8]` of the blocks `[nQ, width]`."""
    rows, width = indices.shape
    shape = (rows, width, block_q, block_kv // 8)
    bits = torch.empty(shape, dtype=torch.uint8, device=cu.device)
    for part in block_lists.chunks(rows, width * block_q * block_kv // 8, cu.device):
        tokens = torch.arange(part.start * block_q, part.stop * block_q, device=cu.device)
        begin, end = document_of(cu, tokens.int())
        end = torch.where(tokens < length, end, begin)
        begin, end = (x.view(-1, 1, block_q) for x in (begin, end))
        block = indices[part, :, None]
        first = block * block_kv
        end = torch.where(block == block_lists.ABSENT, begin, end)
        bits[part] = block_lists.interval_bits(begin - first, end - first, block_kv)
    return bits


def check_starts(cu: Tensor) -> None:
    block_checks.check_list_tensor("cu", cu, torch.int32)
    if cu.dim() != 1 or not cu.shape[0]:
        raise ValueError(f"cu must have shape [documents + 1], got {list(cu.shape)}")


def check_values(cu: Tensor, length: int | None, max_len: int | None) -> None:
    """Checks the values of cu, on the host."""
    first, last = int(cu[0]), int(cu[-1])
    if first:
        raise ValueError(f"cu[0] must be 0, got {first}")
    sizes = cu.diff()
    falls = (sizes < 0).nonzero()
    if len(falls):
        n = int(falls[0])
        raise ValueError(
            f"cu must not descend, got cu[{n}] = {int(cu[n])} and cu[{n + 1}] = {int(cu[n + 1])}"
        )
    if length not in (None, last):
        raise ValueError(f"length must be cu[-1], {last}, got {length}")
    most = int(sizes.max()) if len(sizes) else 0
    if max_len is not None and max_len < most:
        raise ValueError(
            f"max_len must be at least the longest document in cu, {most} tokens, got {max_len}"
        )
