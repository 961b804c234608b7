"""Block masks from and to `torch.nn.attention.flex_attention`, and from its mask functions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.parts import BlockParts

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SLICE = 1 << 19  # evaluated at a time on the CPU, but at least those of one block


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
        raise TypeError(f"mask_mod is {mask_mod!r}; a function of (b, h, q, kv) is needed")
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
    """Pairs that are evaluated at a time."""
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
    """The bitmasks uint8 `[B, H, nQ, width, block_q, block_kv / 8]` of listed blocks.

    Waits for the device: most lists are shorter than the longest, and only what is listed is
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
    """What the queries of some lists see, and which pairs there are.

    The function is asked as FlexAttention asks it, by vmap: it may index tensors in ways that do
    not broadcast, such as `table[b][q]`. Tokens past the end are clamped to the last one, so
    that they do not change whether all or some of a block's pairs are seen.

    Args:
        lists: int64 `[n]`, numbers of (batch entry, head, block of queries).
        keys: int64 `[keys]`, or `[n, keys]` of each list.

    Returns:
        bool `[n, block_q, keys]`, both; the second may be broadcast.
    """
    b, h, row = lists // (heads * rows), lists // rows % heads, lists % rows
    queries = row[:, None] * block_q + torch.arange(block_q, device=lists.device)
    of_keys = torch.vmap(mask_mod, in_dims=(None, None, None, 0))
    of_queries = torch.vmap(of_keys, in_dims=(None, None, 0, None))
    of_lists = torch.vmap(of_queries, in_dims=(0, 0, 0, 0 if keys.dim() == 2 else None))
    with _indexing():
        seen = of_lists(b, h, queries.clamp(max=q_len - 1), keys.clamp(max=kv_len - 1))
    if seen.dtype != torch.bool:
        raise TypeError(f"mask_mod returns {seen.dtype}; torch.bool is needed")
    if seen.dim() != 3:
        raise ValueError(
            f"mask_mod returns shape {list(seen.shape[3:])} for one pair; a scalar is needed"
        )
    there = (queries < q_len)[..., None] & (keys < kv_len).unsqueeze(-2)
    return seen, there


def _indexing() -> contextlib.AbstractContextManager:
    """What makes `table[q]` a lookup under vmap before torch 2.11. FlexAttention enters it, too.

    It is not entered where it is not needed: importing it takes a second.
    """
    if torch.__version__ >= (2, 11):
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
            f"mask is a {type(mask).__name__}; a BlockMask of torch.nn.attention.flex_attention is "
            "needed"
        )
    block_q, block_kv = mask.BLOCK_SIZE
    q_len, kv_len = mask.seq_lengths
    if block_q not in block_checks.BLOCKS_Q or block_kv not in block_checks.BLOCKS_KV:
        raise ValueError(
            f"the FlexAttention mask has BLOCK_SIZE {(block_q, block_kv)}; queries in blocks of "
            f"{' or '.join(map(str, block_checks.BLOCKS_Q))} and keys in blocks of "
            f"{', '.join(map(str, block_checks.BLOCKS_KV))} are needed"
        )
    sizes = (q_len, kv_len, block_q, block_kv)
    blocks_kv = ceil_div(kv_len, block_kv)
    partial = block_lists.block_map(mask.kv_num_blocks, mask.kv_indices, blocks_kv)
    full = torch.zeros_like(partial)
    if mask.full_kv_num_blocks is not None:
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
            raise ValueError(f"{name} is 0; FlexAttention's masks need at least 1 token")
    blocks_kv = mask.blocks_kv
    full = block_lists.block_map(mask.counts, mask.indices, blocks_kv)
    partial = torch.zeros_like(full)
    slots = torch.full(full.shape, -1, device=full.device)
    bits = torch.zeros(
        *full.shape[:3], 1, mask.block_q, mask.block_kv // 8, dtype=torch.uint8, device=full.device
    )
    if mask.partial_counts is not None and mask.partial_indices.shape[-1]:
        partial = block_lists.block_map(mask.partial_counts, mask.partial_indices, blocks_kv)
        slots = block_lists.slot_map(mask.partial_counts, mask.partial_indices, blocks_kv)
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

    asked, whole = partial, full
    if mask.causal:
        # FlexAttention has to ask for each pair of a block that the diagonal cuts.
        sizes = (mask.q_len, mask.kv_len, mask.block_q, mask.block_kv)
        whole = full & ~cut_blocks(*sizes, full.device)
        reachable = block_lists.reachable_blocks(*sizes, True, full.device)
        asked = (partial | full & ~whole) & reachable
    lists = (*block_lists.list_blocks(asked), *block_lists.list_blocks(whole))
    # It wants indices of blocks that there are behind the counts, too.
    return FlexBlockMask.from_kv_blocks(
        *(tensor.clamp(min=0) for tensor in lists),
        BLOCK_SIZE=(mask.block_q, mask.block_kv),
        mask_mod=mask_mod,
        seq_lengths=(mask.q_len, mask.kv_len),
    )


def cut_blocks(
    q_len: int, kv_len: int, block_q: int, block_kv: int, device: torch.device
) -> Tensor:
    """Bool `[nQ, nK]`: blocks with a pair that `causal` forbids."""
    sizes = q_len, kv_len, True, ceil_div(q_len, block_q) * block_q, device
    least = block_lists.key_limits(*sizes)[::block_q, None]  # of a block's rows the first one's
    blocks = torch.arange(1, ceil_div(kv_len, block_kv) + 1, device=device)
    return (blocks * block_kv).clamp(max=kv_len) > least
