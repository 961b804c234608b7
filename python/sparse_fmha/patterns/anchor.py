"""AnchorAttention: exact attention around each query, and the distant keys that can matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_fmha import _block_lists, _checks
from sparse_fmha.attention import attention, block_sparse_attention, stripe_attention
from sparse_fmha.block_mask import BlockMask
from sparse_fmha.merge import merge
from sparse_fmha.stripe_mask import StripeMask

BLOCKS = (64, 128)


@dataclass(frozen=True)
class AnchorResult:
    """What `anchor_attention` computed besides its output."""

    out: Tensor  # [B, L, Hq, D]
    lse: Tensor  # [B, L, Hq] fp32, natural log, over the keys that were computed
    kept: Tensor  # int32 [B, Hq, superblocks]: distant keys of each superblock
    recall: Tensor | None  # [B, L, Hq]: the share of the full softmax's weight on computed keys


def anchor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    theta: float = 12.0,
    step: int = 16,
    block: int = 128,
    width: int | None = None,
    scale: float | None = None,
    recall: bool = False,
) -> AnchorResult:
    """Causal attention by AnchorAttention (Zhang et al. 2025, arXiv:2505.23520).

    Queries are in blocks, and `step` blocks are a superblock. 1. Every query attends exactly to its
    anchor keys: the first block, the block before its superblock, and its superblock up to itself;
    the largest score there is the query's anchor. 2. A key n between these is kept for superblock u
    iff for one of its blocks `scale * mean(q) . k_n + theta >= mean(anchor)`, the means being over
    the queries of the block. 3. Every query attends to the kept keys of its superblock. 1 and 3 are
    put together by their log-sum-exps, exactly, and no key is in both. Scores are in natural-log
    units.

    Args:
        q: `[B, L, Hq, D]`. k, v: `[B, L, Hkv, D]`, Hq a multiple of Hkv; dtypes and strides as
            `attention`. L need not be a multiple of anything.
        theta: how far below the anchor a score may be; larger keeps more. Published: 12, from 9 to
            17.
        step: blocks of a superblock; `step * block` is at most 2048.
        block: 64 or 128 queries.
        width: capacity of the lists of kept keys; a superblock with more loses its last ones. By
            default as many as the fullest has, which waits for the device.
        scale: of q.k; default `D**-0.5`.
        recall: also compute full attention, to tell how much of its weight was kept.

    Returns:
        out, lse and statistics, as `AnchorResult`.

    Besides the outputs it takes 4 bytes for each superblock, head and list entry: at 128k tokens,
    superblocks of 2048 and 4096 kept keys 1 MiB a head, 1.6% of that head's keys and values in
    bf16 at D = 128. Finding the keys takes one bit a key and superblock as a byte.

    Raises:
        ValueError: lengths of q and k differ, a number out of range; else as `attention`.
        TypeError: as `attention`.
    """
    _checks.check_qkv(q, k, v, axes=(1,))
    length = q.shape[1]
    if k.shape[1] != length:
        raise ValueError(f"q has {length} tokens, k has {k.shape[1]}; they must be the same")
    if block not in BLOCKS:
        raise ValueError(f"block is {block}; allowed are: {', '.join(map(str, BLOCKS))}")
    if not 1 <= step <= 2048 // block:
        raise ValueError(f"step is {step}; 1 to {2048 // block} blocks of {block} are allowed")
    theta = _checks.finite("theta", theta)
    scale = _checks.finite("scale", scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    near = BlockMask.from_blocks(
        anchor_blocks(length, block, step, q.device), length, length, block, block, causal=True
    )
    parts = [block_sparse_attention(q, k, v, near, scale=scale, return_lse=True)]
    seen = distant_keys(q, k, theta, step, block, scale)
    if width is None:
        width = int(seen.sum(-1).max()) if seen.numel() else 0
    far = StripeMask.from_columns(seen, length, step * block, width=width)
    parts.append(stripe_attention(q, k, v, far, scale=scale, return_lse=True))
    out, lse = merge(*zip(*parts, strict=True))
    share = None
    if recall:
        _, full = attention(q, k, v, causal=True, scale=scale, return_lse=True)
        share = (lse - full).exp()
    return AnchorResult(out, lse, far.counts, share)


def anchor_blocks(length: int, block: int, step: int, device: torch.device) -> Tensor:
    """Bool `[1, 1, n, n]`: the anchor keys of each query block."""
    n = _block_lists.ceil_div(length, block)
    rows = torch.arange(n, device=device)[:, None]
    columns = torch.arange(n, device=device)
    first = rows // step * step  # block of the superblock
    near = (columns == 0) | (columns == first - 1) | (columns >= first)
    return (near & (columns <= rows))[None, None]


def distant_keys(q: Tensor, k: Tensor, theta: float, step: int, block: int, scale: float) -> Tensor:
    """Bool `[B, Hq, superblocks, L]`: the keys that are kept.

    Scores are held for one superblock at a time: `step * L` of mean queries, and those of one block
    with its anchor keys.
    """
    length, heads_kv = q.shape[1], k.shape[2]
    size = step * block
    count = _block_lists.ceil_div(length, size)
    seen = torch.zeros((q.shape[0], q.shape[2], count, length), dtype=torch.bool, device=q.device)
    keys = k.permute(0, 2, 3, 1).float()  # [B, Hkv, D, L]
    for u in range(1, count):
        first, last = u * size, min((u + 1) * size, length)
        candidates = slice(block, first - block)
        if candidates.start >= candidates.stop:
            continue
        means, anchors = [], []
        for start in range(first, last, block):
            rows = q[:, start : min(start + block, last)].float().unflatten(2, (heads_kv, -1))
            rows = rows.permute(0, 2, 3, 1, 4)  # [B, Hkv, group, rows, D]
            means.append(rows.mean(3))
            anchors.append(_anchors(rows, keys, start, first, block, scale).mean(3))
        mean, anchor = torch.stack(means, 3), torch.stack(anchors, 3)
        scores = mean @ keys[:, :, None, :, candidates] * scale
        kept = (scores + theta >= anchor[..., None]).any(3)
        seen[:, :, u, candidates] = kept.flatten(1, 2)
    return seen


def _anchors(
    rows: Tensor, keys: Tensor, start: int, first: int, block: int, scale: float
) -> Tensor:
    """The largest score of each row with its anchor keys; rows `[B, Hkv, group, n, D]`."""
    n = rows.shape[3]
    positions = [
        torch.arange(block, device=rows.device),
        torch.arange(first - block, first, device=rows.device),
        torch.arange(first, start + n, device=rows.device),
    ]
    if first == block:  # the block before the superblock is the first one
        positions.pop(1)
    position = torch.cat(positions)
    scores = rows @ keys[:, :, None, :, position] * scale
    query = torch.arange(start, start + n, device=rows.device)[:, None]
    return scores.masked_fill(position > query, -torch.inf).amax(-1)
