"""Checks of a mask against the queries and keys of a call."""

from __future__ import annotations

from torch import Tensor

from sparse_fmha.masks.block_mask import BlockMask
from sparse_fmha.masks.stripe_mask import StripeMask


def check_block_mask(mask: BlockMask, q: Tensor, k: Tensor, on_device: bool = True) -> None:
    """Checks a mask for q `[B, Lq, Hq, D]` and k `[B, Lkv, Hkv, D]`; `on_device`: on q's device."""
    if not isinstance(mask, BlockMask):
        raise TypeError(f"mask must be a BlockMask, got {type(mask).__name__}")
    _check_fits(mask, q, k, on_device)


def check_stripe_mask(mask: StripeMask, q: Tensor, k: Tensor, on_device: bool = True) -> None:
    """Like `check_block_mask`."""
    if not isinstance(mask, StripeMask):
        raise TypeError(f"mask must be a StripeMask, got {type(mask).__name__}")
    _check_fits(mask, q, k, on_device)


def has_lengths(mask: BlockMask | StripeMask, q: Tensor, k: Tensor) -> bool:
    """Whether the mask's lengths, which the ops do not receive, are those of q and k."""
    if q is None or k is None:  # None is among what ops receive unchanged, so nothing has checked
        return False
    return q.dim() == 4 == k.dim() and mask.q_len == q.size(1) and mask.kv_len == k.size(1)


def _check_fits(mask: BlockMask | StripeMask, q: Tensor, k: Tensor, on_device: bool) -> None:
    """Checks a mask's lengths, lists and device against q and k."""
    for name, of_mask, given in (("q", mask.q_len, q.shape[1]), ("k", mask.kv_len, k.shape[1])):
        if of_mask != given:
            raise ValueError(
                f"mask must be for the {given} tokens of {name}, got one for {of_mask}"
            )
    named = ("batch entries", q.shape[0]), ("heads", q.shape[2])
    for (what, whole), size in zip(named, mask.counts.shape[:2], strict=True):
        if size not in (1, whole):
            raise ValueError(f"mask must have lists for 1 or q's {whole} {what}, got {size}")
    if on_device and mask.device != q.device:
        raise ValueError(f"mask must be on q's device, {q.device}, got {mask.device}")
