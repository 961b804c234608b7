"""Block masks from and to masks of tokens, and how many pairs they show."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _block_checks, _block_lists
from sparse_fmha.block_mask import BlockMask


def from_dense(
    visible: Tensor, block_q: int, block_kv: int, partial_width: int | None
) -> BlockMask:
    """See `BlockMask.from_dense`."""
    _block_checks.check_dense(visible)
    q_len, kv_len = visible.shape[2:]
    _block_checks.check_sizes(q_len, kv_len, block_q, block_kv, False)
    _block_checks.check_width("partial_width", partial_width)
    pad = (0, -kv_len % block_kv, 0, -q_len % block_q)

    def in_blocks(value: bool) -> Tensor:
        padded = torch.nn.functional.pad(visible, pad, value=value)
        parts = padded.unflatten(3, (-1, block_kv)).unflatten(2, (-1, block_q))
        return parts.transpose(3, 4)  # [B|1, H|1, nQ, nK, block_q, block_kv]

    seen = in_blocks(False)
    full = in_blocks(True).all(-1).all(-1)
    partial = seen.any(-1).any(-1) & ~full
    if partial_width is None:
        partial_width = int(partial.sum(-1).max()) if partial.numel() else 0
    partial_counts, partial_indices = _block_lists.list_blocks(partial, partial_width)
    slots = partial_indices.clamp(min=0).long()[..., None, None]
    masks = seen.gather(3, slots.expand(*slots.shape[:4], block_q, block_kv))
    return BlockMask(
        *_block_lists.list_blocks(full),
        q_len,
        kv_len,
        block_q,
        block_kv,
        partial_counts=partial_counts,
        partial_indices=partial_indices,
        partial_bits=_block_lists.pack_bits(masks),
    )


def to_dense(mask: BlockMask) -> Tensor:
    """See `BlockMask.to_dense`."""
    full = _block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    lead = full.shape[:3]
    dense = full[:, :, :, None, :, None].repeat(1, 1, 1, mask.block_q, 1, mask.block_kv)
    if mask.partial_counts is not None:
        slots = _block_lists.slot_map(mask.partial_counts, mask.partial_indices, mask.blocks_kv)
        for n in range(mask.blocks_kv):
            bits = _block_lists.take_slots(mask.partial_bits, slots[..., n : n + 1])
            masks = _block_lists.unpack_bits(bits)
            dense[:, :, :, :, n] |= masks.view(*lead, mask.block_q, mask.block_kv)
    dense = dense.flatten(4).flatten(2, 3)[:, :, : mask.q_len, : mask.kv_len]
    if mask.causal:
        limit = _limits(mask)[: mask.q_len]
        dense = dense & (torch.arange(mask.kv_len, device=mask.device) < limit[:, None])
    return dense.contiguous()


def visible_pairs(mask: BlockMask) -> int:
    """See `BlockMask.visible_pairs`."""
    limits = _limits(mask).view(-1, mask.block_q)
    first = torch.arange(mask.blocks_kv, device=mask.device) * mask.block_kv
    of_block = torch.zeros(mask.blocks_q, mask.blocks_kv, dtype=torch.int64, device=mask.device)
    for limit in limits.T:  # of each query block the same row
        of_block += (limit[:, None] - first).clamp(0, mask.block_kv)
    full = _block_lists.block_map(mask.counts, mask.indices, mask.blocks_kv)
    pairs = (full.sum((0, 1)) * of_block).sum()
    if mask.partial_counts is not None:
        pairs += _pairs_of_bits(mask, limits)
    return int(pairs)


def _pairs_of_bits(mask: BlockMask, limits: Tensor) -> Tensor:
    """The pairs of the partial blocks; byte by byte, one slot of all lists at a time."""
    listed = _block_lists.is_listed(mask.partial_counts, mask.partial_indices, mask.blocks_kv)
    columns = torch.arange(0, mask.block_kv, 8, dtype=torch.int32, device=mask.device)
    limits = limits.int()[..., None]
    pairs = torch.zeros((), dtype=torch.int64, device=mask.device)
    for slot in range(mask.partial_indices.shape[-1]):
        here = listed[..., slot]
        # What is behind the count may be any number: held down, or its first key would overflow.
        block = torch.where(here, mask.partial_indices[..., slot], 0)
        first = block[..., None, None] * mask.block_kv + columns
        keys = (limits - first).clamp_(0, 8)  # of each byte, the bits that are keys to be seen
        bytes_seen = mask.partial_bits[..., slot, :, :] & ((1 << keys) - 1).to(torch.uint8)
        seen = _bits_set(bytes_seen).sum((-2, -1), dtype=torch.int64)
        pairs += (seen * here).sum()
    return pairs


def _bits_set(x: Tensor) -> Tensor:
    """How many bits of each byte are set."""
    x = x - ((x >> 1) & 0x55)
    x = (x & 0x33) + ((x >> 2) & 0x33)
    return (x + (x >> 4)) & 0x0F


def _limits(mask: BlockMask) -> Tensor:
    """Int64 `[nQ * block_q]`: query i sees no key from there on."""
    rows = mask.blocks_q * mask.block_q
    return _block_lists.key_limits(mask.q_len, mask.kv_len, mask.causal, rows, mask.device)
