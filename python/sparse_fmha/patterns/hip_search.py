"""HiP's tree search over chunks of keys, for prefill and for decoding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div

Score = Callable[[Tensor], Tensor]  # the scores of keys at positions `[..., n]`; NaN counts as -inf


def halvings(longest: int, granule: int) -> int:
    """Returns how often chunks of at most `longest` keys are halved."""
    times = 0
    while longest > granule:
        times, longest = times + 1, ceil_div(longest, 2)
    return times


def search(
    low: Tensor, high: Tensor, n: int, times: int, granule: int, score: Score
) -> tuple[Tensor, Tensor]:
    """Divides keys into chunks, and halves and keeps the best ones some times.

    Args:
        low, high: integers `[..., 1]`, between which keys to search.
        n: how many chunks to keep. times: from `halvings`.
        granule: chunks with no more keys are not halved.
        score: the score of a chunk is that of the key in its middle.

    Returns:
        Where chunks start and end, `[..., n]` each, ascending; empty ones at the end. Of chunks
        with the same score the first is kept, those of -inf and NaN never.
    """
    edges = low + (high - low) * torch.arange(n + 1, device=low.device) // n
    starts, ends = edges[..., :-1], edges[..., 1:]
    for _ in range(times):
        starts, ends = _halve(starts, ends, granule)
        scores = score(starts + (ends - starts) // 2).masked_fill(ends <= starts, -torch.inf)
        scores = scores.nan_to_num_(-torch.inf, torch.inf, -torch.inf)
        best, order = (x[..., :n] for x in scores.sort(dim=-1, descending=True, stable=True))
        order = order.int().masked_fill(best == -torch.inf, 2 * n).sort(-1).values
        kept = order.clamp(max=2 * n - 1).long()
        starts = starts.expand(scores.shape).gather(-1, kept)
        ends = ends.expand(scores.shape).gather(-1, kept)
        ends = torch.where(order < 2 * n, ends, starts)
    return starts, ends


def keys_of(starts: Tensor, ends: Tensor, granule: int) -> tuple[Tensor, Tensor]:
    """Returns the keys of chunks `[..., n]` and which of them exist: `[..., n * granule]`."""
    keys = starts[..., None] + torch.arange(granule, device=starts.device)
    return keys.flatten(-2), (keys < ends[..., None]).flatten(-2)


def _halve(starts: Tensor, ends: Tensor, granule: int) -> tuple[Tensor, Tensor]:
    """Divides chunks `[..., n]` with more than `granule` keys; others get an empty second half."""
    length = ends - starts
    middle = torch.where(length > granule, starts + (length + 1) // 2, ends)
    pairs = (starts, middle), (middle, ends)
    first, second = (torch.stack(pair, -1).flatten(-2) for pair in pairs)
    return first, second
