"""The op of SSA's choice; include/sparse_fmha/core/ssa_choices.h documents what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives


def choices(q: Tensor, means: Tensor, *, block: int, at: int, few: int, scale: float) -> Tensor:
    """`ssa_choices`: blocks of each token, int32 `[B, Hkv, Lq, few + 1]`, the own one last.

    Args:
        q: `[B, Lq, Hq, D]`, tokens from position `at` on.
        means: `[parts, B, nK, Hkv, D]` in q's dtype: a mean is the sum of its parts, at most 3.
        block: tokens of a block. few: blocks before a token's own.
        scale: of q . mean.
    """
    found: Tensor = torch.ops.sparse_fmha.ssa_choices(q, means, block, at, few, scale)
    return found


def register(library: torch.library.Library) -> None:
    """Registers shapes, and that there are no derivatives, as results are positions."""
    op = torch.ops.sparse_fmha.ssa_choices.default
    torch.library.register_fake(op.name(), _shape)
    derivatives.register_no_derivative(library, op)


def _shape(q: Tensor, means: Tensor, _block: int, _at: int, few: int, _scale: float) -> Tensor:
    shape = q.shape[0], means.shape[3], q.shape[1], few + 1
    return q.new_empty(shape, dtype=torch.int32)
