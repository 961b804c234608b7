"""PKA: an image attends to conditions at the same place, and to a subject where it is named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import (
    check_collection,
    check_flag,
    check_floats,
    check_int,
    check_number,
    check_q_and_k,
    plain_ints,
)
from sparse_fmha._ops.autocast import cast_where_enabled, without_autocast
from sparse_fmha.attention import attention, block_sparse_attention, neighborhood_attention
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.merge import is_plain, merge_into_first
from sparse_fmha.selection import pooled_scores
from sparse_fmha.selection.products import fp32_product

Pair = tuple[Tensor, Tensor]


@plain_ints
def pka_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: Sequence[int],
    *,
    spatial: Sequence[Pair] = (),
    window: int | Sequence[int] = 1,
    subject: Pair | None = None,
    rows: Tensor | None = None,
    joint: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Attention of the tokens of an image to text and image, and to conditions.

    1. Every token attends to k, v: text and image. 2. Position-aligned: a token attends, in each
    spatial condition (an edge or depth map), to the tokens in a window around its own place; with a
    window of 1 that is one token. 3. Keyword-scoped: the tokens in `rows`, where the image shows
    what the prompt's keyword names, attend to the subject's tokens. With `joint`, all parts are one
    softmax, joined exactly by their lse; without, their outputs, a softmax each, are added.

    Source: "PKA" (2026), arXiv:2602.06850, for FLUX.1 with LoRA; no code was found. Whether
    position-aligned attention shares the softmax is left open: alone and with a window of 1 its
    softmax is 1, and it adds v. Windows above 1 are an extension.

    Conditions attend only to themselves, so their keys and values are the same in all steps of a
    diffusion model: compute them once and pass them in each step.

    Args:
        q: `[B, N, Hq, D]`, image tokens in row-major order of the grid. k, v: `[B, Lkv, Hkv, D]`.
        grid: one to three lengths, of N tokens in all.
        spatial: keys and values `[B, N, Hkv, D]` of each spatial condition, on the same grid.
        window: tokens on each axis; as in `neighborhood_attention`, it shifts at borders.
        subject: keys and values `[B, M, Hkv, D]`. rows: bool `[B|1, N]`, as from `keyword_rows`;
            None: all tokens.
        joint, scale: see above.

    Returns:
        `[B, N, Hq, D]`, without waiting for the device; differentiable. All conditions are computed
        together, which copies their keys and values once: with a window of 1 by two small products,
        otherwise by one call, which holds an output for each. Blocks of 64 tokens without any in
        `rows` do no work on the subject; others compute all their rows.

    Raises:
        ValueError, TypeError: as in `attention`; the grid or rows do not fit, or rows are given
            without a subject.
    """
    check_collection("grid", grid)
    check_collection("spatial", spatial)
    _checks.check_qkv(q, k, v, axes=(1,))
    check_flag("joint", joint)
    lengths = [check_int(f"grid[{n}]", length, 1) for n, length in enumerate(grid)]
    tokens = 1
    for length in lengths:
        tokens *= length
    if not 1 <= len(lengths) <= 3 or tokens != q.shape[1]:
        raise ValueError(
            f"grid must have one to three axes and the {q.shape[1]} tokens of q, got {list(grid)}"
        )
    if rows is not None and subject is None:
        raise ValueError("subject must be given with rows, got only the latter")
    for n, (keys, values) in enumerate(spatial):
        if keys.shape[1] != tokens:
            raise ValueError(
                f"spatial[{n}] must have the {tokens} tokens of grid, got {keys.shape[1]}"
            )
        _checks.check_qkv(q, keys, values, axes=(1,))
        if keys.shape != spatial[0][0].shape:
            raise ValueError(
                f"spatial[{n}] must have the shape of spatial[0], {list(spatial[0][0].shape)}, got "
                f"{list(keys.shape)}"
            )
    parts = [attention(q, k, v, scale=scale, return_lse=True)]
    if spatial:
        if all(width == 1 for width in _checks.per_axis("window", window, len(lengths))):
            parts.append(_at_one_place(q, spatial, joint, scale))
        else:
            parts += _aligned(q, spatial, lengths, window, scale)
    if subject is not None:
        parts.append(_scoped(q, *subject, rows, scale))
    if len(parts) == 1:
        return parts[0][0]
    outs, lses = zip(*parts, strict=True)
    return merge_into_first(outs, lses)[0] if joint else torch.stack(outs).sum(0)


