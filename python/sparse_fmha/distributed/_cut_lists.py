"""Lists of a mask for one rank's rows, renumbered for some of the keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from sparse_fmha._sizes import ceil_div
from sparse_fmha.distributed import _masks
from sparse_fmha.distributed._shards import Span
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask


def unit_of(mask: _masks.Mask) -> int:
    """Keys that lists name together."""
    return mask.block_kv if isinstance(mask, BlockMask) else 1


def tokens(units: Tensor, unit: int, length: int) -> int:
    """The number of keys in ascending units, of which the sequence's last may be shorter."""
    if not len(units):
        return 0
    return len(units) * unit - (ceil_div(length, unit) * unit - length) * int(
        (units == ceil_div(length, unit) - 1).any()
    )


class Keys:
    """Some units of keys, one after the other in a tensor.

    Attributes:
        units: int64, their numbers.
        length: keys in the tensor.
    """

    def __init__(self, units: Tensor, unit: int, kv_len: int) -> None:
        self.units, self.unit, self.kv_len = units, unit, kv_len
        self.length = tokens(units, unit, kv_len)
        if self.length % unit and int(units[-1]) != ceil_div(kv_len, unit) - 1:
            raise ValueError(
                "the shorter last block of keys must be the last that a rank receives, got keys of "
                f"other ranks after it; pad the keys to a multiple of {unit}, or give it to the "
                "last rank"
            )

    @staticmethod
    def of_spans(spans: Sequence[Span], unit: int, device: torch.device) -> Keys:
        """The keys of a rank; the last span may end within a unit."""
        parts = [torch.arange(a // unit, ceil_div(b, unit), device=device) for a, b in spans]
        none = torch.arange(0, device=device)
        return Keys(torch.cat([none, *parts]), unit, spans[-1][1] if spans else 0)

    def tokens_of(self, wanted: Tensor) -> tuple[slice, ...] | Tensor:
        """The places of the keys in wanted units; a slice if these are all."""
        chosen = wanted[self.units]
        if bool(chosen.all()):
            return (slice(0, self.length),) if self.length else ()
        places = chosen.nonzero() * self.unit
        every = (places + torch.arange(self.unit, device=places.device)).flatten()
        return every[every < self.length]

    def places(self, units: int) -> Tensor:
        """For each of the sequence's units its place here, int64, -1 where it is not."""
        found = torch.full((units,), -1, device=self.units.device)
        found[self.units] = torch.arange(len(self.units), device=self.units.device)
        return found


class Cut:
    """The lists of one rank's rows.

    Args:
        mask: of the whole sequence.
        queries, keys: the rank's spans, at multiples of the mask's blocks.

    Attributes:
        rows: number of blocks (groups) of queries.
    """

    def __init__(self, mask: _masks.Mask, queries: Sequence[Span], keys: Sequence[Span]) -> None:
        self._unit = unit_of(mask)
        self._units = ceil_div(mask.kv_len, self._unit)
        blocks = Keys.of_spans(queries, mask.block_q, mask.device).units
        self._length = sum(stop - start for start, stop in queries)
        self.rows = len(blocks)
        self._mask = _masks.with_tensors(mask, lambda x: x.index_select(2, blocks), self._length)
        # The units before the first query of a row; with causal no others of other ranks are seen.
        self._before = ceil_div(blocks * mask.block_q, self._unit)
        own = torch.zeros(self._units, dtype=torch.bool, device=mask.device)
        for start, stop in keys:
            own[start // self._unit : ceil_div(stop, self._unit)] = True
        self._own = own

    def needed(self) -> Tensor:
        """The units of other ranks that the rows list: bool `[units]`."""
        mask, found = self._mask, torch.zeros_like(self._own)
        if not self.rows:
            return found
        for counts, units in self._lists():
            found[units[self._listed(counts, units, own=False)].long()] = True
        if isinstance(mask, StripeMask) and mask.range_starts is not None:
            found |= _covered(self._runs(), mask.range_starts, mask.range_size, self._units)
        return found & ~self._own

    def lists(self, keys: Keys, own: bool) -> _masks.Mask:
        """The lists of these keys. `causal` is left for a rank's own keys alone."""
        places = keys.places(self._units)
        causal = own and self._mask.causal
        if isinstance(self._mask, BlockMask):
            return self._blocks(self._mask, places, keys, causal)
        return self._stripes(self._mask, places, keys, causal)

    def _blocks(self, mask: BlockMask, places: Tensor, keys: Keys, causal: bool) -> BlockMask:
        kept = [
            _renumbered(units, self._listed(counts, units, causal), places)
            for counts, units in self._lists()
        ]
        counts, indices, _ = kept[0]
        partial_counts = partial_indices = bits = None
        if len(kept) > 1:
            partial_counts, partial_indices, slots = kept[1]
            bits = block_lists.take_slots(cast(Tensor, mask.partial_bits), slots)
        return BlockMask(
            counts, indices, self._length, keys.length, mask.block_q, mask.block_kv,
            partial_counts=partial_counts, partial_indices=partial_indices, partial_bits=bits,
            causal=causal,
        )  # fmt: skip

    def _stripes(self, mask: StripeMask, places: Tensor, keys: Keys, causal: bool) -> StripeMask:
        columns = mask.columns
        listed = self._listed(mask.counts, columns, causal)
        starts = run_counts = None
        if mask.range_starts is not None:
            given, size = mask.range_starts.long(), mask.range_size
            there = self._listed(cast(Tensor, mask.range_counts), given, causal)
            # Runs that lie here in one piece stay runs; of others, each key here is a column.
            streaks = _streaks(places)
            whole = there & (streaks[given.clamp(0, self._units - 1)] >= size)
            run_counts, starts, _ = _renumbered(given, whole, places)
            broken, single = _single_keys(self._runs() & ~whole, given, size, places)
            columns = torch.cat([columns, single], -1)
            visible = broken if causal else broken & self._visible(broken, single)
            listed = torch.cat([listed, visible], -1)
        counts, columns, _ = _renumbered(columns, listed, places)
        return StripeMask(
            columns, counts, self._length, keys.length, mask.block_q, starts, run_counts,
            mask.range_size, causal,
        )  # fmt: skip

    def _lists(self) -> list[tuple[Tensor, Tensor]]:
        mask = self._mask
        if isinstance(mask, StripeMask):
            return [(mask.counts, mask.columns)]
        if mask.partial_counts is None or mask.partial_indices is None:
            return [(mask.counts, mask.indices)]
        return [(mask.counts, mask.indices), (mask.partial_counts, mask.partial_indices)]

    def _runs(self) -> Tensor:
        """Which entries of the runs exist."""
        mask = cast(StripeMask, self._mask)
        starts, counts = cast(Tensor, mask.range_starts), cast(Tensor, mask.range_counts)
        return block_lists.is_listed(counts, starts, self._units)

    def _listed(self, counts: Tensor, units: Tensor, own: bool) -> Tensor:
        """Which entries of lists exist and may be seen."""
        there = block_lists.is_listed(counts, units, self._units)
        return there if own else self._visible(there, units)

    def _visible(self, there: Tensor, units: Tensor) -> Tensor:
        """Leaves out what `causal` hides of other ranks' keys."""
        if not self._mask.causal:
            return there
        return there & (units < self._before[:, None])


def _renumbered(units: Tensor, keep: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of the kept units that have a place, by place; waits for the device.

    Returns:
        counts int32 `[..., rows]`, places int32 `[..., rows, width]`, and the slots that these come
        from, int64, -1 past the counts.
    """
    found = places[units.long().clamp(0, len(places) - 1)]
    keep = keep & (found >= 0)
    behind = torch.iinfo(torch.int64).max
    ordered, slots = found.masked_fill(~keep, behind).sort(-1)
    counts = keep.sum(-1, dtype=torch.int32)
    width = int(counts.max()) if counts.numel() else 0
    there = torch.arange(width, device=units.device) < counts[..., None]
    lists = ordered[..., :width].masked_fill(~there, block_lists.ABSENT).int()
    return counts, lists, slots[..., :width].masked_fill(~there, -1)


def _covered(there: Tensor, starts: Tensor, size: int, length: int) -> Tensor:
    """The keys that any of the runs has: bool `[length]`."""
    chosen = starts[there].long()
    edges = torch.zeros(length + 1, dtype=torch.int64, device=starts.device)
    edges += torch.bincount(chosen, minlength=length + 1)
    edges -= torch.bincount((chosen + size).clamp(max=length), minlength=length + 1)
    return edges.cumsum(0)[:length] > 0


def _streaks(places: Tensor) -> Tensor:
    """For each key here, how many keys from it on lie one after the other; 0 for other keys."""
    numbers = torch.arange(len(places), device=places.device)
    goes_on = torch.zeros_like(places, dtype=torch.bool)
    goes_on[:-1] = (places[:-1] >= 0) & (places[1:] == places[:-1] + 1)
    ends = numbers.masked_fill(goes_on, len(places)).flip(0).cummin(0).values.flip(0)
    return (ends - numbers + 1).masked_fill(places < 0, 0)


def _single_keys(there: Tensor, starts: Tensor, size: int, places: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of runs that are here in part: which entries exist, and the keys."""
    here = torch.cat([places.new_zeros(1), (places >= 0).cumsum(0)])
    first = starts.clamp(0, len(places))
    touched = there & (here[(first + size).clamp(max=len(places))] > here[first])
    counts = touched.sum(-1)
    width = int(counts.max()) if counts.numel() else 0
    slots = torch.sort(~touched, dim=-1, stable=True).indices[..., :width]
    keys = starts.gather(-1, slots)[..., None] + torch.arange(size, device=starts.device)
    exists = touched.gather(-1, slots)[..., None] & (keys < len(places))
    return exists.flatten(-2), keys.flatten(-2).clamp(max=len(places) - 1).int()
