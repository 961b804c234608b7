"""Checks of block masks. Messages name the argument, its value, and what is allowed."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha._sizes import ceil_div
from sparse_fmha.masks import block_lists
from sparse_fmha.masks.parts import BlockParts

BLOCKS_Q = (64, 128)
BLOCKS_KV = (16, 32, 64, 128)
ROWS = "(batch, head, query block) {0}"


def check_sizes(q_len: int, kv_len: int, block_q: int, block_kv: int, causal: bool) -> None:
    named = {"q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_kv": block_kv}
    for name, value in named.items():
        check_count(name, value)
    for name, allowed in (("block_q", BLOCKS_Q), ("block_kv", BLOCKS_KV)):
        if named[name] not in allowed:
            raise ValueError(f"{name} must be {_checks.one_of(allowed)}, got {named[name]}")
    _checks.check_flag("causal", causal)


def check_int(name: str, value: int) -> None:
    if not isinstance(value, Integral | torch.SymInt) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")


def check_count(name: str, value: int) -> None:
    check_int(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_width(name: str, width: int | None) -> None:
    """Checks the capacity of lists; None means that it is not given."""
    if width is not None:
        check_count(name, width)


def check_list_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, axes: int | None = None
) -> None:
    _checks.check_strided(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, got {tensor.dtype}")
    if axes is not None and tensor.dim() != axes:
        raise ValueError(f"{name} must have {axes} dimensions, got shape {list(tensor.shape)}")


def check_lists(prefix: str, counts: Tensor, indices: Tensor, q_len: int, block_q: int) -> None:
    """Checks counts `[B|1, H|1, nQ]` and indices `[B|1, H|1, nQ, width]`: int32, one device."""
    rows = ceil_div(q_len, block_q)
    what = f"query blocks of {block_q}"
    check_list_pair(f"{prefix}counts", counts, f"{prefix}indices", indices, rows, what)


def check_list_pair(
    counts_name: str, counts: Tensor, name: str, indices: Tensor, rows: int, what: str
) -> None:
    """Checks counts `[B|1, H|1, rows]` and indices `[B|1, H|1, rows, width]`: int32, one device."""
    for each, tensor, axes in ((counts_name, counts, 3), (name, indices, 4)):
        check_list_tensor(each, tensor, torch.int32, axes)
        if tensor.shape[2] != rows:
            raise ValueError(f"{each} must have {rows} {what}, got shape {list(tensor.shape)}")
    if indices.shape[:3] != counts.shape:
        raise ValueError(
            f"{name} must have the shape of {counts_name}, {list(counts.shape)}, and one more "
            f"dimension, got {list(indices.shape)}"
        )
    if counts.device != indices.device:
        raise ValueError(
            f"{name} must be on the device of {counts_name}, {counts.device}, got {indices.device}"
        )


def check_tensors(mask: BlockParts) -> None:
    check_lists("", mask.counts, mask.indices, mask.q_len, mask.block_q)
    partial = {
        name: getattr(mask, name) for name in ("partial_counts", "partial_indices", "partial_bits")
    }
    missing = [name for name, tensor in partial.items() if tensor is None]
    if len(missing) == 3:
        return
    if missing:
        raise ValueError(
            f"partial tensors must be given all or none, got none for {', '.join(missing)}"
        )
    counts, indices, bits = partial.values()
    check_lists("partial_", counts, indices, mask.q_len, mask.block_q)
    check_list_tensor("partial_bits", bits, torch.uint8)
    if counts.shape != mask.counts.shape:
        raise ValueError(
            f"partial_counts must have the shape of counts, {list(mask.counts.shape)}, got "
            f"{list(counts.shape)}"
        )
    needed = (*indices.shape, mask.block_q, mask.block_kv // 8)
    if bits.shape != needed:
        raise ValueError(f"partial_bits must have shape {list(needed)}, got {list(bits.shape)}")
    for name, tensor in partial.items():
        if tensor.device != mask.counts.device:
            raise ValueError(
                f"{name} must be on the device of counts, {mask.counts.device}, got {tensor.device}"
            )


def check_blocks(blocks: Tensor, q_len: int, kv_len: int, block_q: int, block_kv: int) -> None:
    check_list_tensor("blocks", blocks, torch.bool)
    needed = (ceil_div(q_len, block_q), ceil_div(kv_len, block_kv))
    if blocks.dim() != 4 or blocks.shape[2:] != needed:
        raise ValueError(
            f"blocks must have shape [batch or 1, heads or 1, {needed[0]}, {needed[1]}] for "
            f"lengths {q_len} and {kv_len} in blocks of {block_q}x{block_kv}, got "
            f"{list(blocks.shape)}"
        )


def check_dense(visible: Tensor) -> None:
    check_list_tensor("visible", visible, torch.bool)
    if not 2 <= visible.dim() <= 4:
        raise ValueError(
            "visible must have shape [q_len, kv_len], [heads, q_len, kv_len] or [batch, heads, "
            f"q_len, kv_len], got {list(visible.shape)}"
        )


def validate(mask: BlockParts) -> None:
    """Checks the values in the lists; waits for the device."""
    blocks = mask.blocks_kv
    validate_ordered("", mask.counts, mask.indices, blocks)
    if mask.partial is None:
        return
    counts, indices, _ = mask.partial
    validate_ordered("partial_", counts, indices, blocks)
    full = block_lists.block_map(mask.counts, mask.indices, blocks)
    partial = block_lists.block_map(counts, indices, blocks)
    refuse(full & partial, f"block {{3}} of {ROWS} must be full or partial, got both")


def validate_ordered(prefix: str, counts: Tensor, indices: Tensor, blocks: int) -> None:
    """Checks that counts fit the width and that blocks exist and ascend."""
    validate_counts(f"{prefix}counts", counts, indices, ROWS)
    read = slots_read(counts, indices)
    validate_range(f"{prefix}indices", indices, read, blocks, "key block", ROWS)
    validate_order(f"{prefix}indices", indices, read, "block", ROWS)


def validate_unordered(counts: Tensor, indices: Tensor, blocks: int) -> None:
    """Like `validate_ordered`, but blocks may be in any order, with -1 among them."""
    validate_counts("counts", counts, indices, ROWS)
    read = slots_read(counts, indices) & (indices != block_lists.ABSENT)
    validate_range("indices", indices, read, blocks, "key block", ROWS)
    ordered = torch.where(read, indices, blocks).sort(-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] < blocks)
    refuse(twice, f"indices of {ROWS} have a block twice")


def validate_width(blocks: Tensor, width: int) -> None:
    """Checks that each row's blocks fit in its list; waits for the device."""
    wrong = (blocks.sum(-1) > width)[..., None]
    refuse(wrong, f"blocks of {ROWS} are more than width {width} can hold")


