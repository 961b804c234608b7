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
    logs = [math.log(t) if t > 0 else -math.inf for t in thresholds]
    limits = torch.tensor(logs, dtype=torch.float64, device=q.device)
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
                    margins = _margins(scores, tile_k)
                    seen = margins > -torch.inf
                    visited[b, own] += seen.sum((1, 2))
                    under = margins[..., None].double() < limits
                    skipped[b, own] += (under & seen[..., None]).sum((1, 2))
    return skipped, visited


def _margins(scores: Tensor, tile_k: int) -> Tensor:
    """Returns the largest `mt - m` of each group and tile, `[H, groups, tiles]`.

    The scores are `[H, rows, L]`. Tiles go from last to first. The margin is -inf if no row sees a
    key, and inf if m is still -inf.
    """
    _, rows, length = scores.shape
    pad = (0, -length % tile_k, 0, -rows % GROUP)
    scores = torch.nn.functional.pad(scores, pad, value=-torch.inf)
    top = scores.unflatten(2, (-1, tile_k)).amax(-1).flip(-1)  # [H, rows, tiles]
    before = top.cummax(-1).values.roll(1, -1)
    before[..., 0] = -torch.inf
    margin = torch.where(top == -torch.inf, top, top - before)
    groups: Tensor = margin.unflatten(1, (-1, GROUP))
    return groups.amax(2)
