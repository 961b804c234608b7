"""Lists of the largest scores of each row on the CPU, in few passes over the scores.

The k largest scores of a row lie in the k groups of adjacent elements with the largest maxima: an
element of another group ranks after the maxima of these k groups. So all scores are read once for
the group maxima, and only `GROUP * k` are compared one by one. Both steps compare integers with the
value in the high bits and the place in the low bits, so there are no ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha.masks.block_lists import ABSENT

GROUP = 32  # a few SIMD vectors
NOTHING = -0x7F800001  # the high bits of the key of -inf in `_keys`
LOW = (1 << 32) - 1


def looks(scores: Tensor) -> bool:
    """Whether code may branch on values: on the CPU, not under tracing, vmap or a dispatch mode."""
    if scores.device.type != "cpu" or torch.compiler.is_compiling() or not scores.numel():
        return False
    modes = torch._C._len_torch_dispatch_stack()
    return modes == 0 and torch._C._functorch.peek_interpreter_stack() is None


def applies(scores: Tensor, k: int) -> bool:
    """Whether `largest` is allowed, and faster than a map."""
    return looks(scores) and scores.dtype != torch.float64 and 0 < 4 * k <= scores.shape[-1]


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns counts int32 `[rows]` and ascending indices int32 `[rows, k]` for `[rows, n]`.

    Like `top_k_indices`; requires k >= 1 and n >= 4 k.
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
    """Returns int64 keys that order like fp32 values (no NaN); among equal ones the first wins."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32).bitwise_or_(LOW - places)


def _places(keys: Tensor) -> Tensor:
    return LOW - (keys & LOW)


def _listed(keys: Tensor) -> tuple[Tensor, Tensor]:
    there = (keys >> 32) > NOTHING
    behind = torch.iinfo(torch.int32).max
    places = _places(keys).int().masked_fill_(~there, behind).sort(-1).values
    return there.sum(-1, dtype=torch.int32), places.masked_fill_(places == behind, ABSENT)
