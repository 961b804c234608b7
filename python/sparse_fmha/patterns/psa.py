"""Pyramid sparse attention: less important key blocks are seen as fewer, pooled keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sparse_fmha import _checks
from sparse_fmha._checks import (
    check_choice,
    check_collection,
    check_instance,
    check_int,
    check_integers,
    check_number,
    plain_ints,
)
from sparse_fmha._sizes import CACHED, ceil_div
from sparse_fmha.attention import block_sparse_attention
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.merge import merge_into_first
from sparse_fmha.patterns._granules import granule_mask, pooled_tokens
from sparse_fmha.patterns._sampled_importance import sampled_importance
from sparse_fmha.selection.choosing import ROUNDING, fixed_point, masses_before

LEVELS = (1, 2, 4, 8)
SHARES = {1: 0.05, 2: 0.15, 4: 0.25, 8: 0.5}


@plain_ints
def psa_levels(
    q: Tensor,
    k: Tensor,
    shares: Mapping[int, float] = SHARES,
    *,
    by: str = "rank",
    least: float = 0.06,
    similarity: Mapping[int, float] | None = None,
    text: int = 0,
    every: int = 4,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> Tensor:
    """Returns the level of each pair of blocks: 1, 2, 4, 8, or 0 for blocks that are left out.

    1. Importance of a pair of blocks: attention of a sample of the queries on a sample of the keys,
    every `every`-th token of both; the largest probability of the pair. 2. In each row, blocks in
    descending importance take the levels of `shares` one after the other: level h reaches up to the
    share `shares[h]` of the row's blocks (`by="rank"`, rounded up), or of the row's importance
    (`by="mass"`, the fewest that reach it). 3. With `similarity`, the level is at most the largest
    h with mean cos(k_a, k_(a + h - 1)) > similarity[h] over the runs of h keys of the block.

    Level 1 always: the last `text` keys; with `causal` the diagonal. A short last block is at level
    1 or left out.

    Source: "PSA: Pyramid Sparse Attention for Efficient Video Understanding and Generation" (2025),
    arXiv:2512.04025, and its code, whose default shares these are. For Wan 2.1 14B it has
    `by="mass"` with {1: 0.4, 2: 0.5, 4: 0.6, 8: 0.8}; published similarities are {2: 0.7, 4: 0.65,
    8: 0.6}. The code samples tokens at random, a quarter as here; it pads a short last block with
    copies of the last token; and it rounds the number of blocks of a level up to full tiles of its
    kernel, which needs that.

    Args:
        q: `[B, Lq, Hq, D]`. k: `[B, Lkv, Hkv, D]`; dtypes and strides as in `attention`.
        shares: ascending shares 0 to 1 of some of the levels 1, 2, 4, 8, in this order.
        by: "rank" or "mass". least: with "mass", level 1 has at least `int(least * nK) + 1` blocks.
        similarity: thresholds of some of the levels 2, 4, 8.
        text: keys at the end, at least 0.
        every: divides both block sizes.
        causal, scale: as in `block_sparse_attention`.
        block_q, block_kv: block sizes.

    Returns:
        uint8 `[B, Hq, nQ, nK]`, without waiting for the device, a few rows of blocks at a time. The
        sample takes `1 / every**2` of the products of all queries and keys, twice: once for sums
        of exponentials and once for the maxima. Where `score_sums` has kernels, they do both.

    Raises:
        ValueError, TypeError: a shape, dtype, level or number is not allowed.
    """
    check_instance("shares", shares, Mapping)
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=causal)
    _check_shares(shares, similarity)
    check_choice("by", by, ("rank", "mass"))
    check_number("least", least, 0, 1)
    check_int("text", text)
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if size % check_int("every", every, 1):
            raise ValueError(f"every must divide {name} = {size}, got {every}")
    rows, columns = grid.shape
    reachable = grid.reachable()
    exact = grid.keys(max(grid.kv_len - text, 0)) & reachable
    if causal:
        exact |= grid.diagonal()
    scale = _checks.finite("scale", scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    with torch.no_grad():
        sample, keys = (q if scale >= 0 else -q)[:, ::every], k[:, ::every]
        found = sampled_importance(sample, keys, grid, every, abs(scale))
        caps = None if similarity is None else _caps(k, similarity, block_kv, q.shape[2])

        def choose(part: slice) -> list[Tensor]:
            own = found[:, :, part].masked_fill(~reachable[part], -torch.inf)
            levels = _by_rank(own, shares) if by == "rank" else _by_mass(own, shares, least)
            if caps is not None:
                levels = torch.minimum(levels, caps[:, :, None])
            if grid.kv_len % block_kv:
                levels[..., -1].clamp_(max=1)
            return [levels.masked_fill_(exact[part], 1)]

        parts = block_lists.chunks(rows, q.shape[0] * q.shape[2] * columns, q.device, CACHED)
        (levels,) = block_lists.by_chunks(choose, parts, rows, 2)
    return levels


@plain_ints
def psa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    levels: Tensor,
    *,
    pools: Sequence[int] = LEVELS,
    causal: bool = False,
    scale: float | None = None,
    block_q: int = 128,
    block_kv: int = 128,
) -> Tensor:
    """Attention over a pyramid of keys and values, by the level of each pair of blocks.

    With `K^(h), V^(h)` the means of h adjacent keys and values, a block at level h is seen as its
    `block_kv / h` pooled keys, with logit `scale * q . k^(h) + ln h`, all levels in one softmax.
    With `causal`, a pooled key is visible if the last key that it covers is. A short last block is
    seen at level 1, whatever its level, if that is not 0.

    Exact and differentiable: each level is one call of `block_sparse_attention`, to whose lse ln h
    is added; `merge` joins them. Source: see `psa_levels`, which makes the levels.

    Args:
        q: `[B, Lq, Hq, D]`. k, v: `[B, Lkv, Hkv, D]`; dtypes and strides as in `attention`.
        levels: integers `[B|1, Hq|1, nQ, nK]` on q's device; what is not in `pools` counts as 0.
        pools: the levels that are computed; each costs a call.
        causal, scale, block_q, block_kv: as in `block_sparse_attention`.

    Returns:
        `[B, Lq, Hq, D]`. A query that sees nothing has 0. Besides it, the method holds the output
        of each level, and pooled keys and values, less than as much as k and v. Where a block is
        pooled to less than 16 keys, bitmasks take `Lq * Lkv / (8 h)` bytes for each head.

    Raises:
        ValueError, TypeError: as in `block_sparse_attention`; a level is not 1, 2, 4 or 8; `levels`
            does not fit.
    """
    check_collection("pools", pools)
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    grid = BlockGrid.of(q, k, block_q, block_kv, causal=causal)
    check_integers("levels", levels)
    block_checks.check_blocks(levels > 0, grid.q_len, grid.kv_len, block_q, block_kv)
    if not pools:
        raise ValueError("pools must have at least one level, got none")
    for level in pools:
        _check_level("pools", level)
    whole = grid.kv_len // block_kv
    short = grid.kv_len % block_kv > 0
    outs, lses = [], []
    for level in sorted(set(pools)):
        listed = levels == level
        if level == 1:
            if short:
                last = torch.zeros_like(listed[..., -1])
                for each in pools:
                    last |= levels[..., -1] == each
                listed[..., -1] = last
            mask = grid.mask(listed)
        elif whole:
            limits = _limits(grid, level, whole) if causal else None
            mask = granule_mask(
                listed[..., :whole],
                block_kv // level,
                grid.q_len,
                block_q,
                limits=limits,
                spread=ceil_div(block_q, level),
            )
        else:
            continue
        covered = slice(0, mask.kv_len * level)
        keys, values = pooled_tokens(k[:, covered], level), pooled_tokens(v[:, covered], level)
        out, lse = block_sparse_attention(q, keys, values, mask, scale=scale, return_lse=True)
        outs.append(out)
        lses.append(lse + math.log(level))
    return merge_into_first(outs, lses)[0] if outs else torch.zeros_like(q)


def _by_rank(found: Tensor, shares: Mapping[int, float]) -> Tensor:
    """Returns the levels of blocks by their rank among those of a row with importance over -inf."""
    found = found.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    values, order = found.sort(dim=-1, descending=True, stable=True)
    there = (values > -torch.inf).sum(-1, keepdim=True).double()
    slots = torch.arange(found.shape[-1], device=found.device)
    ranked = torch.zeros_like(found, dtype=torch.uint8)
    for level in sorted(shares, reverse=True):
        ranked.masked_fill_(slots < (there * shares[level] - ROUNDING).ceil(), level)
    return torch.empty_like(ranked).scatter_(-1, order, ranked)


def _by_mass(found: Tensor, shares: Mapping[int, float], least: float) -> Tensor:
    """Returns the levels of blocks by the importance of those before them."""
    found = torch.where(found > 0, found, 0)
    found = found / found.sum(-1, keepdim=True).clamp(min=1e-30)
    values, order = found.sort(dim=-1, descending=True, stable=True)
    before = masses_before(values)
    slots = torch.arange(found.shape[-1], device=found.device)
    ranked = torch.zeros_like(found, dtype=torch.uint8)
    for level in sorted(shares, reverse=True):
        few = int(least * found.shape[-1]) + 1 if level == 1 else 1
        ranked.masked_fill_((before < fixed_point(shares[level])) | (slots < few), level)
    ranked.masked_fill_(values <= 0, 0)
    return torch.empty_like(ranked).scatter_(-1, order, ranked)


def _caps(k: Tensor, similarity: Mapping[int, float], block_kv: int, heads: int) -> Tensor:
    """Returns the highest level of each key block, uint8 `[B, Hq, nK]`."""
    batch, length, heads_kv, _ = k.shape
    whole = length // block_kv
    shape = (batch, ceil_div(length, block_kv), heads_kv)
    caps = torch.ones(shape, dtype=torch.uint8, device=k.device)
    for level in sorted(similarity):
        runs: Tensor = k[:, : whole * block_kv].unflatten(1, (whole, block_kv // level, level))
        near = cosine_similarity(runs[:, :, :, 0].float(), runs[:, :, :, -1].float(), dim=-1)
        caps[:, :whole].masked_fill_(near.mean(2) > similarity[level], level)
    return caps.transpose(1, 2).repeat_interleave(heads // heads_kv, 1)


def _limits(grid: BlockGrid, level: int, whole: int) -> Tensor:
    """Returns how many pooled keys each query sees, int64 `[nQ * block_q]`."""
    rows = torch.arange(grid.shape[0] * grid.block_q, device=grid.device)
    seen = rows.clamp(max=grid.q_len - 1) + 1 + grid.kv_len - grid.q_len
    return (seen // level).clamp(0, whole * grid.block_kv // level)


def _check_level(name: str, level: int) -> None:
    if level not in LEVELS:
        raise ValueError(f"levels of {name} must be {_checks.one_of(LEVELS)}, got {level}")


def _check_shares(shares: Mapping[int, float], similarity: Mapping[int, float] | None) -> None:
    if not shares:
        raise ValueError("shares must have at least one level, got none")
    before = 0.0
    for level in shares:
        _check_level("shares", level)
    for level in sorted(shares):
        share = check_number(f"shares[{level}]", shares[level], 0, 1)
        if share < before:
            raise ValueError(
                f"shares[{level}] must be at least {before}, that of a lower level, got {share}"
            )
        before = share
    if similarity is not None:
        _checks.check_instance("similarity", similarity, Mapping)
    for level in similarity or ():
        _check_level("similarity", level)
        if level == 1:
            raise ValueError(f"levels of similarity must be {_checks.one_of(LEVELS[1:])}, got 1")
        check_number(f"similarity[{level}]", (similarity or {})[level], -1, 1)
