"""The largest scores of each row as lists, on the CPU: few passes over all scores.

The k largest of a row lie in the k groups of neighbours with the largest maxima: an element of
another group has k elements before it, the first maxima of those groups. So all scores are read
for their groups' maxima, and only `GROUP * k` are looked at one by one. Both choices are made by
integers of a value and, behind it, a place, no two of which are equal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.masks.block_lists import ABSENT

GROUP = 32  # a few vectors of a core
NOTHING = -0x7F800001  # what `_in_order` makes of -inf
LOW = (1 << 32) - 1


def looks(scores: Tensor) -> bool:
    """Whether values decide what is done next: on the CPU, and in no mode that cannot see them."""
    if scores.device.type != "cpu" or torch.compiler.is_compiling() or not scores.numel():
        return False
    modes = torch._C._len_torch_dispatch_stack()
    return modes == 0 and torch._C._functorch.peek_interpreter_stack() is None


def applies(scores: Tensor, k: int) -> bool:
    """Whether `largest` may be called, and is faster than a map."""
    return looks(scores) and scores.dtype != torch.float64 and 0 < 4 * k <= scores.shape[-1]


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Counts int32 `[rows]` and ascending indices int32 `[rows, k]` of `[rows, n]`.

    As `top_k_indices`; n is at least 4 k and k at least 1.
    """
    n = rows.shape[-1]
    if n < 2 * GROUP * k:
        rows = rows.float()
        keys = _keys(
            rows.masked_fill(rows.isnan(), -torch.inf), torch.arange(n, device=rows.device)
        )
        return _listed(keys.topk(k, -1, sorted=False).values)
    if n % GROUP:
        rows = torch.nn.functional.pad(rows, (0, -n % GROUP), value=-torch.inf)
    groups = rows.unflatten(-1, (-1, GROUP))
    best = groups.amax(-1)
    if bool(best.isnan().any()):
        groups = groups.masked_fill(groups.isnan(), -torch.inf)
        best = groups.amax(-1)
    keys = _keys(best.float(), torch.arange(best.shape[-1], device=rows.device))
    taken = _places(keys.topk(k, -1, sorted=False).values)[..., None]
    values = groups.gather(1, taken.expand(-1, -1, GROUP)).float()
    places = taken * GROUP + torch.arange(GROUP, device=rows.device)
    keys = _keys(values, places).flatten(1)
    return _listed(keys.topk(k, -1, sorted=False).values)


def _keys(values: Tensor, places: Tensor) -> Tensor:
    """Int64 that order as fp32 values do, without NaN, and of equal ones the first place first."""
    bits = (values + 0.0).view(torch.int32)  # of -0 those of 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32).bitwise_or_(LOW - places)


def _places(keys: Tensor) -> Tensor:
    return LOW - (keys & LOW)


def _listed(keys: Tensor) -> tuple[Tensor, Tensor]:
    there = (keys >> 32) > NOTHING
    behind = torch.iinfo(torch.int32).max
    places = _places(keys).int().masked_fill_(~there, behind).sort(-1).values
    return there.sum(-1, dtype=torch.int32), places.masked_fill_(places == behind, ABSENT)
