"""SnapKV and Ada-SnapKV: the tokens of a prompt that a cache keeps for decoding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from sparse_fmha._checks import (
    check_int,
    check_number,
    check_numbers,
    check_shape,
    plain_ints,
)
from sparse_fmha.patterns.vertical_slash import last_query_sums


@plain_ints
def snapkv(
    q: Tensor,
    k: Tensor,
    *,
    keep: int = 1024,
    last: int = 256,
    pool: int = 21,
    sink: int = 4,
    recent: int = 128,
    floor: float | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Chooses the tokens of a prompt that each KV head keeps; `kept_rows` gathers them.

    The score of a token is the weight that the last queries give it under causal attention,
    averaged over them and over the query heads of the group, and then over `pool` tokens around it
    (0 beyond the ends). The first and the most recent tokens are kept in any case, then those with
    the largest scores. Source: Li et al. 2024, "SnapKV: LLM Knows What You are Looking for Before
    Generation", arXiv:2404.14469; the defaults are those of Nawrot et al. 2025, arXiv:2504.17768.

    With `floor`, heads share `keep * Hkv` tokens: those with the largest scores of all heads give
    head h a number n_h, and it keeps `round((1 - floor) * n_h + floor * keep)`, but never fewer
    than the first and recent tokens. Source: Feng et al. 2024, "Ada-KV: Optimizing KV Cache
    Eviction by Adaptive Budget Allocation", arXiv:2407.11550; their floor is 0.2.

    Args:
        q: `[B, Lq, Hq, D]`, the prompt's queries, or at least the last ones.
        k: `[B, L, Hkv, D]`, the prompt's keys, L >= Lq; the last query is at the last key.
        keep: tokens for each KV head, at least `sink + recent`.
        last: how many of the last queries are asked.
        pool: odd. sink, recent: tokens.
        floor: None, or 0 to 1.
        scale: factor of q.k; default `D**-0.5`.

    Returns:
        indices int32 `[B, Hkv, n]`, ascending, then -1; and counts int32 `[B, Hkv]`. n is
        `min(keep, L)`; with `floor`, which asks for the largest count and so waits for the device,
        that count.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_int("sink", sink)
    check_int("recent", recent)
    check_int("keep", keep, max(1, sink + recent))
    if check_int("pool", pool, 1) % 2 == 0:
        raise ValueError(f"pool must be odd, got {pool}")
    if floor is not None:
        check_number("floor", floor, 0, 1)
    sums, _ = last_query_sums(q, k, last, scale=scale)
    heads, length = k.shape[2], k.shape[1]
    scores = avg_pool1d(sums.unflatten(1, (heads, -1)).mean(2), pool, 1, pool // 2)
    at = torch.arange(length, device=k.device)
    forced = (at < sink) | (at >= length - recent)
    scores = scores.masked_fill(forced, torch.inf)
    width = min(keep, length)
    if floor is None:
        counts = torch.full(scores.shape[:2], width, dtype=torch.int32, device=k.device)
    else:
        best = scores.flatten(1).topk(width * heads, dim=-1).indices // max(1, length)
        shares = torch.zeros(scores.shape[:2], device=k.device, dtype=torch.float64)
        shares.scatter_add_(1, best, torch.ones_like(best, dtype=torch.float64))
        counts = ((1 - floor) * shares + floor * width).round().clamp(max=length)
        counts = counts.clamp(min=min(sink + recent, length)).int()
        width = int(counts.max()) if counts.numel() else 0
    order = scores.topk(width, dim=-1).indices
    listed = torch.arange(width, device=k.device) < counts[..., None]
    indices = torch.where(listed, order, length).sort(-1).values
    return indices.masked_fill(indices == length, -1).int(), counts


@plain_ints
def kept_rows(cache: Tensor, indices: Tensor, room: int = 0) -> Tensor:
    """Gathers the rows that each KV head keeps into a cache of their own.

    With `seq_lens = counts + 1` for the first new token, whose key goes to row `counts[b, h]` of
    KV head h, the result is a cache of `decode_attention`.

    Args:
        cache: `[B, L, Hkv, D]`.
        indices: of `snapkv`.
        room: rows for new tokens after the kept ones.

    Returns:
        `[B, n + room, Hkv, D]`; rows that no token is kept in hold 0.

    Raises:
        ValueError, TypeError: a shape, dtype or device is not allowed, or room is below 0.
    """
    check_int("room", room)
    check_shape("cache", cache, ("batch", "rows", "heads", "head dim"))
    check_numbers("indices", indices, (cache.shape[0], cache.shape[2], "kept"), cache.device)
    rows = indices.long().transpose(1, 2)[..., None]
    kept = cache.gather(1, rows.clamp(min=0).expand(-1, -1, -1, cache.shape[3]))
    kept = kept.masked_fill(rows < 0, 0)
    return torch.nn.functional.pad(kept, (0, 0, 0, 0, 0, room))
