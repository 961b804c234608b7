"""Conversion from and to masks of `torch.nn.attention.flex_attention`, and from `mask_mod`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.parts import BlockParts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SLICE = 1 << 19  # pairs evaluated at a time on the CPU; at least one block


def from_mask_mod(
    mask_mod: MaskMod,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    device: torch.device | str,
) -> BlockParts:
    """See `BlockMask.from_mask_mod`."""
    block_checks.check_sizes(q_len, kv_len, block_q, block_kv, False)
    for name, value in (("batch", batch), ("heads", heads)):
        block_checks.check_count(name, value)
    if not callable(mask_mod):
        raise TypeError(f"mask_mod must be a function of (b, h, q, kv), got {mask_mod!r}")
    sizes = (q_len, kv_len, block_q, block_kv)
    rows = ceil_div(q_len, block_q)
    columns = ceil_div(kv_len, block_kv)
    full = torch.zeros(batch, heads, rows, columns, dtype=torch.bool, device=device)
    partial = torch.zeros_like(full)
    keys = torch.arange(columns * block_kv, device=device)
    one_list = block_q * block_kv * columns
    at_once = max(1, chunk_pairs(full.device) // (block_q * block_kv))  # key blocks
    for some in block_lists.chunks(batch * heads * rows, one_list, full.device, SLICE):
        lists = torch.arange(some.start, some.stop, device=device)
        for first in range(0, columns, at_once):
            part = slice(first, min(first + at_once, columns))
            own = keys[part.start * block_kv : part.stop * block_kv]
            seen, _ = pairs(mask_mod, lists, own, heads, rows, *sizes)
            kinds = block_lists.kinds(seen, block_kv)
            full.view(-1, columns)[some, part], partial.view(-1, columns)[some, part] = kinds
    partial &= ~full
    full_width, width = (int(x.sum(-1).max()) if x.numel() else 0 for x in (full, partial))
    counts, indices = block_lists.list_blocks(partial, width)
    return BlockParts(
        *block_lists.list_blocks(full, full_width),
        *sizes,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=block_bits(mask_mod, counts, indices, *sizes),
    )


def chunk_pairs(device: torch.device) -> int:
    """Returns how many pairs are evaluated at a time."""
    return SLICE if device.type == "cpu" else 1 << 24


def block_bits(
    mask_mod: MaskMod,
    counts: Tensor,
    indices: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
) -> Tensor:
    """Returns bitmasks uint8 `[B, H, nQ, width, block_q, block_kv / 8]` of listed blocks.

    Waits for the device: most lists are shorter than the longest, and only listed blocks are
    evaluated.
    """
    _, heads, rows, width = indices.shape
    device = indices.device
    bits = torch.zeros(*indices.shape, block_q, block_kv // 8, dtype=torch.uint8, device=device)
    listed = block_lists.is_listed(counts, indices, ceil_div(kv_len, block_kv))
    slots = listed.flatten().nonzero()[:, 0]
    columns = torch.arange(block_kv, device=device)
    step = max(1, chunk_pairs(device) // (block_q * block_kv))
    for first in range(0, len(slots), step):
        some = slots[first : first + step]
        keys = indices.flatten()[some, None].long() * block_kv + columns
        sizes = (q_len, kv_len, block_q, block_kv)
        seen, there = pairs(mask_mod, some // width, keys, heads, rows, *sizes)
        seen = seen & there
        bits.view(-1, block_q, block_kv // 8)[some] = block_lists.pack_bits(seen)
    return bits


def pairs(
    mask_mod: MaskMod,
    lists: Tensor,
    keys: Tensor,
    heads: int,
    rows: int,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
) -> tuple[Tensor, Tensor]:
    """Returns which pairs of some lists are visible, and which pairs exist.

    The function is evaluated under vmap, as in FlexAttention: it may index tensors in ways that do
    not broadcast, such as `table[b][q]`. Tokens past the end are clamped to the last token, so that
    they do not change a block's kind.

    Args:
        lists: int64 `[n]`, flat indices of (batch entry, head, query block).
        keys: int64 `[keys]`, or `[n, keys]`, different for each list.

    Returns:
        Two tensors, bool `[n, block_q, keys]`; the second may be broadcast.
    """
    b, h, row = lists // (heads * rows), lists // rows % heads, lists % rows
    queries = row[:, None] * block_q + torch.arange(block_q, device=lists.device)

    def one(*indices: Tensor) -> Tensor:
        seen = mask_mod(*indices)
        if not isinstance(seen, Tensor):
            raise TypeError(f"mask_mod must return a tensor of torch.bool, got {seen!r}")
        return seen

    of_keys = torch.vmap(one, in_dims=(None, None, None, 0))
    of_queries = torch.vmap(of_keys, in_dims=(None, None, 0, None))
    of_lists = torch.vmap(of_queries, in_dims=(0, 0, 0, 0 if keys.dim() == 2 else None))
    with _indexing():
        seen = of_lists(b, h, queries.clamp(max=q_len - 1), keys.clamp(max=kv_len - 1))
    if seen.dtype != torch.bool:
        raise TypeError(f"mask_mod must return torch.bool, got {seen.dtype}")
    if seen.dim() != 3:
        raise ValueError(
            f"mask_mod must return a scalar for one pair, got shape {list(seen.shape[3:])}"
        )
    there = (queries < q_len)[..., None] & (keys < kv_len).unsqueeze(-2)
    return seen, there


def _indexing() -> contextlib.AbstractContextManager[object]:
    """Makes `table[q]` a lookup under vmap before torch 2.11, as in FlexAttention.

    It is entered only where needed, because its import takes a second.
    """
    if torch.__version__ >= "2.11":  # compared as a version, not as a string
        return contextlib.nullcontext()
    try:
        from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    except ImportError:
        return contextlib.nullcontext()
    return TransformGetItemToIndex()


def from_flex(mask: FlexBlockMask) -> BlockParts:
    """See `BlockMask.from_flex`."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    if not isinstance(mask, FlexBlockMask):
        raise TypeError(
            "mask must be a BlockMask of torch.nn.attention.flex_attention, got "
            f"{type(mask).__name__}"
        )
    block_q, block_kv = mask.BLOCK_SIZE
    q_len, kv_len = mask.seq_lengths
    if block_q not in block_checks.BLOCKS_Q or block_kv not in block_checks.BLOCKS_KV:
        raise ValueError(
            f"BLOCK_SIZE of mask must be {_checks.one_of(block_checks.BLOCKS_Q)} for queries and "
            f"{_checks.one_of(block_checks.BLOCKS_KV)} for keys, got {(block_q, block_kv)}"
        )
    sizes = (q_len, kv_len, block_q, block_kv)
    blocks_kv = ceil_div(kv_len, block_kv)
    partial = block_lists.block_map(mask.kv_num_blocks, mask.kv_indices, blocks_kv)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = block_lists.block_map(mask.full_kv_num_blocks, mask.full_kv_indices, blocks_kv)
    width = int(partial.sum(-1).max()) if partial.numel() else 0
    counts, indices = block_lists.list_blocks(partial, width)
    return BlockParts(
        *block_lists.list_blocks(full),
        *sizes,
        partial_counts=counts,
        partial_indices=indices,
        partial_bits=block_bits(mask.mask_mod, counts, indices, *sizes),
    )


