"""S2-Attention: each head sees a local band and a different share of the other blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_flag, check_int, plain_ints
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks.block_checks import check_sizes
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.patterns._static import from_pattern


@plain_ints
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
    """Returns the causal mask of S2-Attention, strided and different for each head.

    In head h, query block I sees the key blocks `J <= I` with

        I - J < local_blocks  or  (J + h * step + 1) mod stride == 0,
        step = max(1, floor(stride / total_heads)),

    so that all heads together cover the context. Source: Lin et al. 2024, "S2-Attention:
    Hardware-Aware Context Sharding Among Attention Heads", arXiv:2407.17678; formula and defaults
    (block 64, 16 local blocks, stride 8) as in Phi-3-small.

    Args:
        q_len, kv_len: tokens; query i is at position `i + kv_len - q_len`.
        heads: query heads of this mask.
        local_blocks: blocks of the band, including the diagonal; at least 1.
        stride: outside the band, a head sees one of every `stride` blocks; at least 1.
        block: tokens in a block of the formula, a multiple of `block_q` and `block_kv`.
        homo_head: use h = 0 for all heads; the mask then has one list for all heads.
        head_offset: index of the first head in the whole model; set it under tensor parallelism,
            together with `total_heads`.
        total_heads: heads of the whole model; default `head_offset + heads`.
        block_q, block_kv, device: block sizes and device of the mask.

    Raises:
        ValueError, TypeError: a size is not allowed, or `block` is not a multiple of the others.
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
    check_sizes(q_len, kv_len, block_q, block_kv, True)
    head = torch.arange(1 if homo_head else heads, device=device)[:, None, None]
    if not homo_head:
        head = head + head_offset
    blocks = ceil_div(kv_len, block)
    # The first block J of each head's share: (J + head * step + 1) mod stride is 0.
    first = (-1 - head * max(1, stride // total_heads)) % stride
    strided = first + torch.arange(0, blocks, stride, device=device)
    back = torch.arange(min(local_blocks, blocks) - 1, -1, -1, device=device)

    def make(rows: Tensor) -> tuple[Tensor, Tensor]:
        near = (rows - back).expand(len(head), -1, -1)
        far = strided.expand(-1, len(rows), -1)
        seen = torch.cat([far <= rows - local_blocks, near >= 0], -1)
        return torch.cat([far, near], -1), seen

    columns = strided.shape[-1] + len(back)
    sizes = (q_len, kv_len, block, block_q, block_kv)
    lists = from_pattern(make, len(head), columns, *sizes, True, device)
    return BlockMask(*lists.of_mask(), q_len, kv_len, block_q, block_kv, causal=True)
