"""Counts the tiles that softmax skipping would skip, at many thresholds at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import check_int
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import SLICE
from sparse_fmha.skipping import checks

GROUP = 64  # query rows that skip together
TILE_K = 80  # keys in a tile of the dense kernels
DECODE_TILE_K = 64
# Twenty thresholds, evenly spaced in the logarithm.
THRESHOLDS = tuple(float(t) for t in np.geomspace(1e-7, 0.9, 20))


def tile_sparsity(
    q: Tensor,
    k: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    causal: bool = False,
    scale: float | None = None,
    tile_k: int = TILE_K,
) -> tuple[Tensor, Tensor]:
    """Counts the tiles that `attention` would skip at each threshold, in one pass over scores.

    A skipped tile never raises a row's maximum, so skipping a tile does not depend on which tiles
    were skipped before. For each tile, the largest `mt - m` of a group's rows is compared with
    every ln(lambda). Only slices of the scores are in memory.

    Args:
        q: `[B, Lq, Hq, D]`. k: `[B, Lkv, Hkv, D]`, Hq a multiple of Hkv.
        thresholds: numbers in [0, 1).
        causal, scale: as in `attention`.
        tile_k: keys per tile; the default is that of `attention`'s kernels.

    Returns:
        skipped, int64 `[B, Hq, thresholds]`, and visited, int64 `[B, Hq]`, counted as in
        `SkipStats`.

    Raises:
        ValueError, TypeError: as in `attention`, for q and k; a threshold is out of range, or
            `tile_k` is below 1.
    """
    scale = _checks.check_attention(q, k, k, causal, scale)
    thresholds = checks.check_thresholds(thresholds)
    check_int("tile_k", tile_k, 1)
    (batch, q_len, heads, dim), (kv_len, heads_kv) = q.shape, k.shape[1:3]
    scale = dim**-0.5 if scale is None else scale
    limits = _limits(thresholds, q.device)
    skipped = torch.zeros(batch, heads, len(thresholds), dtype=torch.int64, device=q.device)
    visited = torch.zeros(batch, heads, dtype=torch.int64, device=q.device)
    if not (q.numel() and k.numel()):
        return skipped, visited
    widened = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = torch.arange(kv_len, device=q.device)
    step = max(GROUP, SLICE // max(1, kv_len * heads // heads_kv) // GROUP * GROUP)
    with torch.no_grad(), without_autocast(q.device):
        for b in range(batch):
            for head_kv in range(heads_kv):
                own = slice(head_kv * (heads // heads_kv), (head_kv + 1) * (heads // heads_kv))
                columns = k[b, :, head_kv].to(widened).T
                for first in range(0, q_len, step):
                    rows = q[b, first : first + step, own].transpose(0, 1).to(widened) * scale
                    scores = rows @ columns
                    if causal:
                        at = torch.arange(first, first + rows.shape[1], device=q.device)
                        hidden = keys > at[:, None] + (kv_len - q_len)
                        scores.masked_fill_(hidden, -torch.inf)
                    top = _tops(scores, tile_k).flip(-1)  # from the last tile to the first
                    more_skipped, more_visited = _count(_margins(top), limits)
                    visited[b, own] += more_visited
                    skipped[b, own] += more_skipped
    return skipped, visited


def decode_sparsity(
    q: Tensor,
    k: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Counts the tiles that `decode_attention` would skip if the keys are not cut.

    The query heads of a KV head vote together on tiles of 64 keys, from the first to the last.

    Args:
        q: `[B, 1, Hq, D]`. k: `[B, Lkv, Hkv, D]`, Hq a multiple of Hkv; all keys are seen.
        thresholds: numbers in [0, 1).

    Returns:
        skipped, int64 `[B, Hkv, thresholds]`, and visited, int64 `[B, Hkv]`, counted as in
        `SkipStats`.

    Raises:
        ValueError, TypeError: as in `attention`, for q and k; q has not one token, or a threshold
            is out of range.
    """
    scale = _checks.check_attention(q, k, k, False, scale)
    thresholds = checks.check_thresholds(thresholds)
    if q.shape[1] != 1:
        raise ValueError(f"q must have one token in decoding, got {q.shape[1]}")
    batch, heads_kv = q.shape[0], k.shape[2]
    skipped = torch.zeros(batch, heads_kv, len(thresholds), dtype=torch.int64, device=q.device)
    visited = torch.zeros(batch, heads_kv, dtype=torch.int64, device=q.device)
    if not (q.numel() and k.numel()):
        return skipped, visited
    limits = _limits(thresholds, q.device)
    widened = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q[:, 0].unflatten(1, (heads_kv, -1)).to(widened)
    rows = rows * (q.shape[3] ** -0.5 if scale is None else scale)
    with torch.no_grad(), without_autocast(q.device):
        for b in range(batch):
            scores = rows[b] @ k[b].transpose(0, 1).to(widened).mT  # [Hkv, group, Lkv]
            skipped[b], visited[b] = _count(_margins(_tops(scores, DECODE_TILE_K)), limits)
    return skipped, visited


def _limits(thresholds: Sequence[float], device: torch.device) -> Tensor:
    logs = [math.log(t) if t > 0 else -math.inf for t in thresholds]
    return torch.tensor(logs, dtype=torch.float64, device=device)


def _count(margins: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Skipped `[H, thresholds]` and visited tiles `[H]`."""
    seen = margins > -torch.inf
    under = margins[..., None].double() < limits
    return (under & seen[..., None]).sum((1, 2)), seen.sum((1, 2))


def _tops(scores: Tensor, tile_k: int) -> Tensor:
    """The largest score of each row and tile, `[H, rows in whole groups, tiles]`."""
    _, rows, length = scores.shape
    pad = (0, -length % tile_k, 0, -rows % GROUP)
    scores = torch.nn.functional.pad(scores, pad, value=-torch.inf)
    tiles: Tensor = scores.unflatten(2, (-1, tile_k))
    return tiles.amax(-1)


def _margins(top: Tensor) -> Tensor:
    """Returns the largest `mt - m` of each group and tile, `[H, groups, tiles]`, from the largest
    scores in the order of visits.

    The margin is -inf if no row sees a key, and inf if m is still -inf.
    """
    before = top.cummax(-1).values.roll(1, -1)
    before[..., 0] = -torch.inf
    margin = torch.where(top == -torch.inf, top, top - before)
    groups: Tensor = margin.unflatten(1, (-1, GROUP))
    return groups.amax(2)
