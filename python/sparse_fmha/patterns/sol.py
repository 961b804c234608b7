"""Sol-Attn: blocks above a threshold exactly, all others as one pooled key each."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import (
    LARGEST_FLOAT,
    check_choice,
    check_int,
    check_number,
    check_q_and_k,
    plain_ints,
)
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import head_parts
from sparse_fmha.attention import block_sparse_attention, stripe_attention
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.merge import is_plain, merge_into_first
from sparse_fmha.patterns._granules import granule_mask, pooled_tokens
from sparse_fmha.patterns._maps import map_like
from sparse_fmha.patterns._sol_tokens import rest_of_blocks, top_tokens
from sparse_fmha.selection import pool_blocks, pooled_scores, top_k_blocks

LEAST_VARIANCE = 1e-6 * math.log(2) ** 2  # 1e-6 of scores in powers of two, as in the sources


@plain_ints
def sol_blocks(
    q: Tensor,
    k: Tensor,
    *,
    tau: float = 1.0,
    keep: float | None = None,
    forced: Tensor | None = None,
    scale: float | None = None,
    block: int = 64,
) -> Tensor:
    """Returns the blocks that Sol-Attn computes exactly, bool `[B, Hq, nQ, nK]`.

    With means q_I, k_J of blocks, and mean m and variance s of k_J over all blocks J, for each
    channel: block J is exact for block I if

        scale * q_I . (k_J - m) > tau * sqrt(scale**2 * sum over channels of q_I**2 * s + e),

    with a tiny e; also if I and J are the same or next to each other, if J is a short last block,
    and where `forced` says so.

    Args:
        q: `[B, L, Hq, D]`. k: `[B, L, Hkv, D]`.
        tau: any number; the larger, the fewer are exact: 16, 7 and 2.7% for 1, 1.5 and 2.
        keep: in place of tau, the share of the blocks with the largest scores, from 0 to 1,
            rounded up.
        forced: bool map that broadcasts to `[B, Hq, nQ, nK]`, such as `BlockGrid.keys` for sinks or
            `BlockGrid.tokens` for text.
        scale: default `D**-0.5`.
        block: size of query and key blocks, 64 or 128.

    Computed without waiting for the device.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"k must have the {q.shape[1]} tokens of q, got {k.shape[1]}")
    tau = check_number("tau", tau, -LARGEST_FLOAT, LARGEST_FLOAT)
    scale = _checks.finite("scale", scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grid = BlockGrid.of(q, k, block, block)
    with torch.no_grad():
        queries, keys = pool_blocks(q, block), pool_blocks(k, block)
        keys = keys - keys.mean(1, keepdim=True)
        scores = pooled_scores(queries, keys, scale=scale)
        if keep is None:
            spread = pooled_scores(queries.square(), keys.square().mean(1, keepdim=True), scale=1.0)
            exact = scores > tau * (spread * scale**2 + LEAST_VARIANCE).sqrt()
        else:
            exact = top_k_blocks(scores, density=check_number("keep", keep, 0, 1))
    exact |= grid.local(2)
    if grid.kv_len % block:
        exact |= grid.keys(-1)
    return exact if forced is None else exact | map_like("forced", forced, exact)


@plain_ints
def sol_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float = 1.0,
    keep: float | None = None,
    forced: Tensor | None = None,
    rest: str = "token",
    extra_tokens: int = 0,
    scale: float | None = None,
    block: int = 64,
) -> Tensor:
    """Attention by Sol-Attn: the whole method from q, k, v to out.

    The blocks of `sol_blocks` are computed exactly. Every other block stays in the same softmax as
    one key: the mean of its keys, with the mean of its values and the weight of its tokens,

        logit of block J for token i = scale * q_i . k_J + ln(block).

    With `rest="block"`, all tokens of a block take the mean of their queries in place of q_i: that
    needs no second call over all tokens. `merge` joins both parts exactly by their lse.

    Source: "Sol-Attn" (2026), arXiv:2607.24027, and public implementations: blocks of 64, tau 1.0
    to 2.0 (ComfyUI 1.3, TensorRT-LLM 2.0), where the first fifth of the steps and one or two layers
    are dense, and inputs of less than 8192 or 12288 tokens. In these, a short last block is treated
    like the others. Implementations differ in which queries the pooled part has.

    Args:
        q: `[B, L, Hq, D]`. k, v: `[B, L, Hkv, D]`; dtypes and strides as in `attention`.
        tau, keep, forced, scale, block: as in `sol_blocks`.
        rest: "token" or "block": which queries the pooled blocks are scored by.
        extra_tokens: with `rest="block"`, as many keys of other blocks are exact for a block of
            queries, those with the largest products with the mean of its queries; the mean of a
            block is that of its other tokens then. ComfyUI has 256. The scores of all keys are
            computed for it, a few blocks of queries at a time.

    Returns:
        `[B, L, Hq, D]` in q's dtype, without waiting for the device; differentiable, but not
        through the choice. Besides the result, memory is a map of blocks and, for some heads at a
        time, the output of the pooled part; with `rest="token"` also bitmasks of 8 bytes for each
        pair of blocks (16 with blocks of 128), with `rest="block"` scores of 4 bytes. With
        derivatives, all heads are computed together.

    Raises:
        ValueError, TypeError: as in `sol_blocks` and `block_sparse_attention`.
    """
    return with_lse(
        q,
        k,
        v,
        tau=tau,
        keep=keep,
        forced=forced,
        rest=rest,
        extra_tokens=extra_tokens,
        scale=scale,
        block=block,
    )[0]


