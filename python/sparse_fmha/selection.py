"""Choosing key blocks by scores of pooled queries and keys.

    scores = pooled_scores(pool_blocks(q, 128), pool_blocks(k, 128), allowed=grid.reachable())
    mask = grid.mask(top_k_blocks(scores, 16) | grid.sink(64) | grid.diagonal())

Pooling a block to its mean and taking the products of the means for the scores of blocks is from
MInference (Jiang et al. 2024, arXiv:2407.02490, algorithm 3); taking blocks until a share of the
probability is covered from FlexPrefill (Lai et al. 2025, arXiv:2502.20766, section 3).

Nothing here waits for the device or makes a shape that depends on data, so that the way from q and
k to a mask fits in a CUDA graph. Nothing is as large as the scores of all tokens: the largest
tensors are the pooled scores `[B, H, nQ, nK]`, and temporaries of `SLICE` elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_fmha import _block_lists, _checks
from sparse_fmha._pattern_checks import (
    check_choice,
    check_floats,
    check_int,
    check_number,
    check_q_and_k,
)
from sparse_fmha.block_grid import BlockGrid

__all__ = [
    "BlockGrid",
    "block_scores",
    "pool_blocks",
    "pooled_scores",
    "top_k_blocks",
    "top_k_indices",
    "top_p_blocks",
]

SLICE = 1 << 24  # elements of a temporary, where one could be as large as the input
POOLS = ("mean", "max", "min")
FIXED = 40  # bits behind the point where probabilities are added


def pool_blocks(x: Tensor, block: int, reduce: str = "mean") -> Tensor:
    """Mean, maximum or minimum of each block of tokens.

    Args:
        x: `[B, L, H, D]` of a floating point dtype, any strides.
        block: tokens to a block; the last one has what is left, and its mean is over these.
        reduce: "mean", "max" or "min".

    Returns:
        fp32 `[B, ceil(L / block), H, D]`.

    Raises:
        ValueError: another rank, `block` below 1, another `reduce`.
        TypeError: no floating point tensor.
    """
    check_floats("x", x, 4, "[batch, tokens, heads, head dim]")
    check_int("block", block, 1)
    check_choice("reduce", reduce, POOLS)
    batch, length, heads, dim = x.shape
    whole = length // block
    pooled = []
    if whole:
        blocks = x[:, : whole * block].unflatten(1, (whole, block))
        step = max(1, SLICE // max(1, batch * block * heads * dim))
        pooled = [_reduce(part, reduce) for part in blocks.split(step, 1)]
    if length > whole * block:
        pooled.append(_reduce(x[:, None, whole * block :], reduce))
    return torch.cat(pooled, 1) if pooled else x.new_zeros(x.shape, dtype=torch.float32)


def pooled_scores(
    q_pooled: Tensor,
    k_pooled: Tensor,
    *,
    scale: float | None = None,
    allowed: Tensor | None = None,
    softmax: bool = False,
) -> Tensor:
    """`scale * q_pooled . k_pooled` of each pair of blocks, in fp32.

    Args:
        q_pooled: `[B, nQ, Hq, D]`.
        k_pooled: `[B, nK, Hkv, D]`; Hq is a multiple of Hkv (GQA).
        scale: default `D**-0.5`.
        allowed: bool, broadcast to `[B, Hq, nQ, nK]`: other blocks get -inf, with `softmax` 0.
            `BlockGrid.reachable()` is the causal one.
        softmax: over the key blocks of each row; a row without allowed blocks is 0.

    Returns:
        fp32 `[B, Hq, nQ, nK]`. Autocast does not change that.

    Raises:
        ValueError: shapes or devices that do not fit, a scale that is not finite.
        TypeError: tensors of other dtypes.
    """
    check_q_and_k(q_pooled, k_pooled, ("q_pooled", "k_pooled"))
    _checks.check_flag("softmax", softmax)
    scale = _checks.finite("scale", scale)
    batch, rows, heads, dim = q_pooled.shape
    columns, heads_kv = k_pooled.shape[1:3]
    _check_allowed(allowed, (batch, heads, rows, columns))
    q = q_pooled.float() * (dim**-0.5 if scale is None else scale)
    grouped = q.unflatten(2, (heads_kv, heads // heads_kv)).permute(0, 2, 3, 1, 4)
    keys = k_pooled.float().permute(0, 2, 3, 1)
    with without_autocast(q.device):
        scores = grouped.flatten(2, 3) @ keys
    scores = scores.view(batch, heads, rows, columns)
    if allowed is None:
        return scores.softmax(-1) if softmax else scores
    if not softmax:
        return scores.masked_fill_(~allowed, -torch.inf)
    none = ~allowed.any(-1, keepdim=True)  # whose softmax is NaN
    return scores.masked_fill_(~allowed, -torch.inf).softmax(-1).masked_fill(none, 0)


def block_scores(
    q: Tensor, k: Tensor, grid: BlockGrid, *, scale: float | None = None, softmax: bool = False
) -> Tensor:
    """Scores of the means of blocks: `pooled_scores` of `pool_blocks`, causal as the grid is.

    Args:
        q: `[B, q_len, Hq, D]`. k: `[B, kv_len, Hkv, D]`. Their lengths are the grid's.
        grid: lengths, block sizes, causal.
        scale, softmax: as of `pooled_scores`.

    Returns:
        fp32 `[B, Hq, nQ, nK]`.

    Raises:
        ValueError, TypeError: as `pooled_scores`, and lengths that are not the grid's.
    """
    check_q_and_k(q, k)
    for name, given, needed in (("q", q.shape[1], grid.q_len), ("k", k.shape[1], grid.kv_len)):
        if given != needed:
            raise ValueError(f"{name} has {given} tokens; the grid has {needed}")
    pooled = pool_blocks(q, grid.block_q), pool_blocks(k, grid.block_kv)
    allowed = grid.reachable() if grid.causal else None
    return pooled_scores(*pooled, scale=scale, allowed=allowed, softmax=softmax)


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
    return _block_lists.list_blocks(top_k_blocks(scores, k), k)


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
    slots = torch.arange(n, device=probabilities.device)

    def choose(rows: Tensor, limit: Tensor) -> Tensor:
        rows = torch.where(rows > 0, rows, 0).float()
        values, order = rows.sort(dim=-1, descending=True, stable=True)
        mass = (values.clamp(max=1).double() * one).long()
        before = mass.cumsum(-1) - mass
        taken = ((before < limit) | (slots < min_blocks)) & (slots < most) & (values > 0)
        return torch.zeros_like(taken).scatter_(-1, order, taken)

    return _by_rows(choose, probabilities, limit)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Products of fp32 tensors stay fp32."""
    # Asking torch.amp which devices have autocast is not traced by torch.compile before 2.11.
    if device.type in ("cpu", "cuda"):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _reduce(blocks: Tensor, reduce: str) -> Tensor:
    """Over dimension 2."""
    if reduce == "mean":
        return blocks.mean(2, dtype=torch.float32)
    return (blocks.amax(2) if reduce == "max" else blocks.amin(2)).float()


def _by_rows(choose: Callable[..., Tensor], scores: Tensor, *more: Tensor) -> Tensor:
    """`choose` of the rows, some at a time, as its temporaries are larger than the scores."""
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (scores.detach(), *more)]
    step = max(1, SLICE // scores.shape[-1])
    parts = [choose(*rows) for rows in zip(*(f.split(step) for f in flat), strict=True)]
    return torch.cat(parts).view(scores.shape)


def _check_allowed(allowed: Tensor | None, shape: tuple[int, ...]) -> None:
    if allowed is None:
        return
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        raise TypeError(f"allowed is {getattr(allowed, 'dtype', type(allowed))}; bool is needed")
    try:
        fits = torch.broadcast_shapes(allowed.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"allowed has shape {list(allowed.shape)}; what broadcasts to {list(shape)} is needed"
        )
