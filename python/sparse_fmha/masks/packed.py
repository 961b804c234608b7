"""Block masks of packed sequences: each query sees keys of its own sequence.

Unlike in `documents`, queries and keys have their own cumulative lengths, and causality is aligned
to the end of each sequence. Nothing waits for the device, and shapes do not depend on data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.documents import Spans, parts_of
from sparse_fmha.masks.parts import BlockParts


class Window(NamedTuple):
    """The keys that a query sees, around the key at its own distance from its sequence's end.

    Query i of Lq sees key j of Lk only if `-left <= j - i - (Lk - Lq) <= right`; negative: no
    bound. Windows shrink where a sequence begins or ends.
    """

    left: int
    right: int


EVERYTHING = Window(-1, -1)


class Sequences(NamedTuple):
    """Where sequences lie: int64, within the tokens that exist, and without overlaps."""

    q_starts: Tensor  # [B + 1]
    k_starts: Tensor  # [B + 1]
    k_lengths: Tensor  # [B]; keys in use, from each start
    q_len: int  # tokens of q and k
    kv_len: int
    aligned: bool  # q_starts is k_starts, and all keys are in use

    @property
    def batch(self) -> int:
        return self.k_lengths.shape[0]


def sequences_of(
    cu_q: Tensor, cu_k: Tensor, seqused_k: Tensor | None, q_len: int, kv_len: int
) -> Sequences:
    """Reads cumulative lengths as the op does: a start below an earlier one counts as that one."""
    aligned = cu_k is cu_q and seqused_k is None and q_len == kv_len
    q_starts = starts_of(cu_q, q_len)
    k_starts = q_starts if aligned else starts_of(cu_k, kv_len)
    lengths = k_starts.diff()
    if seqused_k is not None:
        lengths = torch.minimum(lengths, seqused_k.long()).clamp(min=0)
    return Sequences(q_starts, k_starts, lengths, q_len, kv_len, aligned)


def starts_of(cu: Tensor, tokens: int) -> Tensor:
    """Returns starts within the tokens, in ascending order."""
    return cu.long().clamp(0, tokens).cummax(0).values


def held_queries(sequences: Sequences) -> Tensor:
    """Returns which tokens of q are in a sequence, bool `[Tq]`."""
    tokens = torch.arange(sequences.q_len, device=sequences.q_starts.device)
    return (tokens >= sequences.q_starts[0]) & (tokens < sequences.q_starts[-1])


def held_keys(sequences: Sequences) -> Tensor:
    """Returns which tokens of k are in use by a sequence, bool `[Tk]`."""
    tokens = torch.arange(sequences.kv_len, device=sequences.k_starts.device)
    if not sequences.batch:
        return tokens < 0
    number = _number_of(sequences.k_starts, tokens, sequences.batch)
    begin = sequences.k_starts[number]
    return (tokens >= begin) & (tokens < begin + sequences.k_lengths[number])


def only(held: Tensor, x: Tensor) -> Tensor:
    """Returns x `[T, heads, D]` with zeros where a token is not held."""
    return torch.where(held[:, None, None], x, 0)


def _number_of(starts: Tensor, tokens: Tensor, batch: int) -> Tensor:
    """Returns the sequence of each token; an arbitrary one for a token without a sequence."""
    return (torch.searchsorted(starts, tokens, right=True) - 1).clamp(0, batch - 1)


class Seen(NamedTuple):
    """The keys `[begin, end)` that each query sees, and which queries count; `[nQ * block_q]`."""

    begin: Tensor
    end: Tensor
    held: Tensor


def _seen(sequences: Sequences, window: Window, rows: int) -> Seen:
    q_starts, k_starts, lengths, *_ = sequences
    tokens = torch.arange(rows, device=q_starts.device)
    if not sequences.batch:
        return Seen(torch.zeros_like(tokens), torch.zeros_like(tokens), tokens < 0)
    number = _number_of(q_starts, tokens, sequences.batch)
    begin = k_starts[number]
    end = begin + lengths[number]
    own = end + tokens - q_starts[number + 1]  # the key at the same distance from the end
    if window.left >= 0:
        begin = torch.minimum(torch.maximum(begin, own - window.left), end)
    if window.right >= 0:
        end = torch.maximum(torch.minimum(end, own + window.right + 1), begin)
    held = (tokens >= q_starts[0]) & (tokens < q_starts[-1])
    return Seen(begin, torch.where(held, end, begin), held)


def block_mask(
    sequences: Sequences,
    max_q: int,
    max_k: int,
    causal: bool,
    window: Window = EVERYTHING,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockParts:
    """Returns the mask of packed sequences, one for all batch entries and heads.

    The lists of a query block have the run of key blocks from the first key of its first sequence
    to the last one of its last. They are as wide as any cumulative lengths within the bounds may
    need, and bitmasks take `block_q * block_kv / 8` bytes for each entry of the lists of partial
    blocks:

    - of one sequence: a few blocks at the ends of the keys that its queries see;
    - if keys and queries share their cumulative lengths: the blocks of two neighboring sequences of
      max_k tokens, or as many as the window reaches, and of the queries between them;
    - else all blocks of all sequences, as any number of sequences may have few queries or none.

    Queries that are in no sequence see either no key or, in blocks with other queries, any keys:
    the caller has to drop their results.
    """
    if causal:
        window = Window(window.left, 0)
    rows = ceil_div(sequences.q_len, block_q)
    seen = _seen(sequences, window, rows * block_q)
    sizes = (sequences.q_len, sequences.kv_len, block_q, block_kv)
    return _parts(seen, _widths(sequences, max_q, max_k, window, block_q, block_kv), sizes)


def padded_mask(
    seen: Seen, q_len: int, kv_len: int, window: Window, block_q: int = 128, block_kv: int = 128
) -> BlockParts:
    """Returns the mask of a batch whose entries have q_len queries each, a multiple of block_q.

    Args:
        seen: of the queries of all entries, in order; keys are numbered in their own entry. From
            one query to the next, begin and end move by at most one key.
    """
    sizes = (q_len, kv_len, block_q, block_kv)
    parts = _parts(seen, _widths_of_one(kv_len, window, block_q, block_kv), sizes)
    of_entries = (-1, 1, q_len // block_q)
    lists = ("counts", "indices", "partial_counts", "partial_indices", "partial_bits")
    for name in lists:
        all_rows = getattr(parts, name)
        if all_rows is not None:
            setattr(parts, name, all_rows[0, 0].unflatten(0, of_entries))
    return parts


def _parts(seen: Seen, widths: list[int], sizes: tuple[int, int, int, int]) -> BlockParts:
    _, kv_len, block_q, block_kv = sizes
    return parts_of(
        _spans(seen, kv_len, block_q, block_kv),
        widths,
        sizes,
        False,  # the bitmasks hide what is after a query
        lambda indices: _bits(seen, indices, block_q, block_kv),
    )


def _spans(seen: Seen, kv_len: int, block_q: int, block_kv: int) -> Spans:
    begin, end, held = (x.view(-1, block_q) for x in seen)
    sees = end > begin
    last = torch.where(sees, end, 0).amax(-1)
    first = torch.minimum(torch.where(sees, begin, kv_len).amin(-1), last)
    # Queries without a sequence do not keep a block from being full.
    latest = torch.where(held, begin, 0).amax(-1)
    earliest = torch.where(held, end, kv_len).amin(-1)
    first, stop = first // block_kv, ceil_div(last, block_kv)
    # The last key block ends with the keys.
    inside = torch.where(earliest == kv_len, stop, earliest // block_kv)
    full_first = torch.minimum(torch.maximum(ceil_div(latest, block_kv), first), stop)
    full_stop = torch.maximum(torch.minimum(inside, stop), full_first)
    return Spans(first, stop, full_first, full_stop)


def _widths(
    sequences: Sequences, max_q: int, max_k: int, window: Window, block_q: int, block_kv: int
) -> list[int]:
    """Returns the most full and partial blocks of a query block."""
    blocks = ceil_div(sequences.kv_len, block_kv)
    if not sequences.batch:
        return [0, 0]
    if sequences.batch == 1:
        partial = _widths_of_one(sequences.kv_len, window, block_q, block_kv)[1]
    elif sequences.aligned:
        longest = min(max_q, max_k)
        reach = sum(longest - 1 if bound < 0 else min(bound, longest - 1) for bound in window)
        span = block_q + reach if longest else 0
        partial = ceil_div(max(span - 1, 0), block_kv) + 1
    else:
        partial = blocks
    return [min(ceil_div(max_k, block_kv), blocks), min(partial, blocks)]


def _widths_of_one(kv_len: int, window: Window, block_q: int, block_kv: int) -> list[int]:
    """The same where the queries of a block have the same keys but for their window."""
    blocks = ceil_div(kv_len, block_kv)
    # Where the keys begin and end: for all queries alike, or within as many keys as queries.
    moving = sum(bound >= 0 for bound in window)
    return [blocks, min(2 + moving * ceil_div(block_q - 1, block_kv), blocks)]


def _bits(seen: Seen, indices: Tensor, block_q: int, block_kv: int) -> Tensor:
    """Returns uint8 bitmasks `[nQ, width, block_q, block_kv / 8]` of the blocks `[nQ, width]`."""
    rows, width = indices.shape
    shape = (rows, width, block_q, block_kv // 8)
    bits = torch.empty(shape, dtype=torch.uint8, device=indices.device)
    begin, end, _ = (x.view(-1, 1, block_q) for x in seen)
    for part in block_lists.chunks(rows, width * block_q * block_kv // 8, indices.device):
        block = indices[part, :, None]
        first = block * block_kv
        stop = torch.where(block == block_lists.ABSENT, begin[part], end[part])
        bits[part] = block_lists.interval_bits(begin[part] - first, stop - first, block_kv)
    return bits
