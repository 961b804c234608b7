"""PowerAttention: blocks at distances that are powers of two."""

from __future__ import annotations

import torch

from sparse_fmha._pattern_checks import check_int
from sparse_fmha.block_mask import BlockMask
from sparse_fmha.patterns._static import pattern_blocks


def power_attention(
    q_len: int,
    kv_len: int,
    *,
    sink_blocks: int = 1,
    local_blocks: int = 5,
    block: int = 256,
    block_q: int = 128,
    block_kv: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The causal mask of PowerAttention, one for all heads.

    Query block I sees the key blocks `J <= I` with

        J < sink_blocks  or  I - J < local_blocks  or  I - J a power of two,

    about log2 of the number of blocks, and after d layers 2^d blocks. Source: Chen et al. 2025,
    "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    arXiv:2503.03588; defaults: blocks of 256, 1 sink block, 5 local blocks.

    Args:
        q_len, kv_len: tokens; query i stands at position `i + kv_len - q_len`.
        sink_blocks, local_blocks: at least 0 and 1.
        block: tokens of a block of the formula, a multiple of `block_q` and `block_kv`.
        block_q, block_kv, device: of the mask.

    Raises:
        ValueError, TypeError: sizes that are not allowed or do not divide each other.
    """
    check_int("sink_blocks", sink_blocks)
    check_int("local_blocks", local_blocks, 1)
    check_int("block", block, 1)
    rows, columns = pattern_blocks(q_len, kv_len, block, block_q, block_kv, device)
    distance = rows - columns
    power = (distance > 0) & (distance & (distance - 1) == 0)
    seen = (columns < sink_blocks) | (distance < local_blocks) | power
    blocks = (distance >= 0) & seen
    sizes = (q_len, kv_len, block_q, block_kv)
    return BlockMask.from_blocks(blocks[None, None], *sizes, causal=True)
