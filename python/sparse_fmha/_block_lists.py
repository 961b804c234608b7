"""Lists of blocks and bitmasks: making them on the device, without asking the host.

Every function has static shapes and no synchronisation unless it says so, so that the way from
scores to a mask can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

ABSENT = -1  # what lists are filled with behind their count


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def list_blocks(blocks: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Ascending lists of the blocks that are set.

    Args:
        blocks: bool `[..., n]`.
        width: capacity of the lists, default n; a row that has more is cut off there.

    Returns:
        counts int32 `[...]` and indices int32 `[..., width]`.
    """
    n = blocks.shape[-1]
    width = n if width is None else min(width, n)
    # In place, as these are the largest tensors on the way. What is not listed goes to a column of
    # its own, which is dropped.
    place = blocks.cumsum(-1, dtype=torch.int32).sub_(1).clamp_(max=width)
    place = place.masked_fill_(~blocks, width).long()
    indices = torch.full(
        (*blocks.shape[:-1], width + 1), ABSENT, dtype=torch.int32, device=blocks.device
    )
    numbers = torch.arange(n, dtype=torch.int32, device=blocks.device).expand(blocks.shape)
    indices.scatter_(-1, place, numbers)
    counts = blocks.sum(-1, dtype=torch.int32).clamp_(max=width)
    return counts, indices[..., :width].contiguous()


def is_listed(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Which slots of the lists hold a block that there is: bool like indices."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return (slots < counts[..., None]) & (indices >= 0) & (indices < blocks)


def scattered(counts: Tensor, indices: Tensor, blocks: int, values: Tensor, empty: int) -> Tensor:
    """`[..., blocks]`: at each listed block its slot's value, elsewhere `empty`."""
    target = torch.where(is_listed(counts, indices, blocks), indices, blocks).long()
    result = torch.full(
        (*indices.shape[:-1], blocks + 1), empty, dtype=values.dtype, device=indices.device
    )
    return result.scatter_(-1, target, values.expand(indices.shape))[..., :blocks]


def block_map(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Bool `[..., blocks]`: which blocks are listed."""
    true = torch.ones((), dtype=torch.bool, device=indices.device)
    return scattered(counts, indices, blocks, true, False)


def slot_map(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """Int64 `[..., blocks]`: the slot that a block is listed in, -1 where it is not."""
    slots = torch.arange(indices.shape[-1], device=indices.device)
    return scattered(counts, indices, blocks, slots, -1)


def pack_bits(visible: Tensor) -> Tensor:
    """Bool `[..., n]`, n a multiple of 8, as uint8 `[..., n / 8]`, the lowest bit first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=visible.device)
    bits = visible.to(torch.uint8).unflatten(-1, (-1, 8)) << shifts
    return bits.sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor) -> Tensor:
    """Inverse of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[..., None] >> shifts & 1).bool().flatten(-2)


def take_slots(bits: Tensor, slots: Tensor) -> Tensor:
    """The bitmasks `[..., width, block_q, bytes]` of some slots `[..., n]`; zeros for slot -1."""
    tail = bits.shape[-2:]
    index = slots.clamp(min=0)[..., None, None].expand(*slots.shape, *tail)
    if bits.shape[-3] == 0:
        return bits.new_zeros(*slots.shape, *tail)
    return bits.gather(-3, index) * (slots >= 0)[..., None, None]


def key_limits(q_len: int, kv_len: int, causal: bool, rows: int, device: torch.device) -> Tensor:
    """Int64 `[rows]`: query i sees no key from there on; 0 for rows that there are not."""
    i = torch.arange(rows, device=device)
    limit = (i + 1 + kv_len - q_len).clamp(0, kv_len) if causal else torch.full_like(i, kv_len)
    return torch.where(i < q_len, limit, 0)


def reachable_blocks(
    q_len: int, kv_len: int, block_q: int, block_kv: int, causal: bool, device: torch.device
) -> Tensor:
    """Bool `[nQ, nK]`: blocks that hold a pair which `causal` allows."""
    last = torch.arange(1, ceil_div(q_len, block_q) + 1, device=device) * block_q
    last = last.clamp(max=q_len) - 1
    first = torch.arange(ceil_div(kv_len, block_kv), device=device) * block_kv
    limit = last + 1 + kv_len - q_len if causal else torch.full_like(last, kv_len)
    return first < limit[:, None]
