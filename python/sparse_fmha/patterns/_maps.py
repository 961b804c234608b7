"""Maps of blocks that callers give."""

from __future__ import annotations

import torch
from torch import Tensor


def map_like(name: str, blocks: Tensor, like: Tensor) -> Tensor:
    """Returns a bool map expanded to the shape of another."""
    if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool:
        raise TypeError(
            f"{name} must be a bool tensor, got {getattr(blocks, 'dtype', type(blocks))}"
        )
    try:
        return blocks.expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must have a shape that broadcasts to {list(like.shape)}, got "
            f"{list(blocks.shape)}"
        ) from None
