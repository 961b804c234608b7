"""Maps of blocks that callers give."""

from __future__ import annotations

import torch
from torch import Tensor


def map_like(name: str, blocks: Tensor, like: Tensor) -> Tensor:
    """Returns a bool map expanded to the shape of another."""
    if not isinstance(blocks, Tensor) or blocks.dtype != torch.bool:
        raise TypeError(f"{name} is {getattr(blocks, 'dtype', type(blocks))}; bool is needed")
    try:
        return blocks.expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} has shape {list(blocks.shape)}; what broadcasts to {list(like.shape)} is "
            "needed"
        ) from None
