"""What queries of a forward pass see, as tensors of pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_fmha.masks.block_fields import TENSORS
from sparse_fmha.masks.block_mask import BlockMask


def by_distance(queries: int, keys: int, window: int | None, device: torch.device | str) -> Tensor:
    """Bool `[1, 1, queries, keys]` of the last queries: causal, and in a window of keys."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None]
    behind = behind - torch.arange(keys, device=device)
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    return seen[None, None]


def by_lists(mask: BlockMask, queries: int) -> Tensor:
    """Bool `[B, 1, queries, keys]` of the last queries of a mask; reads their blocks alone."""
    first = (mask.q_len - queries) // mask.block_q
    parts = {name: getattr(mask, name) for name in TENSORS}
    tensors: Any = {name: None if x is None else x[:, :, first:] for name, x in parts.items()}
    tail = BlockMask(
        **tensors,
        q_len=mask.q_len - first * mask.block_q,
        kv_len=mask.kv_len,
        block_q=mask.block_q,
        block_kv=mask.block_kv,
        causal=mask.causal,
    )
    return tail.to_dense()[:, :, tail.q_len - queries :]
