"""What masks are made of, as plain data.

Builders make it and checks read it; only `BlockMask` and `StripeMask` turn it into a mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div


@dataclass(eq=False)
class BlockParts:
    """The attributes of a `BlockMask`; nothing is checked."""

    counts: Tensor
    indices: Tensor
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    partial_counts: Tensor | None = None
    partial_indices: Tensor | None = None
    partial_bits: Tensor | None = None
    causal: bool = False

    @property
    def blocks_q(self) -> int:
        """nQ."""
        return ceil_div(self.q_len, self.block_q)

    @property
    def blocks_kv(self) -> int:
        """nK."""
        return ceil_div(self.kv_len, self.block_kv)

    @property
    def device(self) -> torch.device:
        return self.counts.device


@dataclass(eq=False)
class StripeParts:
    """The attributes of a `StripeMask`; nothing is checked."""

    columns: Tensor
    counts: Tensor
    q_len: int
    kv_len: int
    block_q: int
    range_starts: Tensor | None = None
    range_counts: Tensor | None = None
    range_size: int = 64
    causal: bool = False

    @property
    def groups(self) -> int:
        """Groups of queries."""
        return ceil_div(self.q_len, self.block_q)
