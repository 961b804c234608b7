"""The fields of block masks: what a `BlockMask` is made of, and the checks of it."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks
from sparse_fmha.masks.parts import BlockParts
from sparse_fmha.masks.tensor_fields import TensorFields

TENSORS = ("counts", "indices", "partial_counts", "partial_indices", "partial_bits")
PLAIN = ("q_len", "kv_len", "block_q", "block_kv", "causal")

Mask = TypeVar("Mask", bound="BlockFields")


class BlockFields(TensorFields):
    """Base class of `BlockMask`, which documents the fields."""

    TENSORS = TENSORS
    PLAIN = PLAIN

    def __init__(
        self,
        counts: Tensor,
        indices: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int = 128,
        block_kv: int = 128,
        *,
        partial_counts: Tensor | None = None,
        partial_indices: Tensor | None = None,
        partial_bits: Tensor | None = None,
        causal: bool = False,
        validate: bool = False,
    ) -> None:
        block_checks.check_sizes(q_len, kv_len, block_q, block_kv, causal)
        self.q_len, self.kv_len = _checks.as_int(q_len), _checks.as_int(kv_len)
        self.block_q, self.block_kv = int(block_q), int(block_kv)
        self.causal = causal
        self.counts, self.indices = counts, indices
        self.partial_counts, self.partial_indices = partial_counts, partial_indices
        self.partial_bits = partial_bits
        block_checks.check_tensors(self._parts())
        for name in TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.contiguous())
        if validate:
            self.validate()

    @property
    def blocks_q(self) -> int:
        """nQ."""
        return ceil_div(self.q_len, self.block_q)

    @property
    def blocks_kv(self) -> int:
        """nK."""
        return ceil_div(self.kv_len, self.block_kv)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch entries or 1, query heads or 1, q_len, kv_len."""
        return (*self.counts.shape[:2], self.q_len, self.kv_len)

    @property
    def device(self) -> torch.device:
        return self.counts.device

    def validate(self) -> None:
        """Checks the values in the lists; waits for the device.

        Raises:
            ValueError: a count is not in [0, width], a block is out of range, a list does not
                ascend or has a duplicate, or a block is both full and partial; the message names
                the first place.
        """
        block_checks.validate(self._parts())

    @classmethod
    def _of(cls: type[Mask], parts: BlockParts) -> Mask:
        return cls(**{name: getattr(parts, name) for name in (*TENSORS, *PLAIN)})

    def _parts(self) -> BlockParts:
        return BlockParts(**{name: getattr(self, name) for name in (*TENSORS, *PLAIN)})

    def _check_fields(self) -> None:
        block_checks.check_sizes(self.q_len, self.kv_len, self.block_q, self.block_kv, self.causal)
        block_checks.check_tensors(self._parts())