def keyword_rows(
    q: Tensor, k: Tensor, *, threshold: float = 0.5, scale: float | None = None
) -> Tensor:
    """Returns which image tokens the keyword's tokens attend to, bool `[B, N]`.

        a_n = mean over keyword tokens and heads of softmax over the image of scale * q . k_n
        token n is in the rows iff (a_n - min a) / (max a - min a) > threshold

    Computed in one step of a diffusion model and used in the next. Source: see `pka_attention`;
    thresholds of 0.2 to 0.8. How the attention is normalized is left open.

    Args:
        q: `[B, tokens, Hq, D]`, the queries of the keyword, one or two tokens of the prompt.
        k: `[B, N, Hkv, D]`, the keys of the image.
        threshold: 0 to 1. scale: default `D**-0.5`.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    check_number("threshold", threshold, 0, 1)
    if not q.shape[1] or not k.shape[1]:
        raise ValueError(f"q and k must have at least 1 token, got {q.shape[1]} and {k.shape[1]}")
    with torch.no_grad():
        shares = pooled_scores(q, k, scale=scale, softmax=True).mean((1, 2))
        low, high = shares.amin(1, keepdim=True), shares.amax(1, keepdim=True)
        return shares - low > threshold * (high - low)


def _at_one_place(q: Tensor, spatial: Sequence[Pair], joint: bool, scale: float | None) -> Pair:
    """Returns out and lse over the one token of each condition at a query's own place.

    Args:
        joint: False adds the conditions up, each with a softmax of its own, which is 1.
    """
    both = (torch.stack(parts, 3) for parts in zip(*spatial, strict=True))
    q, keys, values = cast_where_enabled(q, *both)  # [B, N, Hkv, conditions, D]
    queries = q.unflatten(2, (keys.shape[2], -1))
    with without_autocast(q.device):
        scores = _product(queries, keys.mT) * (q.shape[3] ** -0.5 if scale is None else scale)
        weights = scores.softmax(-1) if joint else torch.ones_like(scores)
        out = _product(weights.to(q.dtype), values)
    return out.flatten(2, 3).to(q.dtype), scores.logsumexp(-1).flatten(2).float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns `left @ right` in fp32, or fp64 for that; differentiable."""
    if is_plain(left, right) and left.dtype != torch.float64:
        return fp32_product(left, right)
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


def _aligned(
    q: Tensor,
    spatial: Sequence[Pair],
    grid: Sequence[int],
    window: int | Sequence[int],
    scale: float | None,
) -> list[Pair]:
    """Returns out and lse over a window of each condition, with conditions as batch entries."""
    keys, values = (torch.cat(parts) for parts in zip(*spatial, strict=True))
    many = q.repeat(len(spatial), 1, 1, 1), keys, values
    queries, keys, values = (x.unflatten(1, tuple(grid)) for x in many)
    out, lse = neighborhood_attention(queries, keys, values, window, scale=scale, return_lse=True)
    outs, lses = out.flatten(1, -3), lse.flatten(1, -2)
    return list(zip(outs.split(len(q)), lses.split(len(q)), strict=True))


def _scoped(q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, scale: float | None) -> Pair:
    """Returns out and lse of the subject, 0 and -inf for tokens that are not in rows."""
    check_floats("subject", k, 4, "[batch, tokens, heads, head dim]")
    if rows is None:
        return attention(q, k, v, scale=scale, return_lse=True)
    if not isinstance(rows, Tensor) or rows.dtype != torch.bool:
        raise TypeError(f"rows must be a bool tensor, got {getattr(rows, 'dtype', type(rows))}")
    if rows.dim() != 2 or rows.shape[0] not in (1, q.shape[0]) or rows.shape[1] != q.shape[1]:
        raise ValueError(
            f"rows must have shape [{q.shape[0]} or 1, {q.shape[1]}], got {list(rows.shape)}"
        )
    grid = BlockGrid.of(q, k, 64, 64)
    missing = -rows.shape[1] % 64
    some = torch.nn.functional.pad(rows, (0, missing)).unflatten(1, (-1, 64)).any(-1)
    blocks = some[:, None, :, None].expand(-1, -1, -1, grid.shape[1])
    out, lse = block_sparse_attention(q, k, v, grid.mask(blocks), scale=scale, return_lse=True)
    hidden = ~rows[..., None]
    return out.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, -torch.inf)
