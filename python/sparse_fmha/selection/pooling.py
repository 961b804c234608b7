"""Scores of blocks from pooled queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import (
    check_choice,
    check_floats,
    check_instance,
    check_int,
    check_q_and_k,
    plain_ints,
)
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import CACHED, SLICE
from sparse_fmha.masks.block_grid import BlockGrid

POOLS = ("mean", "max", "min")


@plain_ints
def pool_blocks(x: Tensor, block: int, reduce: str = "mean") -> Tensor:
    """Returns the mean, maximum or minimum of each block of tokens.

    Args:
        x: `[B, L, H, D]` of a floating point dtype, any strides.
        block: tokens per block; the last block may be shorter, and its mean is over its tokens.
        reduce: "mean", "max" or "min".

    Returns:
        fp32 `[B, ceil(L / block), H, D]`.

    Raises:
        ValueError: x is not four-dimensional, `block` is below 1, or `reduce` is not allowed.
        TypeError: x is not a floating point tensor.
    """
    check_floats("x", x, 4, "[batch, tokens, heads, head dim]")
    check_int("block", block, 1)
    check_choice("reduce", reduce, POOLS)
    batch, length, heads, dim = x.shape
    whole = length // block
    pooled = []
    if whole:
        blocks = x[:, : whole * block].unflatten(1, (whole, block))
        most = CACHED if x.device.type == "cpu" else SLICE
        step = max(1, most // max(1, batch * block * heads * dim))
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
    """Returns `scale * q_pooled . k_pooled` for each pair of blocks, in fp32.

    Args:
        q_pooled: `[B, nQ, Hq, D]`.
        k_pooled: `[B, nK, Hkv, D]`; Hq is a multiple of Hkv (GQA).
        scale: default `D**-0.5`.
        allowed: bool, broadcasts to `[B, Hq, nQ, nK]`; other blocks get -inf, or 0 with `softmax`.
            For causal attention, use `BlockGrid.reachable()`.
        softmax: apply softmax over the key blocks of each row; a row without allowed blocks is 0.

    Returns:
        fp32 `[B, Hq, nQ, nK]`, also under autocast.

    Raises:
        ValueError: shapes or devices do not match, or scale is not finite.
        TypeError: a tensor has a wrong dtype.
    """
    check_q_and_k(q_pooled, k_pooled, ("q_pooled", "k_pooled"))
    _checks.check_flag("softmax", softmax)
    scale = _checks.finite("scale", scale)
    batch, rows, heads, dim = q_pooled.shape
    columns, heads_kv = k_pooled.shape[1:3]
    _check_allowed(allowed, (batch, heads, rows, columns))
    q = q_pooled.float() * (dim**-0.5 if scale is None else scale)
    grouped: Tensor = q.unflatten(2, (heads_kv, heads // heads_kv)).permute(0, 2, 3, 1, 4)
    keys = k_pooled.float().permute(0, 2, 3, 1)
    with without_autocast(q.device):
        scores = grouped.flatten(2, 3) @ keys
    scores = scores.view(batch, heads, rows, columns)
    if allowed is None:
        return scores.softmax(-1) if softmax else scores
    if not softmax:
        return scores.masked_fill_(~allowed, -torch.inf)
    none = ~allowed.any(-1, keepdim=True)  # rows whose softmax is NaN
    return scores.masked_fill_(~allowed, -torch.inf).softmax(-1).masked_fill(none, 0)


def block_scores(
    q: Tensor, k: Tensor, grid: BlockGrid, *, scale: float | None = None, softmax: bool = False
) -> Tensor:
    """Returns scores of block means: `pooled_scores` of `pool_blocks`, causal if the grid is.

    Args:
        q: `[B, q_len, Hq, D]`. k: `[B, kv_len, Hkv, D]`.
        grid: has the lengths of q and k, block sizes and causal.
        scale, softmax: as in `pooled_scores`.

    Returns:
        fp32 `[B, Hq, nQ, nK]`.

    Raises:
        ValueError, TypeError: as in `pooled_scores`, or lengths differ from the grid's.
    """
    check_instance("grid", grid, BlockGrid)
    check_q_and_k(q, k)
    for name, given, needed in (("q", q.shape[1], grid.q_len), ("k", k.shape[1], grid.kv_len)):
        if given != needed:
            raise ValueError(f"{name} must have the {needed} tokens of the grid, got {given}")
    pooled = pool_blocks(q, grid.block_q), pool_blocks(k, grid.block_kv)
    allowed = grid.reachable() if grid.causal else None
    return pooled_scores(*pooled, scale=scale, allowed=allowed, softmax=softmax)


def _reduce(blocks: Tensor, reduce: str) -> Tensor:
    """Reduces dimension 2 to fp32."""
    if reduce == "mean":
        return blocks.mean(2, dtype=torch.float32)
    return (blocks.amax(2) if reduce == "max" else blocks.amin(2)).float()


def _check_allowed(allowed: Tensor | None, shape: tuple[int, ...]) -> None:
    if allowed is None:
        return
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        raise TypeError(
            f"allowed must be a bool tensor, got {getattr(allowed, 'dtype', type(allowed))}"
        )
    try:
        fits = torch.broadcast_shapes(allowed.shape, shape) == torch.Size(shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"allowed must have a shape that broadcasts to {list(shape)}, got {list(allowed.shape)}"
        )
