"""The ops `merge` and `merge_into`; csrc/ops/merge.cpp documents what they compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives

MOST_PARTS = 32  # kMostParts and kMostDims of core/merge.h; rows have a dimension less than parts
MOST_DIMS = 5
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def register(library: torch.library.Library) -> None:
    torch.library.register_fake("sparse_fmha::merge", _shapes, lib=library)
    torch.library.register_fake("sparse_fmha::merge_into", _shapes_into, lib=library)
    derivatives.refuse(library, torch.ops.sparse_fmha.merge.default)
    derivatives.refuse(library, torch.ops.sparse_fmha.merge_into.default)


def takes(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> bool:
    """Whether the ops compute a merge of checked parts, where no derivative is wanted."""
    out = outs[0]
    return (
        (out.dtype in DTYPES or (out.dtype == torch.float64 and out.device.type != "cuda"))
        and lses[0].dtype == torch.float32
        and out.device.type in ("cpu", "cuda", "meta")
        and len(outs) <= MOST_PARTS
        and out.dim() <= MOST_DIMS + 1
    )


def _shapes(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return outs[0].new_empty(outs[0].shape), _lse(outs[0])


def _shapes_into(first: Tensor, others: list[Tensor], lses: list[Tensor]) -> Tensor:
    return _lse(first)


def _lse(out: Tensor) -> Tensor:
    return out.new_empty(out.shape[:-1], dtype=torch.float32)
