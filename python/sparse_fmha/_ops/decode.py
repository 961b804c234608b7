"""Registrations of the ops of decode attention.

Caches are not cast by autocast, which would copy them in each step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives


def register(library: torch.library.Library) -> None:
    functional = torch.ops.sparse_fmha.decode.default
    into_out = torch.ops.sparse_fmha.decode_out.default
    for op, shapes in ((functional, _shapes), (into_out, _shapes_without_out)):
        torch.library.register_fake(op.name(), shapes)
    derivatives.register(library, functional)
    library.impl(into_out._opname, _refuse_derivatives, "Autograd", with_keyset=True)


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


def _refuse_derivatives(keyset: torch._C.DispatchKeySet, *args: Any) -> object:
    op = torch.ops.sparse_fmha.decode_out.default
    recorded = torch.is_grad_enabled() and derivatives.any_requires_grad(*args)
    if recorded or any(derivatives.has_tangent(a) for a in args if isinstance(a, Tensor)):
        raise NotImplementedError(
            f"{op.name()} has no derivatives; call it under torch.no_grad(), or detach its inputs"
        )
    return op._handle.redispatch_boxed(keyset & derivatives.AFTER_AUTOGRAD, *args)
