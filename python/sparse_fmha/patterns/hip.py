"""HiP attention: keys found by a tree search over chunks, for each group of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_int, check_q_and_k, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.patterns.token_top_k import LocalWindow
from sparse_fmha.selection import top_k_indices


@plain_ints
def hip(
    q: Tensor,
    k: Tensor,
    *,
    keys: int = 512,
    granule: int = 2,
    local: int = 128,
    first: int = 4,
    sample: int = 2,
    block_q: int = 64,
    range_size: int = 64,
) -> StripeMask:
    """Returns the causal mask of HiP, hierarchically pruned attention, for prefill.

    A group of queries sees the first keys, a local window, and what a search finds between:

        divide the keys between into n = keys / granule chunks of equal length;
        until all have at most `granule` keys: halve each chunk with more, and keep the n halves
        with the largest max over sampled queries i of q_i . (key in the middle of the half).

    Source: Lee et al. 2024, "A Training-free Sub-quadratic Cost Transformer Model Serving Framework
    With Hierarchically Pruned Attention", arXiv:2406.09827; 512 keys, chunks of 2 at the end, a
    window of 128 and every second query as published. The paper has groups of 32 queries; lists of
    the kernels serve 64 or more. It leaves open how lengths are rounded: here the first half has
    the odd key, and chunks that are short enough are scored again but not halved. Ties take the
    first chunk. Each group costs `2 n` products for each halving, so the search is linear in the
    number of queries, up to a logarithm.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        keys: keys found by the search, a multiple of `granule`.
        granule: keys of the smallest chunks, at least 1; 2 to 8 as published.
        local: keys before a group's first query that it always sees, rounded up to whole runs.
        first: first keys that every query sees, besides `keys`.
        sample: use every `sample`-th query of a group.
        block_q, range_size: group and run sizes of the mask.

    Returns:
        A mask with lists for each batch entry and query head, built without waiting for the device.
        A group's search takes `8 * keys / granule * D` bytes for each head, a few groups at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    check_int("granule", granule, 1)
    check_int("sample", sample, 1)
    if check_int("keys", keys, 1) % granule:
        raise ValueError(f"keys must be a multiple of granule = {granule}, got {keys}")
    batch, q_len, heads, dim = q.shape
    kv_len, heads_kv = k.shape[1:3]
    window = LocalWindow(q_len, kv_len, local, first, block_q, range_size)
    begin, _ = window.begins(q.device)
    most, n = window.before(window.groups - 1, kv_len), keys // granule
    lists = batch, heads
    if not most or not batch:
        counts = torch.zeros(*lists, window.groups, dtype=torch.int32, device=q.device)
        return window.mask(counts.new_empty(*counts.shape, 0), counts)
    low = torch.clamp(begin, max=first)  # the search is between this key and the window
    halvings, longest = 0, ceil_div(most, n)
    while longest > granule:
        halvings, longest = halvings + 1, ceil_div(longest, 2)

    def found(part: slice) -> tuple[Tensor, Tensor]:
        queries = _sampled(q, part, block_q, sample).unflatten(1, (heads_kv, heads // heads_kv))
        chunk = torch.arange(n + 1, device=q.device)
        edges = low[part, None] + (begin - low)[part, None] * chunk // n
        shape = (batch, heads_kv, heads // heads_kv, len(edges), n)
        starts, ends = (edge.expand(shape) for edge in (edges[:, :-1], edges[:, 1:]))
        for _ in range(halvings):
            starts, ends = _halve(starts, ends, granule)
            scores = _scores(queries, k, starts, ends)
            counts, kept = top_k_indices(scores, n)
            there = torch.arange(n, device=q.device) < counts[..., None]
            kept = kept.clamp(min=0).long()
            starts = starts.gather(-1, kept)
            ends = torch.where(there, ends.gather(-1, kept), starts)
        sinks = torch.arange(first, device=q.device).expand(*shape[:4], -1)
        tokens = starts[..., None] + torch.arange(granule, device=q.device)
        keep = (tokens < ends[..., None]).flatten(-2)
        tokens = torch.cat([sinks, tokens.flatten(-2)], -1).flatten(0, 2)
        keep = torch.cat([sinks < low[part, None], keep], -1).flatten(0, 2)
        width, groups = min(first + keys, kv_len), part.stop - part.start
        counts, columns = block_lists.list_kept(tokens, keep, batch * heads, groups, width)
        return counts.unflatten(0, lists), columns.unflatten(0, lists)

    with torch.no_grad(), without_autocast(q.device):
        row = batch * heads * 2 * n * dim
        parts = block_lists.chunks(window.groups, row, q.device, 1 << 20)
        counts, columns = block_lists.by_chunks(found, parts, window.groups, 2)
    return window.mask(columns, counts)


def _sampled(q: Tensor, part: slice, block_q: int, sample: int) -> Tensor:
    """Returns the sampled queries of some groups, fp32 `[B, Hq, groups, n, D]`.

    The last group may be shorter; its last sampled query takes the place of those that are missing.
    """
    group = torch.arange(part.start, part.stop, device=q.device)[:, None] * block_q
    last = (q.shape[1] - 1 - group) // sample * sample
    step = torch.arange(0, block_q, sample, device=q.device)
    rows = (group + torch.minimum(step, last)).flatten()
    taken = q.index_select(1, rows).float().transpose(1, 2)
    sampled: Tensor = taken.unflatten(2, (len(group), len(step)))
    return sampled


def _halve(starts: Tensor, ends: Tensor, granule: int) -> tuple[Tensor, Tensor]:
    """Divides chunks `[..., n]` with more than `granule` keys; others get an empty second half."""
    length = ends - starts
    middle = torch.where(length > granule, starts + (length + 1) // 2, ends)
    pairs = (starts, middle), (middle, ends)
    first, second = (torch.stack(pair, -1).flatten(-2) for pair in pairs)
    return first, second


def _scores(queries: Tensor, k: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Returns the scores of chunks `[B, Hkv, G, groups, n]`; -inf if empty.

    Args:
        queries: fp32 `[B, Hkv, G, groups, rows, D]`. k: `[B, L, Hkv, D]`.
    """
    middle = (starts + (ends - starts) // 2).clamp(max=k.shape[1] - 1)
    index = middle.flatten(2)[..., None].expand(-1, -1, -1, k.shape[3])
    keys: Tensor = k.transpose(1, 2).gather(2, index).float().unflatten(2, middle.shape[2:])
    scores = (queries @ keys.transpose(-1, -2)).amax(-2)
    return scores.masked_fill_(ends <= starts, -torch.inf)
