"""S2-Attention: each head sees a local band and its own share of the other blocks."""

from __future__ import annotations

import torch

from sparse_fmha._checks import check_flag
from sparse_fmha._pattern_checks import check_int
from sparse_fmha.block_mask import BlockMask
from sparse_fmha.patterns._static import pattern_blocks


def s2_attention(
    q_len: int,
    kv_len: int,
    heads: int,
    *,
    local_blocks: int = 16,
    stride: int = 8,
    block: int = 64,
    homo_head: bool = False,
    head_offset: int = 0,
    total_heads: int | None = None,
    block_q: int = 64,
    block_kv: int = 64,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The causal mask of S2-Attention, strided and different for each head.

    Head h sees of query block I the key blocks `J <= I` with

        I - J < local_blocks  or  (J + h * step + 1) mod stride == 0,
        step = max(1, floor(stride / total_heads)),

    so that the heads' shards cover the context together. Source: Lin et al. 2024, "S2-Attention:
    Hardware-Aware Context Sharding Among Attention Heads", arXiv:2407.17678; the formula and the
    defaults (block 64, 16 local blocks, stride 8) as in Phi-3-small.

    Args:
        q_len, kv_len: tokens; query i stands at position `i + kv_len - q_len`.
        heads: query heads here.
        local_blocks: blocks of the band, with the diagonal's; at least 1.
        stride: of every `stride` blocks behind the band a head sees one; at least 1.
        block: tokens of a block of the formula, a multiple of `block_q` and `block_kv`.
        homo_head: h = 0 for all heads; the mask then has one list for all.
        head_offset: index of the first head among all heads: under tensor parallelism h is the
            index in the whole model. With `total_heads`, the heads of the whole model (default:
            `head_offset + heads`).
        block_q, block_kv, device: of the mask.

    Raises:
        ValueError, TypeError: sizes that are not allowed or do not divide each other.
    """
    check_int("heads", heads, 1)
    check_int("local_blocks", local_blocks, 1)
    check_int("stride", stride, 1)
    check_int("block", block, 1)
    check_int("head_offset", head_offset)
    check_flag("homo_head", homo_head)
    if total_heads is None:
        total_heads = head_offset + heads
    check_int("total_heads", total_heads, head_offset + heads)
    rows, columns = pattern_blocks(q_len, kv_len, block, block_q, block_kv, device)
    if homo_head:
        head = torch.zeros(1, dtype=torch.int64, device=device)
    else:
        head = torch.arange(heads, device=device) + head_offset
    step = max(1, stride // total_heads)
    strided = (columns + head[:, None, None] * step + 1) % stride == 0
    blocks = (columns <= rows) & ((rows - columns < local_blocks) | strided)
    sizes = (q_len, kv_len, block_q, block_kv)
    return BlockMask.from_blocks(blocks[None], *sizes, causal=True)
