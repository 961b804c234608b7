"""PowerAttention: blocks at distances that are powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_int, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks.block_checks import check_sizes
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._static import from_pattern


@plain_ints
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
    """Returns the causal mask of PowerAttention, one for all heads.

    Query block I sees the key blocks `J <= I` with

        J < sink_blocks  or  I - J < local_blocks  or  I - J a power of two,

    which is about log2 of the number of blocks; after d layers it reaches 2^d blocks. Source: Chen
    et al. 2025, "PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse
    Attention", arXiv:2503.03588; defaults: blocks of 256, 1 sink block, 5 local blocks.

    Args:
        q_len, kv_len: tokens; query i is at position `i + kv_len - q_len`.
        sink_blocks, local_blocks: at least 0 and 1.
        block: tokens in a block of the formula, a multiple of `block_q` and `block_kv`.
        block_q, block_kv, device: block sizes and device of the mask.

    Raises:
        ValueError, TypeError: a size is not allowed, or `block` is not a multiple of the others.
    """
    check_int("sink_blocks", sink_blocks)
    check_int("local_blocks", local_blocks, 1)
    check_int("block", block, 1)
    check_sizes(q_len, kv_len, block_q, block_kv, True)
    blocks = ceil_div(kv_len, block)
    powers = [1 << n for n in range(blocks.bit_length()) if 1 << n >= local_blocks]
    distances = [*reversed(powers), *range(min(local_blocks, blocks) - 1, -1, -1)]
    back = torch.tensor(distances, dtype=torch.int64, device=device)
    sinks = torch.arange(min(sink_blocks, blocks), device=device)

    def make(rows: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.cat([sinks.expand(len(rows), -1), rows - back], 1)
        seen = torch.cat([sinks <= rows, rows - back >= sink_blocks], 1)
        return columns, seen

    sizes = (q_len, kv_len, block, block_q, block_kv)
    lists = from_pattern(make, 1, len(sinks) + len(back), *sizes, True, device)
    return BlockMask(*lists.of_mask(), q_len, kv_len, block_q, block_kv, causal=True)
