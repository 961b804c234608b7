"""AnchorAttention: exact attention near each query, and selected distant keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._checks import LARGEST_FLOAT, check_int, check_number, plain_ints
from sparse_fmha._ops import anchor, anchor_words
from sparse_fmha._ops.autocast import without_autocast
from sparse_fmha._sizes import ceil_div
from sparse_fmha.attention import attention, block_sparse_attention, stripe_attention
from sparse_fmha.masks import block_lists, tensor_fields
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask
from sparse_fmha.masks.tensor_fields import TensorFields
from sparse_fmha.merge import merge
from sparse_fmha.selection import pool_blocks

BLOCKS = (64, 128)


@dataclass(frozen=True)
class AnchorResult(TensorFields):
    """Output and statistics of `anchor_attention`."""

    TENSORS: ClassVar = ("out", "lse", "kept", "recall")

    out: Tensor  # [B, L, Hq, D]
    lse: Tensor  # [B, L, Hq] fp32, natural log, over the visited keys
    kept: Tensor  # int32 [B, Hq, superblocks]: distant keys of each superblock
    recall: Tensor | None  # [B, L, Hq]: the share of the full softmax on the visited keys


tensor_fields.register(AnchorResult, "sparse_fmha.patterns.AnchorResult")


@plain_ints
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

    Queries are divided into blocks; `step` blocks are a superblock. 1. Every query attends to its
    anchor keys: the first block, the block before its superblock, and its superblock up to itself.
    The largest score there is the query's anchor. 2. Superblock u keeps a key n between these iff
    `scale * mean(q) . k_n + theta >= mean(anchor)` for one of its blocks, with means over the
    queries of the block. 3. Every query attends to the kept keys of its superblock. The results of
    1 and 3 are merged exactly by their log-sum-exps; no key is in both. Scores are in natural-log
    units.

    Args:
        q: `[B, L, Hq, D]`. k, v: `[B, L, Hkv, D]`, Hq a multiple of Hkv; dtypes and strides as
            in `attention`. L may be any length.
        theta: how far below the anchor a score may be; a larger theta keeps more keys. Published:
            12, from 9 to 17.
        step: blocks per superblock; `step * block` is at most 2048.
        block: queries per block, 64 or 128.
        width: capacity of the lists of kept keys; a superblock with more loses its last ones.
            Default: the longest list, which waits for the device.
        scale: scale of q.k; default `D**-0.5`.
        recall: also compute full attention, to measure the share of its weight that was kept.

    Returns:
        out, lse and statistics, as `AnchorResult`.

    Besides the outputs of both parts, lists take 4 bytes per superblock, head and entry. With
    superblocks of 2048, four query heads per key head, bf16 and D = 128, lists of 1310 keys are 2%
    of K and V at any length. Selection stores no scores. It stores the mean of each block's queries
    in fp32 (1.6% of q for blocks of 128) and one bit per superblock, head and token (3% of q at
    128k tokens, growing with the length).

    Raises:
        ValueError: lengths of q and k differ, a number is out of range, or as in `attention`.
        TypeError: as in `attention`.
    """
    _checks.check_qkv_of_one_dim(q, k, v, axes=(1,))
    length = q.shape[1]
    if k.shape[1] != length:
        raise ValueError(f"k must have the {length} tokens of q, got {k.shape[1]}")
    check_int("step", step)
    if check_int("block", block) not in BLOCKS:
        raise ValueError(f"block must be {_checks.one_of(BLOCKS)}, got {block}")
    if not 1 <= step <= 2048 // block:
        raise ValueError(f"step must be from 1 to {2048 // block} blocks of {block}, got {step}")
    if width is not None:
        width = check_int("width", width)
    theta = check_number("theta", theta, -LARGEST_FLOAT, LARGEST_FLOAT)
    scale = _checks.finite("scale", scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    near = anchor_mask(length, block, step, q.device)
    near_out, near_lse = block_sparse_attention(q, k, v, near, scale=scale, return_lse=True)
    columns, counts = distant_keys(q, k, theta, step, block, scale, width)
    far = StripeMask(columns, counts, length, length, step * block)
    far_out, far_lse = stripe_attention(q, k, v, far, scale=scale, return_lse=True)
    out, lse = merge((near_out, far_out), (near_lse, far_lse))
    share = None
    if recall:
        _, full = attention(q, k, v, causal=True, scale=scale, return_lse=True)
        share = (lse - full).exp()
    return AnchorResult(out, lse, far.counts, share)


def anchor_mask(length: int, block: int, step: int, device: torch.device) -> BlockMask:
    """Returns the mask of each query block's anchor keys, at most `step + 2` blocks."""
    n = ceil_div(length, block)
    rows = torch.arange(n, device=device)[:, None]
    begin = torch.arange(-1, step, device=device)  # starts at the block before the superblock

    def make(part: slice) -> tuple[Tensor, Tensor]:
        near = rows[part] // step * step + begin
        first = torch.zeros_like(near[:, :1])
        seen = torch.cat([first == 0, (near > 0) & (near <= rows[part])], 1)
        return torch.cat([first, near], 1), seen

    width = min(step + 2, n)
    counts, indices = block_lists.build_lists(make, 1, n, step + 2, width, rows.device)
    return BlockMask(counts[None], indices[None], length, length, block, block, causal=True)


def distant_keys(
    q: Tensor, k: Tensor, theta: float, step: int, block: int, scale: float, width: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the kept keys: int32 columns `[B, Hq, superblocks, width]` and their counts.

    Columns ascend, with -1 past the count. Without `width`, waits for the device once.
    """
    blocks = ceil_div(q.shape[1], block)
    candidates = 32 * anchor_words(blocks, block, step)  # of the last superblock
    if not candidates or not q.numel():
        shape = (q.shape[0], q.shape[2], ceil_div(blocks, step))
        counts = torch.zeros(shape, dtype=torch.int32, device=q.device)
        return counts.new_empty(*shape, 0), counts
    q, k = q.detach(), k.detach()  # selection has no derivative, not in forward mode either
    with without_autocast(q.device):
        mean = pool_blocks(q, block).mul_(scale).transpose(1, 2)
        least = anchor.means(q, k, block, step, scale).sub_(theta)
        bits, counts = anchor.keys(mean, k, least, block, step)
        room = int(counts.max()) if width is None else min(width, candidates)
        return anchor.columns(bits, block, room)
