"""HiP attention: keys found by a tree search over chunks, for each group of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_int, check_q_and_k, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention.row_copies import take_rows_by_head
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.patterns.hip_search import halvings, keys_of, search
from sparse_fmha.patterns.token_top_k import LocalWindow
from sparse_fmha.selection.products import fp32_product


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
    k = k.contiguous()
    times = halvings(ceil_div(most, n), granule)
    shape = batch, heads_kv, heads // heads_kv

    def found(part: slice) -> tuple[Tensor, Tensor]:
        queries = _sampled(q, part, block_q, sample).unflatten(1, shape[1:])

        def score(positions: Tensor) -> Tensor:
            return _scores(queries, k, positions.expand(*shape, *positions.shape[-2:]))

        starts, ends = search(low[part, None], begin[part, None], n, times, granule, score)
        tokens, keep = keys_of(starts, ends, granule)
        sinks = torch.arange(first, device=q.device).expand(*shape, tokens.shape[-2], -1)
        tokens = torch.cat([sinks, tokens.expand(*shape, -1, -1)], -1).flatten(0, 2)
        keep = torch.cat([sinks < low[part, None], keep.expand(*shape, -1, -1)], -1).flatten(0, 2)
        width, groups = min(first + keys, kv_len), part.stop - part.start
        counts, columns = block_lists.list_kept(tokens, keep, batch * heads, groups, width)
        return counts.unflatten(0, lists), columns.unflatten(0, lists)

    with torch.no_grad(), without_autocast(q.device):
        row = batch * heads * 2 * n * dim
        parts = block_lists.chunks(window.groups, row, q.device, 1 << 20, on_gpu=1 << 27)
        counts, columns = block_lists.by_chunks(found, parts, window.groups, 2)
    return window.mask(columns, counts)


def _sampled(q: Tensor, part: slice, block_q: int, sample: int) -> Tensor:
    """Returns the sampled queries of some groups, `[B, Hq, groups, n, D]`.

    The last group may be shorter; its last sampled query takes the place of those that are missing.
    """
    group = torch.arange(part.start, part.stop, device=q.device)[:, None] * block_q
    last = (q.shape[1] - 1 - group) // sample * sample
    step = torch.arange(0, block_q, sample, device=q.device)
    rows = (group + torch.minimum(step, last)).flatten()
    taken = q.index_select(1, rows).transpose(1, 2)
    sampled: Tensor = taken.unflatten(2, (len(group), len(step)))
    return sampled


def _scores(queries: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Returns the largest product of keys with a group's queries, `[B, Hkv, G, groups, n]`.

    Args:
        queries: `[B, Hkv, G, groups, rows, D]`. k: `[B, L, Hkv, D]`.
        positions: int64 `[B, Hkv, G, groups, n]`; L may be the position of a chunk without keys.
    """
    keys = take_rows_by_head(k, positions.flatten(2).clamp(max=k.shape[1] - 1))
    return fp32_product(queries, keys.unflatten(2, positions.shape[2:]).mT).amax(-2)
