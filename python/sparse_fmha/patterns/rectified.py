"""Rectified SpaAttn: block lists, with the mass and the values of what they leave out estimated."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import check_int, check_number, check_q_and_k, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha.attention import block_sparse_attention
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.merge import is_plain
from sparse_fmha.patterns._maps import map_like
from sparse_fmha.selection import pool_blocks, pooled_scores, top_p_blocks


class Rectified(NamedTuple):
    """What `rectified` chooses: a mask, and how to correct the output under it."""

    mask: BlockMask
    scale: Tensor  # fp32 [B, Hq, nQ], factor of the output of each query block
    rest: Tensor  # fp32 [B, Hq, nQ, nK], weights of the mean values of blocks that are left out


@plain_ints
def rectified(
    q: Tensor,
    k: Tensor,
    *,
    text: int = 0,
    keep: float = 0.2,
    theta: float = 0.3,
    forced: Tensor | None = None,
    scale: float | None = None,
    block: int = 128,
) -> Rectified:
    """Chooses blocks and corrections of Rectified SpaAttn, for bidirectional self-attention.

    The last `text` tokens are text: each of its keys is scored alone ("isolated"), the other keys
    by the means of their blocks. With means q_I, k_J, block sizes n_J and text keys t,

        e_IJ = exp(scale * q_I . k_J), e_It = exp(scale * q_I . k_t), Z_I = sum n_J e_IJ + sum e_It
        P_IJ = n_J e_IJ / Z_I, and P_I,text = sum e_It / Z_I

    1. Selected in row I: the largest P (the text counts as one block) until they exceed `theta`, at
    least `floor(keep * blocks)`; and the text, and `forced`. 2. A block J that is left out is
    compensated if the gain of doing so is above its error:
    `|q_I . k_J| > |mean|q - q_I| . k_J| + |q_I . mean|k - k_J||`, with means over the block's
    tokens. 3. `scale_I` is the sum of P over all that is not compensated, `rest_IJ` is P_IJ where
    it is. `rectified_attention` uses both.

    Queries of text see everything. A block with both text and other tokens counts as text: it is
    seen by all and sees all.

    Source: "Rectified SpaAttn" (2025), arXiv:2511.19835, and its code for HunyuanVideo: blocks of
    128, theta 0.3, keep 0.2 (0.25 for Wan 2.1). There, tokens are in the order of a space-filling
    curve, `forced` is a static map of blocks that touch in the video, and the first steps and
    layers are dense; these are up to the caller. The code masks padded text, which is not passed
    here.

    Args:
        q: `[B, L, Hq, D]`. k: `[B, L, Hkv, D]`.
        text: tokens at the end, at least 0 and below L.
        keep: share of the blocks outside the text, 0 to 1. theta: share of the probability, 0 to 1.
        forced: bool map of blocks that are also selected; broadcasts to `[B, Hq, nQ, nK]`.
        scale: of q.k; default `D**-0.5`.
        block: size of query and key blocks, 64 or 128.

    Returns:
        A mask with lists for each batch entry and head, and corrections, built without waiting for
        the device. Nothing of it has a gradient. Temporaries: a copy of q or k in fp32, and a few
        times the 4 bytes of `rest` for each pair of blocks and head.

    Raises:
        ValueError, TypeError: a shape, dtype or number is not allowed.
    """
    check_q_and_k(q, k)
    length = q.shape[1]
    if k.shape[1] != length:
        raise ValueError(f"k must have the {length} tokens of q, got {k.shape[1]}")
    if check_int("text", text) >= length:
        raise ValueError(f"text must be less than the {length} tokens of q, got {text}")
    check_number("keep", keep, 0, 1)
    check_number("theta", theta, 0, 1)
    grid = BlockGrid.of(q, k, block, block)
    with torch.no_grad():
        shares, gains = _estimates(q, k, length - text, scale, block)
        blocks = shares.shape[-1] - 1
        least = max(1, math.floor(keep * blocks + 1e-9))
        chosen = grid.none().expand(*shares.shape[:2], -1, -1).clone()
        chosen[..., :blocks, :blocks] = top_p_blocks(shares, theta, min_blocks=least)[..., :blocks]
        if text:
            chosen |= grid.tokens(-text)
        if forced is not None:
            chosen |= map_like("forced", forced, chosen)
        left = chosen.logical_not()[..., :blocks, :blocks] & gains
        rest = shares.new_zeros(chosen.shape)
        rest[..., :blocks, :blocks] = shares[..., :blocks].masked_fill_(~left, 0)
        return Rectified(grid.mask(chosen), 1 - rest.sum(-1), rest)


@plain_ints
def rectified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    text: int = 0,
    keep: float = 0.2,
    theta: float = 0.3,
    forced: Tensor | None = None,
    scale: float | None = None,
    block: int = 128,
    plan: Rectified | None = None,
) -> Tensor:
    """Attention by Rectified SpaAttn: the whole method from q, k, v to out.

        out of query block I = scale_I * attention over the selected blocks
                               + sum over J of rest_IJ * mean of v over block J

    Differentiable in q, k and v, with the choice, `scale` and `rest` of `rectified` as constants;
    the method itself is for inference.

    Args:
        q: `[B, L, Hq, D]`. k, v: `[B, L, Hkv, D]`; dtypes and strides as in `attention`.
        text, keep, theta, forced, scale, block: as in `rectified`.
        plan: what `rectified` chose, for example in an earlier step. Then text, keep, theta,
            forced and block are not used.

    Returns:
        `[B, L, Hq, D]` in q's dtype. Besides it, the method holds the output under the mask, and
        `rest`, 4 bytes for each pair of blocks.

    Raises:
        ValueError, TypeError: as in `rectified` and `block_sparse_attention`.
    """
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    if plan is None:
        plan = rectified(
            q, k, text=text, keep=keep, theta=theta, forced=forced, scale=scale, block=block
        )
    out = block_sparse_attention(q, k, v, plan.mask, scale=scale)
    means = pool_blocks(v, plan.mask.block_kv).transpose(1, 2)
    group = q.shape[2] // k.shape[2]
    with without_autocast(q.device):
        rest = plan.rest.unflatten(1, (-1, group)) @ means[:, :, None]
    rest = rest.flatten(1, 2).transpose(1, 2)
    return _corrected(out, plan.scale.transpose(1, 2)[..., None], rest, plan.mask.block_q)


def _corrected(out: Tensor, scale: Tensor, rest: Tensor, block: int) -> Tensor:
    """Returns scale * out + rest in the dtype of out; where no derivative is wanted, in its memory.

    Args:
        out: `[B, L, H, D]`. scale, rest: fp32 `[B, nQ, H, 1 or D]`, one for each block of rows.
    """
    plain = is_plain(out, scale, rest)
    whole = out.shape[1] // block
    made = []
    for first, blocks, rows in ((0, whole, block), (whole, 1, out.shape[1] - whole * block)):
        if not blocks * rows:
            continue
        own = out.narrow(1, first * block, blocks * rows).unflatten(1, (blocks, rows))
        of_rows, added = (x.narrow(1, first, blocks)[:, :, None] for x in (scale, rest))
        if plain:
            torch.addcmul(added, own, of_rows, out=own)
        else:
            made.append((own * of_rows + added).to(out.dtype).flatten(1, 2))
    return torch.cat(made, 1) if made else out


def _estimates(
    q: Tensor, k: Tensor, visual: int, scale: float | None, block: int
) -> tuple[Tensor, Tensor]:
    """Returns the shares P `[B, Hq, n, n + 1]`, text last, and which of n x n gain more than err.

    n is the number of blocks before the text.
    """
    video_q, video_k = q[:, :visual], k[:, :visual]
    pooled_q, pooled_k = pool_blocks(video_q, block), pool_blocks(video_k, block)
    blocks = pooled_k.shape[1]
    first = torch.arange(blocks, device=q.device) * block
    sizes = (visual - first).clamp(max=block).float()
    scores = pooled_scores(pooled_q, pooled_k, scale=scale)
    products = scores.abs() if scale is None else pooled_scores(pooled_q, pooled_k).abs()
    alone = pooled_scores(pooled_q, k[:, visual:], scale=scale).logsumexp(-1, keepdim=True)
    shares = torch.cat([scores + sizes.log(), alone], -1).softmax(-1)
    error = pooled_scores(_deviations(video_q, pooled_q, block), pooled_k).abs_()
    error += pooled_scores(pooled_q, _deviations(video_k, pooled_k, block)).abs_()
    return shares, products > error


def _deviations(x: Tensor, means: Tensor, block: int) -> Tensor:
    """Returns the mean of |x - mean| of each block, fp32 like `means`."""
    rows = torch.arange(x.shape[1], device=x.device) // block
    return pool_blocks((x - means.index_select(1, rows)).abs_(), block)
