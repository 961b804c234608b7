"""Masks of single keys and short runs of keys for `stripe_attention`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists, stripe_checks, tensor_fields
from sparse_fmha.masks.parts import StripeParts
from sparse_fmha.masks.tensor_fields import TensorFields

TENSORS = ("columns", "counts", "range_starts", "range_counts")


class StripeMask(TensorFields):
    """For each group of queries, which keys it sees, one by one and in runs.

    Query rows are cut in groups of `block_q`; the last one may be ragged. Each (batch entry or all,
    query head or all, group) has a list of key positions and, if given, one of runs of `range_size`
    keys that start at any token and may reach behind the last key. No key is listed twice. With
    `causal` query i sees key j only if `j <= i + kv_len - q_len`, too. AnchorAttention, vertical-
    slash patterns and token-level top-k selection are such masks.

    `to`, saving and use as a pytree node as `BlockMask`.

    Attributes:
        columns: int32 `[B|1, H|1, groups, width]`, ascending; what is behind a count is ignored.
        counts: int32 `[B|1, H|1, groups]`.
        range_starts, range_counts: the same for the first keys of runs, in any order; or None.
        q_len, kv_len: tokens. block_q: a multiple of 64 from 64 to 2048. range_size: 64 or 128.

    Args:
        columns, counts, q_len, kv_len, block_q, range_starts, range_counts, range_size, causal: as
            the attributes. The tensors are kept, not copied.
        validate: check the lists completely (`validate()`), which waits for the device.

    Raises:
        TypeError: a dtype or type that is not allowed.
        ValueError: shapes that do not fit, sizes that are not allowed, tensors on different
            devices; with `validate`, lists that are not right.
    """

    TENSORS = TENSORS
    PLAIN = ("q_len", "kv_len", "block_q", "range_size", "causal")

    def __init__(
        self,
        columns: Tensor,
        counts: Tensor,
        q_len: int,
        kv_len: int,
        block_q: int,
        range_starts: Tensor | None = None,
        range_counts: Tensor | None = None,
        range_size: int = 64,
        causal: bool = False,
        validate: bool = False,
    ) -> None:
        stripe_checks.check_sizes(q_len, kv_len, block_q, range_size, causal)
        self.q_len, self.kv_len = _checks.as_int(q_len), _checks.as_int(kv_len)
        self.block_q, self.range_size = int(block_q), int(range_size)
        self.causal = causal
        self.columns, self.counts = columns, counts
        self.range_starts, self.range_counts = range_starts, range_counts
        stripe_checks.check_tensors(self._parts())
        for name in TENSORS:
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.contiguous())
        if validate:
            self.validate()

    @property
    def groups(self) -> int:
        """Groups of queries."""
        return ceil_div(self.q_len, self.block_q)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch entries or 1, query heads or 1, q_len, kv_len."""
        return (*self.counts.shape[:2], self.q_len, self.kv_len)

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @staticmethod
    def from_columns(
        seen: Tensor,
        q_len: int,
        block_q: int,
        *,
        causal: bool = False,
        width: int | None = None,
    ) -> StripeMask:
        """The keys that are set, listed on the device without waiting for it.

        Args:
            seen: bool `[B|1, H|1, groups, kv_len]`.
            q_len, block_q, causal: as of the mask.
            width: capacity of the lists, default kv_len; a group with more loses its last keys.
        """
        stripe_checks.check_seen(seen)
        counts, columns = block_lists.list_blocks(seen, width)
        return StripeMask(columns, counts, q_len, seen.shape[3], block_q, causal=causal)

    def seen(self) -> Tensor:
        """Bool `[B|1, H|1, groups, kv_len]`: the keys that are listed, before `causal`."""
        seen = block_lists.block_map(self.counts, self.columns, self.kv_len)
        if self.range_starts is not None and self.range_counts is not None:
            for offset in range(self.range_size):
                listed = self.range_starts + offset
                listed = torch.where(self.range_starts < 0, block_lists.ABSENT, listed)
                seen = seen | block_lists.block_map(self.range_counts, listed, self.kv_len)
        return seen

    def to_dense(self) -> Tensor:
        """Bool `[B|1, H|1, q_len, kv_len]`: the visible pairs."""
        dense = self.seen().repeat_interleave(self.block_q, 2)[:, :, : self.q_len]
        if self.causal:
            limit = self._limits()[: self.q_len]
            dense = dense & (torch.arange(self.kv_len, device=self.device) < limit[:, None])
        return dense

    @property
    def density(self) -> float:
        """Visible pairs over all pairs; 0 without tokens. Waits for the device."""
        seen = self.seen()
        if not seen.numel() or not self.q_len:
            return 0.0
        # Of a group's rows the first ones may not see a key that the last ones do.
        limits = self._limits().view(self.groups, self.block_q)
        keys = torch.arange(self.kv_len, device=self.device)
        pairs = 0
        for group in range(self.groups):
            rows = (keys < limits[group][:, None]).sum(0)
            pairs += int((seen[:, :, group] * rows).sum())
        return pairs / (seen.shape[0] * seen.shape[1] * self.q_len * self.kv_len)

    def validate(self) -> None:
        """Checks the lists completely; waits for the device.

        Raises:
            ValueError: a count that is not in [0, width], a key that there is not, columns that do
                not ascend, a key that is listed twice; the message names the first place.
        """
        stripe_checks.validate(self._parts())

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
        """Writes a PNG: the keys of one head, and how many each group of all heads has.

        Arguments and errors as `BlockMask.plot`.
        """
        from sparse_fmha.plotting.blocks import Words, draw

        words = Words(
            f"StripeMask: {self.q_len} queries, {self.kv_len} keys"
            f"{', causal' if self.causal else ''}",
            "key",
            f"group of {self.block_q} queries",
            "keys",
            "groups of queries",
            ("not listed", "listed"),
        )
        draw(path, (batch, head), self.seen().int(), words, None)

    def __repr__(self) -> str:
        """Sizes and how much is listed; printing waits for the device, as that of a tensor."""
        if unfit := self._repr_of_unfit():
            return unfit
        batch, heads, *_ = self.shape
        listed = ""
        if tensor_fields.has_values(self.counts):
            seen = self.seen()
            share = seen.double().mean().item() if seen.numel() else 0.0
            listed = f", {share:.1%} of keys listed"
        runs = "" if self.range_starts is None else f", runs of {self.range_size}"
        return (
            f"StripeMask(q_len={self.q_len}, kv_len={self.kv_len}, groups of {self.block_q}, lists "
            f"for {batch}x{heads} (batch x heads){listed}{runs}"
            f"{', causal' if self.causal else ''}, {self.device})"
        )

    def _limits(self) -> Tensor:
        rows = self.groups * self.block_q
        return block_lists.key_limits(self.q_len, self.kv_len, self.causal, rows, self.device)

    def _parts(self) -> StripeParts:
        names = (*self.TENSORS, *self.PLAIN)
        return StripeParts(**{name: getattr(self, name) for name in names})

    def _check_fields(self) -> None:
        sizes = self.q_len, self.kv_len, self.block_q, self.range_size
        stripe_checks.check_sizes(*sizes, self.causal)
        stripe_checks.check_tensors(self._parts())


tensor_fields.register(StripeMask, "sparse_fmha.StripeMask")
