"""What all public functions do last: call the op, and return what is asked for."""

from __future__ import annotations

from torch import Tensor

from sparse_fmha import skipping
from sparse_fmha._ops import symbolic
from sparse_fmha.skipping import SkipStats

# out, then lse and the counts of tiles where they are asked for.
Output = Tensor | tuple[Tensor, Tensor | SkipStats] | tuple[Tensor, Tensor, SkipStats]


def call(
    mechanism: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rest: tuple[object, ...],
    skip_threshold: float | Tensor,
    return_lse: bool,
    return_stats: bool,
) -> Output:
    """Calls the mechanism's op and returns what is asked for."""
    threshold = skipping.threshold_of(skip_threshold, q, return_stats)
    results: list[Tensor] = symbolic.call(f"{mechanism}_fwd", q, k, v, *rest, threshold)
    out, lse, *tiles = results
    if return_stats:
        stats = skipping.SkipStats(*tiles[0].unbind(-1))
        return (out, lse, stats) if return_lse else (out, stats)
    return (out, lse) if return_lse else out
