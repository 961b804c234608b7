"""The op `write_mean`, which merges results of attention into the memory of the first one.

In a compiled graph it keeps them from a later, larger kernel, which would hold all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives
from sparse_fmha._sizes import CACHED, SLICE

_library = torch.library.Library("sparse_fmha", "FRAGMENT")
_library.define("write_mean(Tensor(a!) first, Tensor[] others, Tensor weights) -> ()")


def write_mean(
    result: Tensor, outs: Sequence[Tensor], weights: Tensor, nothing: Tensor | None = None
) -> Tensor:
    """Writes the weighted mean of outs, a few rows at a time, as its temporaries are fp32.

    Args:
        result: may be the first of outs.
        nothing: bool like weights: entries of outs that are not read.
    """
    dim = max(range(weights.dim() - 1), key=weights.shape[1:].__getitem__)
    rows = result.shape[dim]
    most = CACHED if result.device.type == "cpu" else SLICE
    step = max(1, most * rows // max(1, result.numel()))
    for first in range(0, rows, step):
        part = dim, first, min(step, rows - first)
        own = [w.narrow(*part)[..., None] for w in weights]
        some = [out.narrow(*part) for out in outs]
        if nothing is not None:
            masks = [x.narrow(*part)[..., None] for x in nothing]
            some = [x.masked_fill(mask, 0) for x, mask in zip(some, masks, strict=True)]
        mean = own[0] * some[0]
        for weight, out in zip(own[1:-1], some[1:-1], strict=True):
            mean.addcmul_(weight, out)
        if len(outs) > 1:
            torch.addcmul(mean, own[-1], some[-1], out=result.narrow(*part))
        else:
            result.narrow(*part).copy_(mean)
    return result


@torch.library.impl(_library, "write_mean", "CompositeExplicitAutograd")
def _write_mean(first: Tensor, others: list[Tensor], weights: Tensor) -> None:
    write_mean(first, [first, *others], weights)


torch.library.register_fake("sparse_fmha::write_mean", lambda *_args: None, lib=_library)
derivatives.refuse(_library, torch.ops.sparse_fmha.write_mean.default)
