"""Sol-Attn's extra tokens: single keys that a block of queries sees beside its exact blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import SLICE
from sparse_fmha.attention.row_copies import take_rows_by_head
from sparse_fmha.merge import is_plain
from sparse_fmha.selection import pool_blocks, pooled_scores


def top_tokens(q: Tensor, k: Tensor, left: Tensor, n: int, scale: float, block: int) -> Tensor:
    """Returns the keys with the largest products with the mean of a block of queries.

    Args:
        q: `[B, L, Hq, D]`. k: `[B, nK * block, Hkv, D]`.
        left: bool `[B, Hq, nQ, nK]`, the blocks whose keys are asked for.
        n: the most keys for a block of queries.

    Returns:
        int64 `[B, Hq, nQ, n']`, n' the lesser of n and the number of keys, ascending and then -1.
    """
    keys = k.shape[1]
    n = min(n, keys)
    found = []
    with torch.no_grad():
        means = pool_blocks(q, block)
        for part in _parts(left, left.shape[0] * left.shape[1] * keys, is_plain(q, k)):
            open_ = left[:, :, part].repeat_interleave(block, -1)
            scores = pooled_scores(means[:, part], k, scale=scale, allowed=open_)
            values, tokens = scores.topk(n, -1)
            tokens = tokens.masked_fill(values == -torch.inf, keys).sort(-1).values
            found.append(tokens.masked_fill(tokens == keys, -1))
    return torch.cat(found, 2)


def rest_of_blocks(
    q: Tensor, k: Tensor, v: Tensor, left: Tensor, tokens: Tensor, scale: float, block: int
) -> tuple[Tensor, Tensor]:
    """Attention of means of queries over what is left of each block without its single tokens.

    Args:
        q: `[B, L, Hq, D]`. k, v: `[B, nK * block, Hkv, D]`.
        left: as in `top_tokens`. tokens: its result.

    Returns:
        out and lse, `[B, nQ, Hq, D]` and `[B, nQ, Hq]` in fp32, a few rows at a time where no
        derivative is wanted.
    """
    means, keys, values = (pool_blocks(x, block) for x in (q, k, v))
    size = tokens.shape[0] * tokens.shape[1] * tokens.shape[3] * q.shape[3]
    found = []
    with without_autocast(q.device):
        for part in _parts(left, size, is_plain(q, k, v)):
            some = left[:, :, part], tokens[:, :, part]
            found.append(_rest(means[:, part], keys, values, k, v, *some, scale, block))
    outs, lses = zip(*found, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _rest(
    means: Tensor,
    keys: Tensor,
    values: Tensor,
    k: Tensor,
    v: Tensor,
    left: Tensor,
    tokens: Tensor,
    scale: float,
    block: int,
) -> tuple[Tensor, Tensor]:
    scores = pooled_scores(means, keys, scale=scale)
    there = tokens >= 0
    place = tokens.clamp(min=0) // block
    queries = means.transpose(1, 2)[..., None]  # [B, Hq, n, D, 1]
    each = (_rows(k, tokens) @ queries)[..., 0] * scale
    each = each.masked_fill(~there, 0)
    counts = torch.zeros_like(scores).scatter_add(3, place, there.float())
    taken = torch.zeros_like(scores).scatter_add(3, place, each)
    others = (block - counts).clamp(min=1)
    seen = left & (counts < block)
    logits = (block * scores - taken) / others + others.log()  # of the mean of a block's others
    logits = logits.masked_fill(~seen, -torch.inf)
    none = ~seen.any(-1, keepdim=True)  # rows whose softmax, and its derivative, would be NaN
    logits = logits.masked_fill(none, 0)
    weights = (logits.softmax(-1) / others).masked_fill(~seen, 0)  # of each of the others
    group = means.shape[2] // values.shape[2]
    out = weights.unflatten(1, (-1, group)) @ values.transpose(1, 2)[:, :, None] * block
    own = weights.gather(3, place).masked_fill(~there, 0)
    less = (own[..., None, :] @ _rows(v, tokens))[..., 0, :]
    lse = logits.logsumexp(-1).masked_fill(none[..., 0], -torch.inf)
    return (out.flatten(1, 2) - less).transpose(1, 2), lse.transpose(1, 2)


def _rows(x: Tensor, tokens: Tensor) -> Tensor:
    """Tokens of `[B, L, Hkv, D]` for each query head, fp32 `[B, Hq, n, T, D]`."""
    taken = take_rows_by_head(x, tokens.clamp(min=0).flatten(2))
    found: Tensor = taken.unflatten(2, tokens.shape[2:]).float()
    return found


def _parts(left: Tensor, size: int, few: bool) -> list[slice]:
    """Cuts the blocks of queries, for temporaries of `size` elements for each of them."""
    rows = left.shape[2]
    step = max(1, SLICE // max(1, size)) if few else max(1, rows)
    return [slice(first, first + step) for first in range(0, rows, step)]
