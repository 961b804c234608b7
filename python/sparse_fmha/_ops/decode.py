"""Registrations of the ops of decode attention.

Caches are not cast by autocast, which would copy them in each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives, symbolic


def register(library: torch.library.Library) -> None:
    functional = torch.ops.sparse_fmha.decode.default
    for op in (functional, _made(symbolic.define(functional))):
        torch.library.register_fake(op.name(), _shapes)
        derivatives.register(library, op)
    into_out = torch.ops.sparse_fmha.decode_out.default
    for op in (into_out, _made(symbolic.define(into_out))):
        torch.library.register_fake(op.name(), _shapes_without_out)
        derivatives.refuse(library, op)


def _made(name: str) -> torch._ops.OpOverload:
    op: torch._ops.OpOverload = getattr(torch.ops.sparse_fmha, name).default
    return op


def _shapes(q: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out like q; lse `[B, Lq, Hq]` in fp32; tile counts `[B, Hkv, 2]`, or 0 without thresholds."""
    return q.new_empty(q.shape), *_rest("decode", q, *others, **named)


def _shapes_without_out(q: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
    return _rest("decode_out", q, *others, **named)


def _rest(name: str, q: Tensor, *others: Any, **named: Any) -> tuple[Tensor, Tensor]:
    schema = getattr(torch.ops.sparse_fmha, name).default._schema
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names[1:], others, strict=False)), **named}
    counts = 0 if given.get("skip_threshold") is None else 2
    shape = (q.shape[0], given["k_cache"].shape[2], counts)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return lse, q.new_empty(shape, dtype=torch.int64)
