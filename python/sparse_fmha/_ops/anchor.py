"""The ops of AnchorAttention; csrc/ops documents what they compute."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._ops import symbolic


def means(q: Tensor, k: Tensor, block: int, step: int, scale: float) -> Tensor:
    """`anchor_means`."""
    result: Tensor = symbolic.call("anchor_means", q, k, block, step, scale)
    return result


def keys(q_mean: Tensor, k: Tensor, least: Tensor, block: int, step: int) -> tuple[Tensor, Tensor]:
    """`anchor_keys`: bits and counts."""
    result: tuple[Tensor, Tensor] = torch.ops.sparse_fmha.anchor_keys(q_mean, k, least, block, step)
    return result


def columns(bits: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """`anchor_columns`: columns and counts."""
    result: tuple[Tensor, Tensor] = torch.ops.sparse_fmha.anchor_columns(bits, first, width)
    return result
