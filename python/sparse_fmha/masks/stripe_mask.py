"""Stripe masks, of single keys and short runs, for `stripe_attention`."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_checks, block_lists, stripe_checks, tensor_fields
from sparse_fmha.masks.parts import StripeParts
from sparse_fmha.masks.tensor_fields import TensorFields

TENSORS = ("columns", "counts", "range_starts", "range_counts")


class StripeMask(TensorFields):
    """Lists, for each group of queries, the keys that it sees: single keys and runs.

    Query rows are divided into groups of `block_q`; the last group may be shorter. Each (batch
    entry or all, query head or all, group) has a list of key positions and, optionally, a list of
    runs of `range_size` keys, which start at any token and may extend past the last key. No key is
    listed twice. `causal` applies on top: query i sees key j only if `j <= i + kv_len - q_len`.
    AnchorAttention, vertical-slash patterns and token-level top-k selection have such masks.

    `to`, saving and use as a pytree node work as for `BlockMask`.

    Attributes:
        columns: int32 `[B|1, H|1, groups, width]`, ascending; entries past a count are ignored.
        counts: int32 `[B|1, H|1, groups]`.
        range_starts, range_counts: the same for the first keys of runs, in any order; or None.
        q_len, kv_len: tokens. block_q: a multiple of 64 from 64 to 2048. range_size: 64 or 128.

    Args:
        columns, counts, q_len, kv_len, block_q, range_starts, range_counts, range_size, causal: see
            Attributes. Tensors are kept, not copied.
        validate: also call `validate()`, which waits for the device.

    Raises:
        TypeError: a dtype or type is not allowed.
        ValueError: shapes do not match, a size is not allowed, or tensors are on different devices;
            with `validate`, lists are invalid.
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
        """Number of groups."""
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
        """Builds a mask from a map of keys, without waiting for the device.

        Args:
            seen: bool `[B|1, H|1, groups, kv_len]`.
            q_len, block_q, causal: as in `StripeMask`.
            width: capacity of the lists, default kv_len; a group with more loses its last keys.
        """
        stripe_checks.check_seen(seen)
        block_checks.check_width("width", width)
        counts, columns = block_lists.list_blocks(seen, width)
        return StripeMask(columns, counts, q_len, seen.shape[3], block_q, causal=causal)

    def seen(self) -> Tensor:
        """Returns the listed keys before `causal` applies, bool `[B|1, H|1, groups, kv_len]`."""
        seen = block_lists.block_map(self.counts, self.columns, self.kv_len)
        if self.range_starts is not None and self.range_counts is not None:
            for offset in range(self.range_size):
                listed = self.range_starts + offset
                listed = torch.where(self.range_starts < 0, block_lists.ABSENT, listed)
                seen = seen | block_lists.block_map(self.range_counts, listed, self.kv_len)
        return seen

    def to_dense(self) -> Tensor:
        """Returns the visible pairs, bool `[B|1, H|1, q_len, kv_len]`."""
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
        # With causal, the first rows of a group may not see a key that the last rows see.
        limits = self._limits().view(self.groups, self.block_q)
        keys = torch.arange(self.kv_len, device=self.device)
        pairs = 0
        for group in range(self.groups):
            rows = (keys < limits[group][:, None]).sum(0)
            pairs += int((seen[:, :, group] * rows).sum())
        return pairs / (seen.shape[0] * seen.shape[1] * self.q_len * self.kv_len)

    def validate(self) -> None:
        """Checks the values in the lists; waits for the device.

        Raises:
            ValueError: a count is not in [0, width], a key is out of range, columns do not ascend,
                or a key is listed twice; the message names the first place.
        """
        stripe_checks.validate(self._parts())

    def plot(self, path: str | Path, *, batch: int = 0, head: int = 0) -> None:
        """Writes a PNG: the keys of one head, and a histogram of list lengths over all heads.

        Arguments and errors as in `BlockMask.plot`.
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
        """Returns sizes and density; waits for the device, like printing a tensor."""
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
