"""The call of the function that the ranks run on their parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

import sparse_fmha
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask


def attend(
    attention: Callable[..., Any] | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask | StripeMask | None,
    **options: Any,
) -> Any:
    """Calls the given function, or the default one for the mask."""
    if mask is None:
        return (attention or sparse_fmha.attention)(q, k, v, **options)
    if attention is not None:
        return attention(q, k, v, mask, **options)
    if isinstance(mask, BlockMask):
        return sparse_fmha.block_sparse_attention(q, k, v, mask, **options)
    return sparse_fmha.stripe_attention(q, k, v, mask, **options)
