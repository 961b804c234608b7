"""The fields of masks as plain data.

Builders create it and checks read it; only `BlockMask` and `StripeMask` turn it into a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div


class PartialLists(NamedTuple):
    """Lists of partial blocks."""

    counts: Tensor
    indices: Tensor
    bits: Tensor


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

    @property
    def partial(self) -> PartialLists | None:
        counts, indices, bits = self.partial_counts, self.partial_indices, self.partial_bits
        if counts is None or indices is None or bits is None:
            return None
        return PartialLists(counts, indices, bits)


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
        """Number of groups."""
        return ceil_div(self.q_len, self.block_q)
