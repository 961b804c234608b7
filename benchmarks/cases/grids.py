"""Neighborhoods on a grid, from the formulas of docs/design.md: what a case counts as useful, the
masks that a few rows are checked with, and the orders and block lists that peers need.

Nothing here is shared with the kernels or with sparse_fmha.reference.
"""

from __future__ import annotations

import functools
import math

import torch

Axis = tuple[int, int, int, int, bool]  # length, window, stride, dilation, causal


@functools.cache
def windows(axis: Axis) -> torch.Tensor:
    """For each index on the axis the positions [a, b) that it sees among those of its residue,
    int64 [length, 2]."""
    length, window, stride, dilation, causal = axis
    i = torch.arange(length, device="cpu")
    residue, p = i % dilation, i // dilation
    count = length // dilation + (residue < length % dilation)
    if causal:
        leader = torch.minimum(p // stride * stride + stride - 1, count - 1)
        return torch.stack([(leader - window + 1).clamp(min=0), p + 1], 1)
    leader = torch.minimum(p // stride * stride + stride // 2, count - 1)
    a = torch.minimum((leader - window // 2).clamp(min=0), count - window)
    return torch.stack([a, a + window], 1)


def visible_pairs(axes: tuple[Axis, ...]) -> int:
    """(query, key) pairs: a mask is the product of the axes' masks, so are the counts."""
    return math.prod(int(windows(axis).diff().sum()) for axis in axes)


def row_masks(axes: tuple[Axis, ...], rows: torch.Tensor) -> torch.Tensor:
    """Bool [rows, tokens], row by row of the mask over tokens in row-major order."""
    coordinates = torch.unravel_index(rows, [axis[0] for axis in axes])
    mask = torch.ones(len(rows), 1, dtype=torch.bool, device=rows.device)
    for axis, i in zip(axes, coordinates, strict=True):
        length, _, _, dilation, _ = axis
        a, b = windows(axis).to(rows.device)[i].T[..., None]
        j = torch.arange(length, device=rows.device)
        t = j // dilation
        one = (a <= t) & (t < b) & (j % dilation == i[:, None] % dilation)
        mask = (mask[:, :, None] & one[:, None, :]).flatten(1)
    return mask


def to_tiles(x: torch.Tensor, box: tuple[int, ...]) -> torch.Tensor:
    """[B, *grid, H, D] to [B, H, tokens, D] with the tokens of a box in a row; a copy."""
    axes = len(box)
    split = [n for length, side in zip(x.shape[1:-2], box, strict=True)
             for n in (length // side, side)]  # fmt: skip
    outer, inner = ([1 + 2 * a + part for a in range(axes)] for part in (0, 1))
    x = x.reshape(x.shape[0], *split, *x.shape[-2:])
    heads, dim = 2 * axes + 1, 2 * axes + 2
    return x.permute(0, heads, *outer, *inner, dim).flatten(2, -2).contiguous()


def from_tiles(x: torch.Tensor, grid: tuple[int, ...], box: tuple[int, ...]) -> torch.Tensor:
    """The inverse, to [B, tokens, H, D]; a copy."""
    axes = len(box)
    x = x.unflatten(2, [*(n // side for n, side in zip(grid, box, strict=True)), *box])
    interleaved = [2 + part * axes + a for a in range(axes) for part in (0, 1)]
    return x.permute(0, *interleaved, 1, 2 * axes + 2).flatten(1, -3).contiguous()


def tile_order(grid: tuple[int, ...], box: tuple[int, ...]) -> torch.Tensor:
    """The row-major index of each token, in the order of the tiles."""
    index = torch.arange(math.prod(grid), device="cpu").view(1, *grid, 1, 1)
    return to_tiles(index, box).flatten()


def block_kinds(
    axes: tuple[Axis, ...], order: torch.Tensor, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of `block` x `block` pairs have a visible pair, and which have nothing else.

    `order` is the row-major index of each token; two bool matrices [blocks, blocks] on its device.
    One row of blocks at a time: the mask of all tokens would be tens of gigabytes.
    """
    partly, fully = [], []
    behind = -len(order) % block
    for rows in order.split(block):
        mask = row_masks(axes, rows)[:, order]
        mask = torch.nn.functional.pad(mask, (0, behind, 0, block - len(rows)))
        mask = mask.unflatten(1, (-1, block))
        partly.append(mask.any(2).any(0))
        fully.append(mask.all(2).all(0))
    return torch.stack(partly), torch.stack(fully)
