"""What calls add to scores, biases of keys, thresholds of rows and sinks, across ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from sparse_fmha import _checks
from sparse_fmha.attention import _scores
from sparse_fmha.distributed import _collectives, _head_order, _zigzag

KEYS, ROWS, SINK = "key_bias", "row_threshold", "sink"


def sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """What ranks must have in common, as numbers; 0 of what is not given."""
    found: dict[str, int] = {}
    for name in (KEYS, ROWS, SINK):
        given = options.get(name)
        shape = tuple(given.shape[:2]) if isinstance(given, Tensor) else ()
        what = ("heads",) if name == SINK else ("batch", "heads")
        found |= {f"{name}'s {one}": size for one, size in zip(what, (*shape, 0, 0), strict=False)}
    return found


def check(options: Mapping[str, Any], q: Tensor, k: Tensor) -> None:
    """Checks those given against a rank's q and k, which are checked already."""
    for name, x in ((KEYS, k), (ROWS, q)):
        if options.get(name) is not None:
            _checks.check_token_numbers(name, options[name], q, x.shape[1:2])
    if options.get(SINK) is not None:
        _scores.check_sink(options[SINK], q)


def gathered(
    x: Tensor, lengths: Sequence[int], group: dist.ProcessGroup, name: str, zigzag: bool = False
) -> Tensor:
    """Numbers `[B or 1, H or 1, tokens]` of the tokens of all ranks, in the order of k's."""
    if zigzag:
        return _zigzag.gather(x, 2, group, len(lengths), zigzag, name)
    part = _collectives.padded(x.movedim(2, 0), lengths)
    whole = _collectives.all_gather(part, group, len(lengths), name)
    return _collectives.trimmed(whole, lengths).movedim(0, 2)


def of_heads(options: Mapping[str, Any], heads: Sequence[int]) -> dict[str, Any]:
    """The options of a call for some of the query heads, of which those given are for all."""
    found = dict(options)
    for name, dim in ((KEYS, 1), (ROWS, 1), (SINK, 0)):
        given = found.get(name)
        if given is not None and given.shape[dim] > 1:
            found[name] = _head_order.taken(given, heads, dim)
    return found


def of_part(options: Mapping[str, Any], keys: int, rows: slice) -> dict[str, Any]:
    """The options of a call for the first keys and some of the queries."""
    found = dict(options)
    for name, some in ((KEYS, slice(keys)), (ROWS, rows)):
        if found.get(name) is not None:
            found[name] = found[name][:, :, some]
    return found
