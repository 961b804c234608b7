"""The last part of all public functions: call the op and return the requested results."""

from __future__ import annotations

from torch import Tensor

from sparse_fmha import skipping
from sparse_fmha.attention import _calls, _scores
from sparse_fmha.skipping import SkipStats

# out, then lse and the tile counts if requested.
Output = Tensor | tuple[Tensor, Tensor | SkipStats] | tuple[Tensor, Tensor, SkipStats]


def run(
    mechanism: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rest: _calls.Rest | None,
    check: _calls.Check,
    skip_threshold: float | Tensor,
    return_lse: bool,
    return_stats: bool,
    sink: Tensor | None = None,
    biases: _scores.Biases = (),
) -> Output:
    """Calls the mechanism's op with `_calls.run` and returns the requested results."""
    name = f"{mechanism}_fwd"
    results = _calls.run(name, q, k, v, rest, check, skip_threshold, return_stats, biases)
    if sink is not None:
        _scores.check_sink(sink, q)
        results = [*_scores.add_sink(results[0], results[1], sink), *results[2:]]
    if return_stats:
        stats = skipping.SkipStats(*results[2].unbind(-1))
        return (results[0], results[1], stats) if return_lse else (results[0], stats)
    return (results[0], results[1]) if return_lse else results[0]
