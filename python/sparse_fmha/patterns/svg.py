"""Sparse VideoGen: each head looks within frames, or at the same place of all frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import check_int, check_number, plain_ints
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import SLICE
from sparse_fmha.attention import block_sparse_attention
from sparse_fmha.masks.block_grid import BlockGrid
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.operands import check_block_mask


@plain_ints
def svg_mask(
    frames: int,
    frame_tokens: int,
    *,
    text: int = 0,
    keep: float = 0.25,
    first_frame: bool = False,
    block: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Returns the mask of Sparse VideoGen, which serves both kinds of heads.

    Query block I sees key block J iff `|I - J| < floor(w / block)`, with the w that makes the band
    and the text cover the share `keep` of all pairs of L tokens:

        w = L * (1 - sqrt(1 - keep + 2 * text / L))

    Spatial heads have tokens frame by frame, so the band is some frames; temporal heads have them
    place by place (all frames of the first place, then of the second, ...), so the band is the same
    places in all frames. Text comes after the video, sees all and is seen by all, in whole
    blocks.

    Source: Xi et al. 2025, "Sparse VideoGen: Accelerating Video Diffusion Transformers with
    Spatial-Temporal Sparsity", arXiv:2502.01776, and its code: blocks of 128, a quarter of the
    pairs; the first 30% of steps and 3% of layers are dense. `first_frame` is from the code's masks
    for Wan.

    Args:
        frames, frame_tokens: at least 1. text: tokens after them, at least 0.
        keep: share of the pairs; more than the text needs, at most 1.
        first_frame: whether all see the first `frame_tokens` tokens in the order of the head; in
            spatial heads that is the first frame.
        block: size of query and key blocks, 64 or 128.
        device: device of the mask.

    Returns:
        A mask of whole blocks, one for all batch entries and heads. Make it once for each length.

    Raises:
        ValueError, TypeError: an argument is not allowed, or the band has no block.
    """
    for name, number in (("frames", frames), ("frame_tokens", frame_tokens)):
        check_int(name, number, 1)
    check_int("text", text)
    check_number("keep", keep, 0, 1)
    _checks.check_flag("first_frame", first_frame)
    length = frames * frame_tokens + text
    grid = BlockGrid(length, length, block, block, device=device)
    band = keep - 2 * text / length
    width = length * (1 - math.sqrt(1 - band)) if band > 0 else 0.0
    reach = int(width) // block
    if not reach:
        raise ValueError(
            f"keep must leave a band of at least a block of {block} tokens beside {text} of text, "
            f"got {keep}, which leaves {width:.0f}"
        )
    blocks = grid.local((reach - 2) * block + 2 if reach > 1 else 1)
    if text:
        blocks |= grid.tokens(-text)
    if first_frame:
        blocks |= grid.keys(0, frame_tokens)
    return grid.mask(blocks)


