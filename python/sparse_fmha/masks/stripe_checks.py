"""Checks of stripe masks. Messages name the argument, its value, and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.masks import block_checks, block_lists
from sparse_fmha.masks.parts import StripeParts

RANGE_SIZES = (64, 128)
ROWS = "(batch, head, group) {0}"


def check_sizes(q_len: int, kv_len: int, block_q: int, range_size: int, causal: bool) -> None:
    # Lengths and flag have the same rules as in block masks.
    block_checks.check_sizes(q_len, kv_len, 64, 64, causal)
    for name, value in (("block_q", block_q), ("range_size", range_size)):
        block_checks.check_int(name, value)
    if not 64 <= block_q <= 2048 or block_q % 64:
        raise ValueError(f"block_q must be a multiple of 64 from 64 to 2048, got {block_q}")
    if range_size not in RANGE_SIZES:
        allowed = _checks.one_of(RANGE_SIZES)
        raise ValueError(f"range_size must be {allowed}, got {range_size}")


def check_seen(seen: Tensor) -> None:
    block_checks.check_list_tensor("seen", seen, torch.bool)
    if seen.dim() != 4:
        raise ValueError(
            f"seen must have shape [batch or 1, heads or 1, groups, kv_len], got {list(seen.shape)}"
        )


def check_tensors(mask: StripeParts) -> None:
    lists = [("counts", mask.counts, "columns", mask.columns)]
    if (mask.range_starts is None) != (mask.range_counts is None):
        given, missing = ("starts", "counts") if mask.range_counts is None else ("counts", "starts")
        raise ValueError(f"range_{missing} must be given with range_{given}, got only the latter")
    if mask.range_starts is not None and mask.range_counts is not None:
        lists.append(("range_counts", mask.range_counts, "range_starts", mask.range_starts))
    for names in lists:
        block_checks.check_list_pair(*names, mask.groups, f"groups of {mask.block_q} queries")
        name, counts = names[:2]
        if counts.shape != mask.counts.shape:
            raise ValueError(
                f"{name} must have the shape of counts, {list(mask.counts.shape)}, got "
                f"{list(counts.shape)}"
            )
        if counts.device != mask.counts.device:
            raise ValueError(
                f"{name} must be on the device of counts, {mask.counts.device}, got {counts.device}"
            )


def validate(mask: StripeParts) -> None:
    """Checks the values in the lists; waits for the device."""
    block_checks.validate_counts("counts", mask.counts, mask.columns, ROWS)
    read = block_checks.slots_read(mask.counts, mask.columns)
    block_checks.validate_range("columns", mask.columns, read, mask.kv_len, "key", ROWS)
    block_checks.validate_order("columns", mask.columns, read, "key", ROWS)
    if mask.range_starts is None or mask.range_counts is None:
        return
    block_checks.validate_counts("range_counts", mask.range_counts, mask.range_starts, ROWS)
    read = block_checks.slots_read(mask.range_counts, mask.range_starts)
    block_checks.validate_range("range_starts", mask.range_starts, read, mask.kv_len, "key", ROWS)
    # Count how often each key is listed: +1 where a run begins, -1 where it ends.
    times = block_lists.block_map(mask.counts, mask.columns, mask.kv_len).int()
    times = torch.nn.functional.pad(times, (0, mask.range_size + 1))
    steps = torch.zeros_like(times)
    starts = torch.where(read, mask.range_starts, mask.kv_len + mask.range_size).long()
    ones = read.int()
    steps.scatter_add_(-1, starts, ones)
    ends = (starts + mask.range_size).clamp(max=mask.kv_len + mask.range_size)
    steps.scatter_add_(-1, ends, -ones)
    times = (times + steps.cumsum(-1))[..., : mask.kv_len]
    block_checks.refuse(times > 1, f"key {{3}} of {ROWS} is listed more than once")
