"""Choosing blocks by their scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_fmha._checks import check_floats, check_int, check_number
from sparse_fmha._sizes import CACHED, SLICE
from sparse_fmha.masks import block_lists
from sparse_fmha.selection import largest, shares

LONG = 1 << 18  # a row from which on the CPU finds a share by bits faster than by a sort
FIXED = 40  # bits behind the point where probabilities are added


def top_k_blocks(scores: Tensor, k: int) -> Tensor:
    """The k largest scores of each row.

    -inf and NaN are never taken, so a row may have fewer than k. Of equal scores the ones with the
    lowest index are taken: the k-th largest value is found, larger ones are taken, and of those
    equal to it the first that fit.

    Args:
        scores: `[..., n]` of a floating point dtype.
        k: at least 0; more than n are n.

    Returns:
        Bool `[..., n]`.

    Raises:
        ValueError: k below 0. TypeError: no floating point tensor, or k no int.
    """
    check_floats("scores", scores)
    k = min(check_int("k", k), scores.shape[-1])
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)

    def choose(rows: Tensor) -> Tensor:
        rows = torch.where(rows > -torch.inf, rows, -torch.inf)
        last = rows.topk(k, -1, sorted=False).values.amin(-1, keepdim=True)
        larger, equal = rows > last, (rows == last) & (rows > -torch.inf)
        room = k - larger.sum(-1, keepdim=True, dtype=torch.int32)
        return larger | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))

    return _by_rows(choose, scores)


def top_k_indices(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`top_k_blocks` as lists: counts int32 `[...]` and indices int32 `[..., min(k, n)]`.

    Indices ascend, with -1 behind the count. `BlockMask` takes both of scores `[B, H, nQ, nK]`.
    """
    check_floats("scores", scores)
    *lead, n = scores.shape
    k = min(check_int("k", k), n)
    if not largest.applies(scores, k):
        return block_lists.list_blocks(top_k_blocks(scores, k), k)
    rows = scores.detach().reshape(-1, n)
    parts = block_lists.chunks(rows.shape[0], n, rows.device, CACHED)
    counts, indices = block_lists.by_chunks(
        lambda part: largest.largest(rows[part], k), parts, rows.shape[0], 0
    )
    return counts.view(lead), indices.view(*lead, k)


def top_p_blocks(
    probabilities: Tensor,
    p: float | Tensor,
    *,
    min_blocks: int = 1,
    max_blocks: int | None = None,
) -> Tensor:
    """The fewest blocks of each row whose probabilities add up to p or more.

    They are taken from the largest down, of equal ones the lowest index first (a stable sort), and
    added as integers of 2^-40, so that the order of adding does not matter and CPU and CUDA choose
    alike. What is not above 0 (also NaN) is never taken. A row that adds up to less than p is taken
    whole.

    Args:
        probabilities: `[..., n]` of a floating point dtype; more than 1 counts as 1.
        p: at least 0, or a tensor that broadcasts to `[..., 1]`, one p for each row.
        min_blocks, max_blocks: of a row, as far as it has that many above 0.

    Returns:
        Bool `[..., n]`.

    Raises:
        ValueError: p below 0, `min_blocks` below 1 or over `max_blocks`.
        TypeError: arguments of other types.
    """
    check_floats("probabilities", probabilities)
    n = probabilities.shape[-1]
    check_int("min_blocks", min_blocks, 1)
    if max_blocks is not None:
        check_int("max_blocks", max_blocks, min_blocks)
    most = n if max_blocks is None else min(n, max_blocks)
    one = 1 << FIXED
    if isinstance(p, Tensor):
        check_floats("p", p)
        limit = (p.double() * one).long()
    else:
        fixed = int(check_number("p", p, 0, 1 << 20) * one)
        limit = torch.full((), fixed, dtype=torch.int64, device=probabilities.device)
    limit = limit.expand(*probabilities.shape[:-1], 1)
    if n >= LONG and (min_blocks, most) == (1, n) and largest.looks(probabilities):
        rows = probabilities.detach().reshape(-1, n)
        limits = limit.reshape(-1).tolist()
        if all(each > 0 for each in limits):
            pairs = zip(rows, limits, strict=True)
            taken = [shares.smallest_share(row, each, one) for row, each in pairs]
            return (torch.stack(taken) if len(taken) > 1 else taken[0]).view(probabilities.shape)
    slots = torch.arange(n, device=probabilities.device)

    def choose(rows: Tensor, limit: Tensor) -> Tensor:
        rows = torch.where(rows > 0, rows, 0).float()
        values, order = rows.sort(dim=-1, descending=True, stable=True)
        mass = (values.clamp(max=1).double() * one).long()
        before = mass.cumsum(-1) - mass
        taken = ((before < limit) | (slots < min_blocks)) & (slots < most) & (values > 0)
        return torch.zeros_like(taken).scatter_(-1, order, taken)

    return _by_rows(choose, probabilities, limit)


def _by_rows(choose: Callable[..., Tensor], scores: Tensor, *more: Tensor) -> Tensor:
    """`choose` of the rows, some at a time, as its temporaries are larger than the scores."""
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (scores.detach(), *more)]
    step = max(1, SLICE // scores.shape[-1])
    parts = [choose(*rows) for rows in zip(*(f.split(step) for f in flat), strict=True)]
    return torch.cat(parts).view(scores.shape)
