"""Masks of single keys, such as HiP's, as token lists of a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha._checks import check_instance, check_int, plain_ints
from sparse_fmha.masks.stripe_mask import StripeMask


@plain_ints
def newest_tokens(mask: StripeMask, heads_kv: int) -> tuple[Tensor, Tensor]:
    """Returns what the last query of a mask sees, as `tokens` of `decode_attention`.

    For masks of methods for prefill whose last query is the new token: `hip`, `token_top_k`,
    `vertical_slash`. The query heads of a KV head share a list, the union of theirs; with as many
    KV heads as query heads it is the mask's last row. Nothing waits for the device.

    Args:
        mask: with at least one query, its keys being those of the cache.
        heads_kv: KV heads of the cache. The mask has a multiple of them as query heads, or one
            query head that stands for all.

    Returns:
        indices int32 `[B|1, 1, Hkv|1, n]`, ascending, then -1; and counts int32 `[B|1, 1, Hkv|1]`.

    Raises:
        ValueError, TypeError: mask has no query, or heads_kv does not divide its heads.
    """
    check_instance("mask", mask, StripeMask)
    check_int("heads_kv", heads_kv, 1)
    heads = mask.counts.shape[1]
    if not mask.q_len:
        raise ValueError("mask must have at least one query, got none")
    if heads > 1 and heads % heads_kv:
        raise ValueError(f"heads_kv must divide the mask's {heads} heads, got {heads_kv}")

    def listed(entries: Tensor, counts: Tensor) -> Tensor:
        place = torch.arange(entries.shape[-1], device=entries.device)
        return entries[:, :, -1].long().masked_fill(place >= counts[:, :, -1, None], mask.kv_len)

    found = listed(mask.columns, mask.counts)
    if mask.range_starts is not None and mask.range_counts is not None:
        starts = listed(mask.range_starts, mask.range_counts)
        runs = starts[..., None] + torch.arange(mask.range_size, device=starts.device)
        found = torch.cat([x.expand(*found.shape[:2], -1) for x in (found, runs.flatten(2))], -1)
    if heads > 1:
        found = found.unflatten(1, (heads_kv, -1)).flatten(2)
    # The last query sees all keys that are listed, causal or not.
    found = found.clamp(max=mask.kv_len).sort(-1).values
    again = torch.zeros_like(found, dtype=torch.bool)
    again[..., 1:] = found[..., 1:] == found[..., :-1]
    found = found.masked_fill(again, mask.kv_len).sort(-1).values
    counts = (found < mask.kv_len).sum(-1)
    tokens = found.masked_fill(found == mask.kv_len, -1)
    return tokens[:, None].int(), counts[:, None].int()