def to_flex(mask: BlockParts) -> FlexBlockMask:
    """See `BlockMask.to_flex`."""
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

    for name, length in (("q_len", mask.q_len), ("kv_len", mask.kv_len)):
        if length == 0:
            raise ValueError(f"{name} must be at least 1 for FlexAttention, got 0")
    blocks_kv = mask.blocks_kv
    full = block_lists.block_map(mask.counts, mask.indices, blocks_kv)
    partial = torch.zeros_like(full)
    slots = torch.full(full.shape, -1, device=full.device)
    bits = torch.zeros(
        *full.shape[:3], 1, mask.block_q, mask.block_kv // 8, dtype=torch.uint8, device=full.device
    )
    if mask.partial is not None and mask.partial.indices.shape[-1]:
        counts, indices, bits = mask.partial
        partial = block_lists.block_map(counts, indices, blocks_kv)
        slots = block_lists.slot_map(counts, indices, blocks_kv)
    batch, heads = full.shape[:2]
    offset = mask.kv_len - mask.q_len

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h, row = b % batch, h % heads, q // mask.block_q
        block, column = k // mask.block_kv, k % mask.block_kv
        slot = slots[b, h, row, block]
        byte = bits[b, h, row, slot.clamp(min=0), q % mask.block_q, column // 8].int()
        seen = full[b, h, row, block] | ((slot >= 0) & ((byte >> column % 8) & 1).bool())
        return seen & (k <= q + offset) if mask.causal else seen

    asked, whole = partial, full
    if mask.causal:
        # Blocks that the diagonal cuts are partial for FlexAttention: it calls mask_mod there.
        sizes = (mask.q_len, mask.kv_len, mask.block_q, mask.block_kv)
        whole = full & ~cut_blocks(*sizes, full.device)
        reachable = block_lists.reachable_blocks(*sizes, True, full.device)
        asked = (partial | full & ~whole) & reachable
    lists = (*block_lists.list_blocks(asked), *block_lists.list_blocks(whole))
    # FlexAttention needs valid block indices past the counts, too.
    counts, indices, full_counts, full_indices = (tensor.clamp(min=0) for tensor in lists)
    flex: FlexBlockMask = FlexBlockMask.from_kv_blocks(
        counts,
        indices,
        full_counts,
        full_indices,
        BLOCK_SIZE=(mask.block_q, mask.block_kv),
        mask_mod=mask_mod,
        seq_lengths=(mask.q_len, mask.kv_len),
    )
    return flex


def cut_blocks(
    q_len: int, kv_len: int, block_q: int, block_kv: int, device: torch.device
) -> Tensor:
    """Returns bool `[nQ, nK]`: blocks with a pair that `causal` hides."""
    sizes = q_len, kv_len, True, ceil_div(q_len, block_q) * block_q, device
    least = block_lists.key_limits(*sizes)[::block_q, None]  # of the first row of each block
    blocks = torch.arange(1, ceil_div(kv_len, block_kv) + 1, device=device)
    return (blocks * block_kv).clamp(max=kv_len) > least