@plain_ints
def svg_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    frames: int,
    frame_tokens: int,
    *,
    rows: int = 64,
    scale: float | None = None,
) -> Tensor:
    """Returns which heads are temporal, bool `[B, Hkv]`.

    For `rows` queries of the video, evenly spaced, the output of dense attention is compared with
    that under the mask in both orders; a head is temporal if the mean square of the difference is
    smaller there. Query heads of one key head are chosen together.

    Source: see `svg_mask`. The code draws the queries at random, among the first 10000.

    Args:
        q: `[B, L, Hq, D]`, frame by frame, then text. k, v: `[B, L, Hkv, D]`.
        mask: from `svg_mask`, with one list for all heads, on q's device.
        frames, frame_tokens: as in `svg_mask`.
        rows: at least 1.
        scale: default `D**-0.5`.

    Computed without waiting for the device, a few queries at a time.

    Raises:
        ValueError, TypeError: tensors or mask do not fit, or a number is not allowed.
    """
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    _check(q, k, mask, frames, frame_tokens)
    video, length = frames * frame_tokens, q.shape[1]
    rows = min(check_int("rows", rows, 1), video)
    sample = (2 * torch.arange(rows, device=q.device) + 1) * video // (2 * rows)
    moved = _places(frames, frame_tokens, length, q.device)
    blocks = mask.blocks()[0, 0]
    group = q.shape[2] // k.shape[2]
    errors = torch.zeros(2, q.shape[0], k.shape[2], dtype=torch.float32, device=q.device)
    with torch.no_grad(), without_autocast(q.device):
        keys, values = k.permute(0, 2, 3, 1)[:, :, None], v.transpose(1, 2)[:, :, None]
        scale = q.shape[3] ** -0.5 if scale is None else scale

        def outputs(scores: Tensor) -> Tensor:
            return (scores.softmax(-1).to(v.dtype) @ values).float()

        step = max(1, SLICE // max(1, q.shape[0] * q.shape[2] * length))
        for some in sample.split(step):
            queries = q.index_select(1, some).unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)
            scores = (queries @ keys).float() * scale  # [B, Hkv, group, queries, keys]
            dense = outputs(scores)
            for n, at in enumerate((torch.arange(length, device=q.device), moved)):
                own = blocks[at[some] // mask.block_q][:, at // mask.block_kv]
                sparse = outputs(scores.masked_fill(~own, -torch.inf))
                errors[n] += (sparse - dense).square().sum((2, 3, 4))
    return errors[1] < errors[0]


@plain_ints
def svg_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    frames: int,
    frame_tokens: int,
    temporal: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention by Sparse VideoGen: spatial and temporal heads in one call.

        mask = svg_mask(33, 3600, text=256, device=q.device)
        out = svg_attention(q, k, v, mask, 33, 3600)

    Tokens of temporal heads are brought into the order of places, and the output back; this copies
    q, k, v and out. Source: see `svg_mask`.

    Args:
        q, k, v, mask, frames, frame_tokens, scale: as in `svg_heads`.
        temporal: bool `[B|1, Hkv]`, as from `svg_heads`; None: from `svg_heads` with its defaults.

    Returns:
        `[B, L, Hq, D]`, without waiting for the device; differentiable in q, k and v.

    Raises:
        ValueError, TypeError: as in `svg_heads`; `temporal` does not fit.
    """
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    _check(q, k, mask, frames, frame_tokens)
    if temporal is None:
        temporal = svg_heads(q, k, v, mask, frames, frame_tokens, scale=scale)
    if not isinstance(temporal, Tensor) or temporal.dtype != torch.bool:
        found = getattr(temporal, "dtype", type(temporal))
        raise TypeError(f"temporal must be a bool tensor, got {found}")
    heads = k.shape[2]
    if (
        temporal.dim() != 2
        or temporal.shape[0] not in (1, q.shape[0])
        or temporal.shape[1] != heads
    ):
        raise ValueError(
            f"temporal must have shape [{q.shape[0]} or 1, {heads}], got {list(temporal.shape)}"
        )
    place = _places(frames, frame_tokens, q.shape[1], q.device)
    source = place.argsort()
    of_q = temporal.repeat_interleave(q.shape[2] // heads, 1)[:, None, :, None]
    of_k = temporal[:, None, :, None]
    moved_q = torch.where(of_q, q.index_select(1, source), q)
    moved_k, moved_v = (torch.where(of_k, x.index_select(1, source), x) for x in (k, v))
    out = block_sparse_attention(moved_q, moved_k, moved_v, mask, scale=scale)
    return torch.where(of_q, out.index_select(1, place), out)


def _places(frames: int, frame_tokens: int, length: int, device: torch.device) -> Tensor:
    """Returns where each token is in the order of places, int64 `[length]`."""
    token = torch.arange(length, device=device)
    place = token % frame_tokens * frames + token // frame_tokens
    return torch.where(token < frames * frame_tokens, place, token)


def _check(q: Tensor, k: Tensor, mask: BlockMask, frames: int, frame_tokens: int) -> None:
    check_block_mask(mask, q, k)
    if mask.counts.shape[:2] != (1, 1) or mask.partial_counts is not None:
        raise ValueError(
            "mask must be one of svg_mask, with one list for all heads and no partial blocks, got "
            f"counts of shape {list(mask.counts.shape)}"
            f"{'' if mask.partial_counts is None else ' and partial blocks'}"
        )
    video = check_int("frames", frames, 1) * check_int("frame_tokens", frame_tokens, 1)
    if video > q.shape[1]:
        raise ValueError(
            f"frames * frame_tokens must be at most the {q.shape[1]} tokens of q, got {frames} * "
            f"{frame_tokens}"
        )
