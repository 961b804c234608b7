"""Slices of masks: some heads, or some query rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from sparse_fmha.distributed import _head_order
from sparse_fmha.masks import block_fields, stripe_mask
from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask

Mask = BlockMask | StripeMask
MASKS = (BlockMask, StripeMask)  # torch.compile before 2.11 does not trace isinstance of a union
MaskOrFunction = Mask | Callable[[Tensor, Tensor], Mask] | None


def kind(mask: MaskOrFunction) -> int:
    """The kind of mask, as a number that ranks can compare."""
    if mask is None:
        return 0
    if isinstance(mask, MASKS):
        return 1 if isinstance(mask, BlockMask) else 2
    if callable(mask):
        return 3
    raise TypeError(
        "mask must be a BlockMask, a StripeMask or a function of q and k that returns one, got "
        f"{type(mask).__name__}"
    )


def check_whole(mask: Mask, tokens: int, tokens_kv: int) -> None:
    """Checks that the mask is for the sequence of all ranks."""
    for name, of_mask, given in (("q", mask.q_len, tokens), ("k", mask.kv_len, tokens_kv)):
        if of_mask != given:
            raise ValueError(
                f"mask must be for the {given} tokens of {name} that the ranks have together, the "
                f"whole sequence, got one for {of_mask}"
            )


def made(mask: Callable[[Tensor, Tensor], Mask], q: Tensor, k: Tensor) -> Mask:
    """Returns the mask that the user's function makes."""
    lists = mask(q, k)
    if not isinstance(lists, MASKS):
        raise TypeError(
            f"mask(q, k) must return a BlockMask or StripeMask, got {type(lists).__name__}"
        )
    return lists


def with_tensors(
    mask: Mask,
    part: Callable[[Tensor], Tensor],
    q_len: int | None = None,
    kv_len: int | None = None,
) -> Mask:
    """Returns a mask with `part` applied to all tensors, and with other lengths if given."""
    module = block_fields if isinstance(mask, BlockMask) else stripe_mask
    tensors: dict[str, Any] = {
        name: None if getattr(mask, name) is None else part(getattr(mask, name))
        for name in module.TENSORS
    }
    size = "block_kv" if isinstance(mask, BlockMask) else "range_size"
    return type(mask)(
        q_len=mask.q_len if q_len is None else q_len,
        kv_len=mask.kv_len if kv_len is None else kv_len,
        block_q=mask.block_q,
        causal=mask.causal,
        **{size: getattr(mask, size)},
        **tensors,
    )


def heads(mask: Mask, own: Sequence[int], whole: int) -> Mask:
    """The mask of one rank's heads; unchanged if it is for all heads or has only these."""
    listed = mask.counts.shape[1]
    if listed == whole > 1:
        return with_tensors(mask, lambda lists: _head_order.taken(lists, own, 1))
    if listed in (1, len(own)):
        return mask
    raise ValueError(
        f"mask must have lists for 1 head, q's {whole} or the {len(own)} of this rank, got {listed}"
    )


def some_heads(mask: Mask, chosen: slice, heads: int) -> Mask:
    """The mask of some of `heads` heads; unchanged if it is for all of them."""
    listed = mask.counts.shape[1]
    if listed == 1:
        return mask
    if listed != heads:
        raise ValueError(f"mask must have lists for 1 head or q's {heads}, got {listed}")
    return with_tensors(mask, lambda lists: lists[:, chosen])


def check_starts(mask: Mask, lengths: Sequence[int]) -> None:
    """Checks that parts of so many queries split no block; the result is the same on every rank."""
    start = 0
    for length in lengths:
        if length and start % mask.block_q:
            raise ValueError(
                "the queries of each part (with zigzag each half of one) must start at a multiple "
                f"of the mask's block_q = {mask.block_q}, got {start}; pad the sequence"
            )
        start += length


def query_rows(mask: Mask, start: int, stop: int) -> Mask:
    """The mask of query rows [start, stop), already checked by `check_starts`.

    A causal mask is aligned to its last key, so it ends at the last key that row stop - 1 may see:
    its `kv_len` is the number of keys to pass. Later blocks and keys stay in the lists, but are
    ignored because they do not exist.
    """
    rows = slice(start // mask.block_q, -(-stop // mask.block_q))
    keys = visible_keys(stop, mask.q_len, mask.kv_len) if mask.causal else mask.kv_len
    return with_tensors(mask, lambda lists: lists[:, :, rows], stop - start, keys)


def visible_keys(stop: int, q_len: int, kv_len: int) -> int:
    """The number of keys that query stop - 1 of q_len sees, causal aligned to the end."""
    return min(max(stop + kv_len - q_len, 0), kv_len)
