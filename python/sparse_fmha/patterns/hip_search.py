"""What HiP's search for prefill and that for decoding have in common."""

from __future__ import annotations

from sparse_fmha._checks import check_int
from sparse_fmha._sizes import ceil_div


def check_keys(keys: int, granule: int) -> int:
    """Checks both numbers; returns how many chunks have as many keys."""
    check_int("granule", granule, 1)
    if check_int("keys", keys, 1) % granule:
        raise ValueError(f"keys must be a multiple of granule = {granule}, got {keys}")
    return keys // granule


def halvings(keys: int, chunks: int, granule: int) -> int:
    """Returns how often chunks of at most `keys` keys together are halved."""
    times, longest = 0, ceil_div(keys, chunks)
    while longest > granule:
        times, longest = times + 1, ceil_div(longest, 2)
    return times
