"""DHSA: keys chosen through chunks of variable length, or through short blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_flag, check_int, check_number, check_q_and_k, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists, stripe_checks
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.patterns.minference import blocks_of_means
from sparse_fmha.selection import pool_blocks, pooled_scores


@plain_ints
def dhsa(
    q: Tensor,
    k: Tensor,
    boundaries: Tensor,
    keys: int,
    *,
    local: int = 128,
    first: int = 128,
    window: int | None = None,
    dense_rows: int = 64,
    normalize: bool = True,
    shared: bool = True,
    block_q: int = 64,
    range_size: int = 64,
) -> StripeMask:
    """Returns the causal mask of DHSA, dynamic hierarchical sparse attention.

        chunk c has the keys [b_c, b_{c+1}),
        s[I, c] = mean of q over block I . (mean of k over chunk c * sqrt(length of c)),
        s[I, j] = s[I, the chunk of key j];
        block I sees its `local` most recent keys, the `first` keys, and the keys before the local
        ones with the largest s[I, j], `keys` in all.

    Source: Xiong et al. 2025, "Long-Context Modeling with Dynamic Hierarchical Sparse Attention",
    arXiv:2510.24606, and its first released code: blocks of 64, 128 local and 128 first keys, means
    over heads, length-normalized, and 64 last queries dense. Keys of a chunk have one score; of a
    chunk that the budget cuts, the first ones are taken, which the paper leaves open. The code
    multiplies means of q by the root of their length, too, which changes no choice. It writes the
    first keys over the lowest entries of a list, which may list a key twice; here each counts once.
    `dhsa_boundaries` finds chunks; `token_top_k` is the same choice with chunks of one key.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`, Lkv >= Lq.
        boundaries: int32 or int64 `[B|1, chunks + 1]`, ascending from 0 to Lkv; equal entries are
            empty chunks. Its values are not checked.
        keys: keys of each block, at least `local + first`; fewer if fewer are before it.
        local: the most recent keys, up to the block's last query; a multiple of `range_size`.
        first: how many first keys each block sees.
        window: for layers with a sliding window: a block sees only the last `window` keys up to its
            last query, and `first` counts from there, as in the code. Default: all keys.
        dense_rows: blocks with one of the last `dense_rows` queries see all keys before them. The
            code cuts blocks there; here they are rounded to whole blocks.
        normalize: False leaves out the factor sqrt(length).
        shared: one list for all heads, from the means of q and of k over heads. False: a list for
            each query head.
        block_q, range_size: group and run sizes of the mask.

    Returns:
        A mask with lists for each batch entry, and 1 or Hq heads, built without waiting for the
        device. All `Lq / block_q * chunks` scores of a list are computed, a few blocks at a time;
        sums of k take 16 bytes for each token and channel of a head at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    check_flag("normalize", normalize)
    check_flag("shared", shared)
    sizes = _Sizes(q.shape[1], k.shape[1], keys, local, first, window, dense_rows, block_q)
    stripe_checks.check_sizes(sizes.q_len, sizes.kv_len, block_q, range_size, True)
    if local % range_size:
        raise ValueError(f"local must be a multiple of range_size = {range_size}, got {local}")
    _check_boundaries(boundaries, q)
    groups, kv_len = ceil_div(sizes.q_len, block_q), sizes.kv_len
    end, low, begin, dense = sizes.of_groups(groups, q.device)
    with torch.no_grad(), without_autocast(q.device):
        edges = boundaries.long().clamp(0, kv_len).expand(q.shape[0], -1)
        pooled = k.mean(2, keepdim=True, dtype=torch.float32) if shared else k
        chunk_keys = _chunk_means(pooled, edges, normalize)
        spans = edges[:, None, :-1].int(), edges[:, None, 1:].int()
        forced = (begin - low).clamp(max=first).masked_fill_(dense, 0)
        room = (keys - local - forced).masked_fill_(dense, 0)

        def chosen(part: slice) -> tuple[Tensor, Tensor]:
            queries = pool_blocks(q[:, part.start * block_q : part.stop * block_q], block_q)
            if shared:
                queries = queries.mean(2, keepdim=True)
            scores = pooled_scores(queries, chunk_keys, scale=1.0)
            of_part = (low[part], forced[part], begin[part], room[part])
            return _best_chunks(scores, spans, of_part, min(keys - local, kv_len))

        lists = q.shape[0], 1 if shared else q.shape[2]
        row = lists[0] * lists[1] * max(chunk_keys.shape[1], keys - local)
        parts = block_lists.chunks(groups, row, q.device, 1 << 18)
        counts, columns = block_lists.by_chunks(chosen, parts, groups, 2)
    runs = max(local, kv_len if dense_rows else 0)
    slot = torch.arange(ceil_div(runs, range_size), dtype=torch.int32, device=q.device)
    starts = torch.where(dense, low, begin).int()[:, None] + range_size * slot
    listed = (starts < end[:, None]) & (dense[:, None] | (slot < local // range_size))
    starts = starts.masked_fill_(~listed, block_lists.ABSENT).expand(*lists, -1, -1)
    number = listed.sum(-1, dtype=torch.int32).expand(*lists, -1)
    of_runs = (starts, number, range_size)
    return StripeMask(columns, counts, sizes.q_len, kv_len, block_q, *of_runs, causal=True)


@plain_ints
def dhsa_blocks(
    q: Tensor,
    k: Tensor,
    *,
    density: float = 0.125,
    forced: bool = True,
    shared: bool = False,
    block_q: int = 128,
    block_kv: int = 32,
) -> BlockMask:
    """Returns the causal mask of DHSA's second version, on blocks of 128 queries and 32 keys.

        S[I, J] = mean of q over block I . mean of k over block J, J not above the diagonal;
        query block I sees the `density * nK` key blocks with the largest S[I, J].

    Source: the second released code of DHSA (Xiong et al., arXiv:2510.24606), whose defaults these
    are. With `forced`, its A-shaped mode: the first block and the last one that a row may see come
    first, even beyond the budget; rows with no more blocks than the budget see all of them.
    Without, its plain mode, which there also spends a row's budget on blocks above the diagonal;
    here it does not. Its vertical-slash modes are `vertical_slash` with other sizes.

    Args:
        q: `[B, Lq, Hq, D]`, as passed to attention. k: `[B, Lkv, Hkv, D]`.
        density: key blocks of each row over all key blocks, 0 to 1; at least one block.
        forced: see above. Otherwise a query may see nothing.
        shared: one list for all heads, from the means of q and of k over heads. False: a list for
            each query head.
        block_q, block_kv: block sizes of the mask.

    Returns:
        A mask with lists for each batch entry, and 1 or Hq heads, built without waiting for the
        device. All `nQ * nK` scores of a list are computed, a few rows at a time.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    density = check_number("density", density, 0, 1)
    check_flag("forced", forced)
    check_flag("shared", shared)
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=True)
    top_k = max(int(density * grid.shape[1]), 2 if forced else 1)
    return blocks_of_means(q, k, grid, top_k, forced=forced, shared=shared)


class _Sizes:
    """Checked sizes of `dhsa`, and where each group's keys begin and end."""

    def __init__(
        self,
        q_len: int,
        kv_len: int,
        keys: int,
        local: int,
        first: int,
        window: int | None,
        dense_rows: int,
        block_q: int,
    ) -> None:
        for name, value in (("local", local), ("first", first), ("dense_rows", dense_rows)):
            check_int(name, value)
        if kv_len < q_len:
            raise ValueError(f"k must have at least the {q_len} tokens of q, got {kv_len}")
        if check_int("keys", keys) < local + first:
            raise ValueError(f"keys must be at least local + first = {local} + {first}, got {keys}")
        if window is not None:
            check_int("window", window, 1)
        self.q_len, self.kv_len, self.block_q = q_len, kv_len, block_q
        self.local, self.window, self.dense_rows = local, window, dense_rows

    def of_groups(self, groups: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns, for each group, int64 or bool `[groups]`.

        One past its last query's key, the first key it may see, its first local key, and whether
        it is dense.
        """
        last = (torch.arange(1, groups + 1, device=device) * self.block_q).clamp(max=self.q_len)
        end = last + (self.kv_len - self.q_len)
        low = torch.zeros_like(end) if self.window is None else (end - self.window).clamp(min=0)
        begin = torch.maximum(end - self.local, low)
        return end, low, begin, last > self.q_len - self.dense_rows


def _chunk_means(k: Tensor, edges: Tensor, normalize: bool) -> Tensor:
    """Returns fp32 `[B, chunks, H, D]`: means of k `[B, L, H, D]`, 0 for empty chunks.

    Sums are differences of prefix sums in fp64, which lose nothing that fp32 would keep. They run
    along the last dimension: along another one, a GPU's thread would add all tokens of a channel.
    """
    batch, _, heads, dim = k.shape
    length = (edges[:, 1:] - edges[:, :-1]).clamp(min=1).double()
    length = length.sqrt() if normalize else length
    shape = (batch, edges.shape[1] - 1, heads, dim)
    means = torch.empty(shape, dtype=torch.float32, device=k.device)
    if not k.shape[1]:
        return means.zero_()
    for b in range(batch):
        ends = (edges[b] - 1).clamp(min=0)
        for h in range(heads):
            rows = k[b, :, h].T.to(torch.float64, memory_format=torch.contiguous_format)
            before = rows.cumsum(1).index_select(1, ends).masked_fill_(edges[b] == 0, 0)
            means[b, :, h] = (before.diff(dim=1) / length[b]).T
    return means


def _best_chunks(
    scores: Tensor, spans: tuple[Tensor, Tensor], rows: tuple[Tensor, ...], width: int
) -> tuple[Tensor, Tensor]:
    """Lists the keys of the chunks with the largest scores, all keys of a chunk having its score.

    Chunks are ordered, not keys, so nothing here has an entry for each key.

    Args:
        scores: fp32 `[B, H, n, chunks]`; -inf and NaN are never taken, ties take the first.
        spans: int32 `[B, 1, chunks]` each, where chunks begin and end.
        rows: int64 `[n]` each: the first key, how many from there on are always listed, where the
            keys end that may be taken, and how many of these are taken besides those always listed.
        width: capacity of the lists.

    Returns:
        counts int32 `[B, H, n]` and ascending keys int32 `[B, H, n, width]`.
    """
    low, forced, end, room = (row.int() for row in rows)
    begins = torch.maximum(spans[0], (low + forced)[:, None])[:, None]  # [B, 1, n, chunks]
    lengths = torch.minimum(spans[1], end[:, None])[:, None] - begins
    lengths = lengths.clamp_(min=0).expand(scores.shape).masked_fill(~(scores > -torch.inf), 0)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    best = lengths.gather(-1, order)
    before = best.cumsum(-1, dtype=torch.int32).sub_(best)
    best = torch.minimum((room[:, None] - before).clamp_(min=0), best)
    taken = torch.empty_like(best).scatter_(-1, order, best)
    ends = taken.cumsum(-1, dtype=torch.int32).add_(forced[:, None])
    slot = torch.arange(width, dtype=torch.int32, device=scores.device)
    slots = slot.expand(*scores.shape[:3], -1).contiguous()
    chunk = torch.searchsorted(ends, slots, right=True).clamp_(max=scores.shape[-1] - 1)
    shift = begins - (ends - taken)
    columns = torch.where(
        slot < forced[:, None], low[:, None] + slot, slot + shift.gather(-1, chunk)
    )
    counts = ends[..., -1]
    return counts, columns.masked_fill_(slot >= counts[..., None], block_lists.ABSENT)


def _check_boundaries(boundaries: Tensor, q: Tensor) -> None:
    if not isinstance(boundaries, Tensor) or boundaries.dtype not in (torch.int32, torch.int64):
        kind = getattr(boundaries, "dtype", type(boundaries))
        raise TypeError(f"boundaries must be an int32 or int64 tensor, got {kind}")
    batch = q.shape[0]
    shape = boundaries.shape
    if len(shape) != 2 or shape[0] not in (1, batch) or shape[1] < 2:
        raise ValueError(
            f"boundaries must have shape [{batch} or 1, chunks + 1], with at least one chunk, got "
            f"{list(shape)}"
        )
    if boundaries.device != q.device:
        raise ValueError(f"boundaries must be on q's device, {q.device}, got {boundaries.device}")