@plain_ints
def with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tau: float = 1.0,
    keep: float | None = None,
    forced: Tensor | None = None,
    rest: str = "token",
    extra_tokens: int = 0,
    scale: float | None = None,
    block: int = 64,
) -> tuple[Tensor, Tensor]:
    """`sol_attention`, and the lse of each query, `[B, L, Hq]`, for a `merge` with other keys."""
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    check_choice("rest", rest, ("token", "block"))
    if check_int("extra_tokens", extra_tokens) and rest != "block":
        raise ValueError(f"extra_tokens must be 0 with rest={rest!r}, got {extra_tokens}")
    exact = sol_blocks(q, k, tau=tau, keep=keep, forced=forced, scale=scale, block=block)
    mask = BlockGrid.of(q, k, block, block).mask(exact)
    out, lse = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True)
    whole = k.shape[1] // block
    if not whole:
        return out, lse
    left = exact[..., :whole].logical_not()

    def merged(own: slice, own_kv: slice) -> tuple[Tensor, Tensor]:
        keys, values = (x[:, : whole * block, own_kv] for x in (k, v))
        given = q[:, :, own], keys, values, left[:, own]
        pooled = _by_token if rest == "token" else _by_block
        more: tuple[tuple[Tensor, Tensor], ...] = ()
        if extra_tokens:
            exact_scale = q.shape[3] ** -0.5 if scale is None else float(scale)
            tokens = top_tokens(given[0], keys, given[3], extra_tokens, exact_scale, block)
            other, other_lse = rest_of_blocks(*given, tokens, exact_scale, block)
            more = (_single(*given[:3], tokens, scale, block),)
        else:
            other, other_lse = pooled(*given, scale, block)
        if rest == "block":
            rows = torch.arange(q.shape[1], device=q.device) // block
            other = other.to(out.dtype)  # under autocast not that of q
            other, other_lse = other.index_select(1, rows), other_lse.index_select(1, rows)
        parts = (out[:, :, own], lse[:, :, own]), (other, other_lse), *more
        return merge_into_first(*zip(*parts, strict=True))

    if not is_plain(q, k, v):
        return merged(slice(None), slice(None))
    lses = [merged(own, own_kv)[1] for own, own_kv in head_parts(q, k)]  # out is written over
    return out, torch.cat(lses, 2)


def _single(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, scale: float | None, block: int
) -> tuple[Tensor, Tensor]:
    """Attention over the tokens that are listed for each block of queries."""
    counts = (tokens >= 0).sum(-1, dtype=torch.int32)
    mask = StripeMask(tokens.int(), counts, q.shape[1], k.shape[1], block)
    return stripe_attention(q, k, v, mask, scale=scale, return_lse=True)


def _by_token(
    q: Tensor, k: Tensor, v: Tensor, left: Tensor, scale: float | None, block: int
) -> tuple[Tensor, Tensor]:
    mask = granule_mask(left, 1, q.shape[1], block, block_kv=64)
    keys, values = pooled_tokens(k, block), pooled_tokens(v, block)
    out, lse = block_sparse_attention(q, keys, values, mask, scale=scale, return_lse=True)
    return out, lse + math.log(block)


def _by_block(
    q: Tensor, k: Tensor, v: Tensor, left: Tensor, scale: float | None, block: int
) -> tuple[Tensor, Tensor]:
    """Returns out and lse of blocks of queries, `[B, nQ, Hq, D]` and `[B, nQ, Hq]` in fp32."""
    keys, values = pooled_tokens(k, block), pool_blocks(v, block)
    scores = pooled_scores(pool_blocks(q, block), keys, scale=scale, allowed=left)
    none = ~left.any(-1, keepdim=True)  # rows whose softmax, and its derivative, would be NaN
    scores = scores.masked_fill(none, 0)
    weights, lse = scores.softmax(-1), scores.logsumexp(-1).masked_fill(none[..., 0], -torch.inf)
    group = q.shape[2] // k.shape[2]
    with without_autocast(q.device):
        out: Tensor = weights.unflatten(1, (-1, group)) @ values.transpose(1, 2)[:, :, None]
    return out.flatten(1, 2).transpose(1, 2), (lse + math.log(block)).transpose(1, 2)
