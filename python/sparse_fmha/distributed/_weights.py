"""How much each row and each head of a mask computes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.distributed import _masks
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_mask import BlockMask


def row_weights(mask: _masks.Mask) -> list[float]:
    """Returns the keys that each block of queries visits, summed over the mask's lists.

    Of a BlockMask these are whole blocks, as the kernel computes them: lists that grow with the
    row, anchors that some rows have and windows that others have count alike. Waits for the device.

    Args:
        mask: any mask.

    Returns:
        One weight for each block_q queries, for `Shards.balanced`.

    Raises:
        TypeError: mask is not a mask.
    """
    return [float(x) for x in _visited(mask).sum(0).tolist()]


def head_weights(mask: _masks.Mask) -> list[float]:
    """Returns the keys that each head visits, summed over the mask's lists; see `row_weights`.

    Args:
        mask: a mask with lists for each query head.

    Returns:
        One weight for each head, for `balanced_heads`.

    Raises:
        TypeError: mask is not a mask.
    """
    return [float(x) for x in _visited(mask).sum(1).tolist()]


def _visited(mask: _masks.Mask) -> Tensor:
    """Keys that are visited: int64 `[heads, rows]`, summed over the batch."""
    if isinstance(mask, BlockMask):
        unit = mask.block_kv
        lists = [(mask.counts, mask.indices, unit)]
        if mask.partial_counts is not None and mask.partial_indices is not None:
            lists.append((mask.partial_counts, mask.partial_indices, unit))
    elif isinstance(mask, _masks.MASKS):
        unit = 1
        lists = [(mask.counts, mask.columns, 1)]
        if mask.range_counts is not None and mask.range_starts is not None:
            lists.append((mask.range_counts, mask.range_starts, mask.range_size))
    else:
        raise TypeError(f"mask must be a BlockMask or StripeMask, got {type(mask).__name__}")
    ends = block_lists.reached(
        mask.q_len, mask.kv_len, mask.block_q, unit, mask.causal, mask.device
    )
    total = torch.zeros(mask.counts.shape[1:], dtype=torch.int64, device=mask.device)
    for counts, units, weight in lists:
        # Entries of each row before its end.
        listed = block_lists.is_listed(counts, units, torch.iinfo(torch.int32).max)
        total += (listed & (units < ends[:, None])).sum((0, 3)) * weight
    return total
