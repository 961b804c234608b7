"""What patterns that do not look at the input have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparse_fmha import _block_checks, _block_lists
from sparse_fmha.block_mask import BlockMask

AT_ONCE = 512  # blocks of which all pairs are evaluated together


def pattern_blocks(
    q_len: int,
    kv_len: int,
    block: int,
    block_q: int,
    block_kv: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """Which block of a pattern each query block (int64 `[nQ, 1]`) and key block (`[nK]`) is in.

    Query i stands at position `i + kv_len - q_len`.

    Raises:
        ValueError: a query or key block that does not lie in one block of the pattern.
    """
    _block_checks.check_sizes(q_len, kv_len, block_q, block_kv, True)
    for name, size in (("block_q", block_q), ("block_kv", block_kv)):
        if block % size:
            raise ValueError(f"{name} is {size}; it must divide the pattern's block of {block}")
    shift = kv_len - q_len
    if shift % block_q:
        raise ValueError(
            f"kv_len - q_len is {shift}; a multiple of block_q = {block_q} is needed, so that each "
            "query block lies in one block of the pattern"
        )
    rows = torch.arange(_block_lists.ceil_div(q_len, block_q), device=device) * block_q + shift
    columns = torch.arange(_block_lists.ceil_div(kv_len, block_kv), device=device) * block_kv
    return (rows // block)[:, None], columns // block


def from_rules(
    rules: Sequence[Callable[[Tensor, Tensor], Tensor]],
    full: Tensor,
    some: Tensor,
    q_len: int,
    kv_len: int,
    block_q: int,
    block_kv: int,
    causal: bool,
    device: torch.device | str,
) -> BlockMask:
    """A mask that is exact for tokens; the rules are evaluated in partial blocks alone.

    Args:
        rules: of each head, visible(query, key) of indices; the causal flag comes on top.
        full: bool `[heads, nQ, nK]` on the CPU: blocks where all is visible.
        some: likewise, blocks where something may be.
    """
    partial = some & ~full
    full_width, width = (int(x.sum(-1).max()) if x.numel() else 0 for x in (full, partial))
    lists = [x.to(device) for x in _block_lists.list_blocks(full[None], full_width)]
    sizes = (q_len, kv_len, block_q, block_kv)
    if width == 0:
        return BlockMask(*lists, *sizes, causal=causal)
    counts, indices = _block_lists.list_blocks(partial[None], width)
    shape = (*indices.shape, block_q, block_kv // 8)
    bits = torch.zeros(shape, dtype=torch.uint8, device=device)
    tokens_q, tokens_k = (torch.arange(n, device=device) for n in (block_q, block_kv))
    for head, rule in enumerate(rules):
        # Most lists are shorter than the longest: only what is listed is evaluated.
        listed = torch.arange(width, device="cpu") < counts[0, head, :, None]
        for rows, slots in zip(*(x.split(AT_ONCE) for x in torch.where(listed)), strict=True):
            columns = indices[0, head, rows, slots].to(device).long()
            rows, slots = rows.to(device), slots.to(device)
            q = (rows[:, None] * block_q + tokens_q)[:, :, None]
            k = (columns[:, None] * block_kv + tokens_k)[:, None]
            seen = rule(q.clamp(max=q_len - 1), k.clamp(max=kv_len - 1))
            bits[0, head, rows, slots] = _block_lists.pack_bits(seen & (q < q_len) & (k < kv_len))
    return BlockMask(
        *lists,
        *sizes,
        partial_counts=counts.to(device),
        partial_indices=indices.to(device),
        partial_bits=bits,
        causal=causal,
    )
