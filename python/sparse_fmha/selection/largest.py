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
    n = scores.shape[-1]
    if scores.dtype == torch.float64 or not 0 < 4 * k <= n:
        return False
    if scores.device.type == "cpu":
        return looks(scores)
    # Where ordering few candidates takes the place of ordering all.
    traced = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack()
    return not traced and bool(scores.numel()) and n >= 2 * GROUP * k


def largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns counts int32 `[rows]` and ascending indices int32 `[rows, k]` for `[rows, n]`.

    Like `top_k_indices`; requires k >= 1 and n >= 4 k.
    """
    if not looks(rows):  # else `places` does
        rows = rows.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    found = places(rows, k)
    there = found >= 0
    behind = torch.iinfo(torch.int32).max
    found = found.masked_fill_(~there, behind).sort(-1).values
    return there.sum(-1, dtype=torch.int32), found.masked_fill_(found == behind, ABSENT)


def places(scores: Tensor, k: int) -> Tensor:
    """Returns the places of the k largest scores of each row, int32 `[..., k]` in any order.

    -1 stands for scores of -inf. Ties take the lowest place.

    Args:
        scores: `[..., n]`; k at most n. NaN is never taken; where code may not look at values, rows
            must have no NaN, or nothing but NaN and -inf.
    """
    n = scores.shape[-1]
    if n < 2 * GROUP * k:
        values = scores.float()
        values = values.masked_fill(values.isnan(), -torch.inf)
        keys = _keys(values, torch.arange(n, device=scores.device))
        return _listed(keys.topk(k, -1, sorted=False).values)
    if n % GROUP:
        scores = torch.nn.functional.pad(scores, (0, -n % GROUP), value=-torch.inf)
    groups = scores.unflatten(-1, (-1, GROUP))
    best = groups.amax(-1)
    if looks(scores) and bool(best.isnan().any()):
        groups = groups.masked_fill(groups.isnan(), -torch.inf)
        best = groups.amax(-1)
    keys = _keys(best.float(), torch.arange(best.shape[-1], device=scores.device))
    taken = _places(keys.topk(k, -1, sorted=False).values)[..., None]
    values = groups.gather(-2, taken.expand(*taken.shape[:-1], GROUP)).float()
    values = values.masked_fill(values.isnan(), -torch.inf)
    found = taken * GROUP + torch.arange(GROUP, device=scores.device)
    keys = _keys(values, found).flatten(-2)
    return _listed(keys.topk(k, -1, sorted=False).values)


def _keys(values: Tensor, places: Tensor) -> Tensor:
    """Returns int64 keys that order like fp32 values (no NaN); among equal ones the first wins."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32).bitwise_or_(LOW - places)


def _places(keys: Tensor) -> Tensor:
    return LOW - (keys & LOW)


def _listed(keys: Tensor) -> Tensor:
    return _places(keys).int().masked_fill_((keys >> 32) <= NOTHING, ABSENT)
