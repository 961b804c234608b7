"""Block masks from and to `torch.nn.attention.flex_attention`, and from its mask functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_fmha import _block_checks, _block_lists

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    from sparse_fmha.block_mask import BlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SLICE = 1 << 24  # pairs evaluated at a time


def from_mask_mod(
    cls: type[BlockMask],
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    device: torch.device | str,
) -> BlockMask:
    """See `BlockMask.from_mask_mod`."""
    _block_checks.check_sizes(q_len, kv_len, block_q, block_kv, False)
    rows = _block_lists.ceil_div(q_len, block_q)
    columns = _block_lists.ceil_div(kv_len, block_kv)
    full = torch.zeros(batch, heads, rows, columns, dtype=torch.bool, device=device)
    partial = torch.zeros_like(full)
    step = max(1, SLICE // max(1, batch * heads * block_q * kv_len))
    keys = torch.arange(columns * block_kv, device=device)
    for first in range(0, rows, step):
        block_rows = slice(first, min(first + step, rows))
        queries = torch.arange(first * block_q, block_rows.stop * block_q, device=device)
        seen = evaluate(mask_mod, batch, heads, queries, keys, q_len, kv_len)
        there = (queries < q_len)[:, None] & (keys < kv_len)
        blocked = (2, (-1, block_q)), (4, (-1, block_kv))

        def in_blocks(pairs: Tensor, blocked=blocked) -> Tensor:
            for axis, parts in blocked:
                pairs = pairs.unflatten(axis, parts)
            return pairs.transpose(3, 4).flatten(4)

        full[:, :, block_rows] = in_blocks(seen | ~there).all(-1)
        partial[:, :, block_rows] = in_blocks(seen).any(-1)
    partial &= ~full
    width = int(partial.sum(-1).max()) if partial.numel() else 0
    counts, indices = _block_lists.list_blocks(partial, width)
    bits = block_bits(mask_mod, counts, indices, q_len, kv_len, block_q, block_kv)
    return cls(
        *_block_lists.list_blocks(full),
        q_len,
        kv_len,
        block_q,
        block_kv,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=bits,
    )


def evaluate(
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    queries: Tensor,
    keys: Tensor,
    q_len: int,
    kv_len: int,
) -> Tensor:
    """Bool `[batch, heads, queries, keys]`; False where a token is not there."""
    device = queries.device
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[:, None, None]
    q, k = queries[:, None].clamp(max=max(q_len - 1, 0)), keys.clamp(max=max(kv_len - 1, 0))
    seen = mask_mod(b, h, q, k).expand(batch, heads, len(queries), len(keys))
    return seen & (queries < q_len)[:, None] & (keys < kv_len)


def block_bits(
    mask_mod: MaskMod,
    counts: Tensor,
    indices: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
) -> Tensor:
    """The bitmasks uint8 `[B, H, nQ, width, block_q, block_kv / 8]` of listed blocks."""
    batch, heads, rows, width = indices.shape
    device = indices.device
    b = torch.arange(batch, device=device)[:, None, None, None, None]
    h = torch.arange(heads, device=device)[:, None, None, None]
    q = torch.arange(rows * block_q, device=device).view(rows, block_q, 1)
    bits = torch.zeros(*indices.shape, block_q, block_kv // 8, dtype=torch.uint8, device=device)
    listed = _block_lists.is_listed(counts, indices, _block_lists.ceil_div(kv_len, block_kv))
    for slot in range(width):
        first = indices[..., slot].long().clamp(min=0)[..., None, None] * block_kv
        k = first + torch.arange(block_kv, device=device)
        seen = mask_mod(b, h, q.clamp(max=max(q_len - 1, 0)), k.clamp(max=max(kv_len - 1, 0)))
        seen = seen & (q < q_len) & (k < kv_len) & listed[..., slot, None, None]
        whole = seen.expand(batch, heads, rows, block_q, block_kv)
        bits[:, :, :, slot] = _block_lists.pack_bits(whole)
    return bits


def from_flex(cls: type[BlockMask], mask: FlexBlockMask) -> BlockMask:
    """See `BlockMask.from_flex`."""
    block_q, block_kv = mask.BLOCK_SIZE
    q_len, kv_len = mask.seq_lengths
    if block_q not in _block_checks.BLOCKS_Q or block_kv not in _block_checks.BLOCKS_KV:
        raise ValueError(
            f"the FlexAttention mask has BLOCK_SIZE {(block_q, block_kv)}; queries in blocks of "
            f"{' or '.join(map(str, _block_checks.BLOCKS_Q))} and keys in blocks of "
            f"{', '.join(map(str, _block_checks.BLOCKS_KV))} are needed"
        )
    sizes = (q_len, kv_len, block_q, block_kv)
    blocks_kv = _block_lists.ceil_div(kv_len, block_kv)
    partial = _block_lists.block_map(mask.kv_num_blocks, mask.kv_indices, blocks_kv)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
        full = _block_lists.block_map(mask.full_kv_num_blocks, mask.full_kv_indices, blocks_kv)
    width = int(partial.sum(-1).max()) if partial.numel() else 0
    counts, indices = _block_lists.list_blocks(partial, width)
    return cls(
        *_block_lists.list_blocks(full),
        *sizes,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=block_bits(mask.mask_mod, counts, indices, *sizes),
    )


def to_flex(mask: BlockMask) -> FlexBlockMask:
    """See `BlockMask.to_flex`."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    blocks_kv = mask.blocks_kv
    full = _block_lists.block_map(mask.counts, mask.indices, blocks_kv)
    partial = torch.zeros_like(full)
    slots = torch.full(full.shape, -1, device=full.device)
    bits = torch.zeros(
        *full.shape[:3], 1, mask.block_q, mask.block_kv // 8, dtype=torch.uint8, device=full.device
    )
    if mask.partial_counts is not None and mask.partial_indices.shape[-1]:
        partial = _block_lists.block_map(mask.partial_counts, mask.partial_indices, blocks_kv)
        slots = _block_lists.slot_map(mask.partial_counts, mask.partial_indices, blocks_kv)
        bits = mask.partial_bits
    batch, heads = full.shape[:2]
    offset = mask.kv_len - mask.q_len

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = b % batch, h % heads, q // mask.block_q
        block = k // mask.block_kv
        slot = slots[(*row, block)]
        column = k % mask.block_kv
        byte = bits[(*row, slot.clamp(min=0), q % mask.block_q, column // 8)].int()
        seen = full[(*row, block)] | ((slot >= 0) & ((byte >> column % 8) & 1).bool())
        return seen & (k <= q + offset) if mask.causal else seen

    # The diagonal may cut any full block: FlexAttention then has to ask for each pair.
    asked = full | partial if mask.causal else partial
    lists = [_block_lists.list_blocks(asked)]
    if not mask.causal:
        lists.append(_block_lists.list_blocks(full))
    # It wants indices of blocks that there are behind the counts, too.
    lists = [tensor for counts, indices in lists for tensor in (counts, indices.clamp(min=0))]
    return FlexBlockMask.from_kv_blocks(
        *lists,
        BLOCK_SIZE=(mask.block_q, mask.block_kv),
        mask_mod=mask_mod,
        seq_lengths=(mask.q_len, mask.kv_len),
    )
