"""Packed documents, each with a sliding window and sinks, token-exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._checks import check_flag, check_int, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists
from sparse_fmha.masks import documents as starts
from sparse_fmha.masks.block_checks import check_sizes, check_width
from sparse_fmha.masks.block_mask import BlockMask


@plain_ints
def documents(
    cu: Tensor,
    *,
    window: int | None = None,
    sink: int = 0,
    causal: bool = True,
    block_q: int = 128,
    block_kv: int = 128,
    length: int | None = None,
    max_len: int | None = None,
    validate: bool = False,
) -> BlockMask:
    """Returns the mask of packed documents, each with a sliding window and attention sinks.

    Query i of a document sees its keys j with `|i - j| < window`, and the first `sink` keys of the
    document; with `causal`, only those with `j <= i`. The window includes the query's own token. It
    shrinks at the document's borders and does not shift. Without a window, a query sees all of its
    document, as in `BlockMask.from_documents`. Source of window and sinks: Xiao et al. 2023,
    arXiv:2309.17453, section 3; packing as in `flash_attn_varlen_func`.

    Pairs of tokens are evaluated only in partial blocks. Bitmasks take `block_q * block_kv / 8`
    bytes for each partial block.

    Args:
        cu: int32 `[documents + 1]`, cumulative lengths: the start of each document, then T, the
            number of tokens. `cu[0]` is 0. Entries must not descend; equal entries are empty
            documents.
        window: tokens, at least 1; None: the whole document.
        sink: tokens at the start of each document, at least 0; requires a window.
        block_q, block_kv, causal: as in `BlockMask`.
        length: T. max_len: upper bound of a document's tokens. If both are given (with a window,
            length is enough), the mask is built on cu's device without waiting for it, and the
            values in cu are not checked. Otherwise the host reads cu.
        validate: always check the values in cu; waits for the device.

    Returns:
        A mask of T queries and T keys, one for all batch entries and heads, on cu's device.

    Raises:
        TypeError: cu is not an int32 tensor, or another argument has a wrong type.
        ValueError: a size is not allowed, a sink is given without a window, or as in
            `BlockMask.from_documents`.
    """
    check_int("sink", sink)
    if window is None:
        if sink:
            raise ValueError(f"sink must be 0 without a window, which hides no key, got {sink}")
        return BlockMask.from_documents(
            cu, block_q, block_kv, causal, length=length, max_len=max_len, validate=validate
        )
    window = check_int("window", window, 1)
    check_sizes(0, 0, block_q, block_kv, causal)
    check_width("length", length)
    check_width("max_len", max_len)
    check_flag("validate", validate)
    starts.check_starts(cu)
    exact = length is None
    if exact or validate:
        host = cu.cpu()
        starts.check_values(host, length, max_len)
        length = int(host[-1])
    assert length is not None
    rule = Rule(length, window, sink, block_q, block_kv, causal)
    lists = [_lists(rule, cu, partial) for partial in (False, True)]
    if exact:  # as wide as the longest list
        lists = [
            (counts, indices[..., : int(counts.max()) if counts.numel() else 0].contiguous())
            for counts, indices in lists
        ]
    full, (counts, indices) = lists
    sizes = (length, length, block_q, block_kv)
    if not indices.shape[-1]:
        return BlockMask(full[0][None], full[1][None], *sizes, causal=causal)
    return BlockMask(
        full[0][None],
        full[1][None],
        *sizes,
        partial_counts=counts[None],
        partial_indices=indices[None],
        partial_bits=_bits(rule, cu, indices[0])[None, None],
        causal=causal,
    )


class Rule(NamedTuple):
    length: int
    window: int
    sink: int
    block_q: int
    block_kv: int
    causal: bool


class Seen(NamedTuple):
    """The two runs of keys that a query sees, int64: the sinks, then the window.

    The sinks are not cut by causality, which the mask's flag adds. A run may be empty.
    """

    sink_begin: Tensor
    sink_end: Tensor
    begin: Tensor
    end: Tensor


def _seen(rule: Rule, cu: Tensor, tokens: Tensor) -> Seen:
    """Returns what each token sees; tokens past the last one see nothing."""
    begin, end = starts.document_of(cu, tokens.int())
    end = torch.where(tokens < rule.length, end, begin)
    sink_end = torch.minimum(begin + rule.sink, end)
    near = torch.maximum(tokens - rule.window + 1, begin)
    stop = torch.minimum(tokens + 1 if rule.causal else tokens + rule.window, end)
    return Seen(begin, sink_end, near, torch.maximum(stop, near))


class Runs(NamedTuple):
    """Runs of key blocks `[first, stop)` of each query block; int64 `[nQ]`.

    The first two have the blocks with any visible key, of sinks and window; the others are full.
    """

    sink: tuple[Tensor, Tensor]
    near: tuple[Tensor, Tensor]
    full_sink: tuple[Tensor, Tensor]
    full_near: tuple[Tensor, Tensor]


def _runs(rule: Rule, cu: Tensor, rows: Tensor) -> Runs:
    """Returns the runs of the query blocks `rows`, int64 `[n]`."""
    block = rule.block_kv
    tokens = rows * rule.block_q
    last_token = (tokens + rule.block_q).clamp(max=rule.length) - 1
    first, last = _seen(rule, cu, tokens), _seen(rule, cu, last_token)
    # The sinks of a document that starts in these rows are in the window's run.
    far = torch.maximum(last.end, last.sink_end)
    if rule.causal:
        far = torch.minimum(far, last_token + 1)
    near = first.begin // block, ceil_div(far, block)
    seen_sinks = torch.minimum(first.sink_end, last_token + 1) if rule.causal else first.sink_end
    sink_stop = torch.where(seen_sinks > first.sink_begin, ceil_div(seen_sinks, block), 0)
    sink = first.sink_begin // block, torch.minimum(sink_stop, near[0])
    # Full blocks: seen by all rows, causality apart; the last block ends with the sequence.
    one = first.sink_begin == last.sink_begin
    joined = last.begin <= last.sink_end  # sinks and window meet
    if rule.causal:
        reach = starts.document_of(cu, last_token.int())[1]
    else:
        reach = torch.where(joined, torch.maximum(first.end, last.sink_end), first.end)
    begin = torch.where(joined, last.sink_begin, last.begin)

    def inside(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        whole = torch.where(end == rule.length, ceil_div(end, block), end // block)
        start = ceil_div(begin, block)
        return start, torch.where(one, torch.minimum(whole, near[1]), start)

    full_sink = inside(last.sink_begin, torch.where(joined, last.sink_begin, last.sink_end))
    return Runs(sink, near, full_sink, inside(begin, reach))


def _lists(rule: Rule, cu: Tensor, partial: bool) -> tuple[Tensor, Tensor]:
    """Returns counts `[1, nQ]` and indices `[1, nQ, width]` of full or partial blocks."""
    rows, blocks = ceil_div(rule.length, rule.block_q), ceil_div(rule.length, rule.block_kv)
    sinks = min(ceil_div(rule.sink, rule.block_kv) + 1, blocks) if rule.sink else 0
    span = rule.block_q + (rule.window - 1) * (1 if rule.causal else 2)
    span += 0 if rule.causal else rule.sink
    # Sinks may be in the window's run, so both have the same bound.
    nears = min(ceil_div(min(span, rule.length), rule.block_kv) + 1, blocks)
    sink_slots = torch.arange(sinks, device=cu.device)
    near_slots = torch.arange(nears, device=cu.device)

    def candidates(part: slice) -> tuple[Tensor, Tensor]:
        runs = _runs(rule, cu, torch.arange(part.start, part.stop, device=cu.device))
        sink, near, full_sink, full_near = ((first[:, None], stop[:, None]) for first, stop in runs)
        numbers = torch.cat([sink[0] + sink_slots, near[0] + near_slots], -1)
        listed = torch.cat([sink[0] + sink_slots < sink[1], near[0] + near_slots < near[1]], -1)
        full = (numbers >= full_sink[0]) & (numbers < full_sink[1])
        full |= (numbers >= full_near[0]) & (numbers < full_near[1])
        return numbers, listed & (~full if partial else full)

    width = min(sinks + nears, blocks)
    return block_lists.build_lists(candidates, 1, rows, sinks + nears, width, cu.device)


def _bits(rule: Rule, cu: Tensor, indices: Tensor) -> Tensor:
    """Returns uint8 bitmasks `[nQ, width, block_q, block_kv / 8]` of the blocks `[nQ, width]`."""
    rows, width = indices.shape
    shape = (rows, width, rule.block_q, rule.block_kv // 8)
    bits = torch.empty(shape, dtype=torch.uint8, device=cu.device)
    for part in block_lists.chunks(rows, width * rule.block_q * rule.block_kv // 8, cu.device):
        tokens = torch.arange(part.start * rule.block_q, part.stop * rule.block_q, device=cu.device)
        seen = Seen(*(x.view(-1, 1, rule.block_q) for x in _seen(rule, cu, tokens)))
        first = indices[part, :, None] * rule.block_kv
        sinks, near = (
            block_lists.interval_bits(begin - first, end - first, rule.block_kv)
            for begin, end in ((seen.sink_begin, seen.sink_end), (seen.begin, seen.end))
        )
        bits[part] = sinks | near
    return bits