def slots_read(counts: Tensor, indices: Tensor) -> Tensor:
    """Returns the slots before the count: bool, with the shape of indices."""
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def validate_counts(name: str, counts: Tensor, indices: Tensor, rows: str) -> None:
    width = indices.shape[-1]
    wrong = ((counts < 0) | (counts > width))[..., None]
    refuse(wrong, f"{name} of {rows} must be from 0 to {width}, the width of the list")


def validate_range(
    name: str, indices: Tensor, read: Tensor, end: int, what: str, rows: str
) -> None:
    wrong = read & ((indices < 0) | (indices >= end))
    refuse(wrong, f"{name} of {rows} must have a {what} from 0 to {end - 1} in slot {{3}}")


def validate_order(name: str, indices: Tensor, read: Tensor, what: str, rows: str) -> None:
    descends = (indices[..., 1:] <= indices[..., :-1]) & read[..., 1:]
    refuse(
        descends,
        f"{name} of {rows} must ascend and list each {what} once, also after slot {{3}}",
    )


def refuse(wrong: Tensor, message: str) -> None:
    """Raises if any entry is set; {0} in the message is (batch, head, row), {3} the last index."""
    places = wrong.nonzero()
    if len(places):
        *row, last = places[0].tolist()
        raise ValueError(message.format(tuple(row), None, None, last))
