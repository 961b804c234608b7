"""Loads the ops and registers shapes for tracing, derivatives, vmap and autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_fmha._ops import (
    autocast,
    decode,
    derivatives,
    gradients,
    hip_search,
    library,
    merging,
    packed,
    quest_pages,
    shapes,
    ssa_choices,
    symbolic,
    vmap,
)

MECHANISMS = ("fmha", "neighborhood", "block_sparse", "stripe")

_registrations = torch.library.Library("sparse_fmha", "IMPL")


class Op(NamedTuple):
    """What Python registers for an op, besides its schema and kernels."""

    name: str
    shapes: Callable[..., Tensor | list[Tensor] | tuple[Tensor, ...]]  # called by keyword
    is_attention: bool = False  # if so, autocast casts all but its thresholds
    differentiable: bool = True  # False: its results are integers
    is_packed: bool = False  # tokens of all sequences are in one dimension; on the CPU only

    @property
    def overload(self) -> torch._ops.OpOverload:
        overload: torch._ops.OpOverload = getattr(torch.ops.sparse_fmha, self.name).default
        return overload


OPS = (
    *(Op(f"{name}_bwd", shapes.gradients) for name in MECHANISMS),
    *(Op(f"{name}_fwd", shapes.attention, is_attention=True) for name in MECHANISMS),
    Op("varlen_bwd", shapes.gradients, is_packed=True),
    Op("varlen_fwd", shapes.packed_attention, is_attention=True, is_packed=True),
    Op("anchor_means", shapes.anchor_means),
    Op("anchor_keys", shapes.anchor_keys, differentiable=False),
    Op("anchor_columns", shapes.anchor_columns, differentiable=False),
    Op("score_rows", shapes.score_rows),
    Op("score_columns", shapes.score_columns),
    Op("score_diagonals", shapes.score_diagonals),
    Op("score_block_sums", shapes.score_blocks),
    Op("score_block_maxima", shapes.score_blocks),
)


def register() -> None:
    """Registers the ops with torch, once per process."""
    library.load()
    for op in OPS:
        _register(op)
        if symbolic.has_scale(op.overload):
            _register(op._replace(name=symbolic.define(op.overload)))
    decode.register(_registrations)
    merging.register(_registrations)
    hip_search.register(_registrations)
    quest_pages.register(_registrations)
    ssa_choices.register(_registrations)
    _register_out(torch.ops.sparse_fmha.neighborhood_out.default)


def _register_out(op: torch._ops.OpOverload) -> None:
    """Of an op that writes to its arguments and returns nothing."""
    torch.library.register_fake(op.name(), lambda *_args: None)
    derivatives.refuse(_registrations, op)


def _register(op: Op) -> None:
    overload = op.overload
    names = [argument.name for argument in overload._schema.arguments]

    def fake(*args: object) -> object:
        return op.shapes(**dict(zip(names, args, strict=False)))

    torch.library.register_fake(overload.name(), fake)
    if op.is_packed:
        packed.register(_registrations, overload)
    else:
        vmap.register(_registrations, overload)
    if op.is_attention:
        derivatives.register(
            _registrations,
            overload,
            gradients.backward(overload, names),
            gradients.setup_context(names),
            gradients.saving(overload),
        )
    elif op.differentiable:
        derivatives.register(_registrations, overload)
    else:
        derivatives.register_no_derivative(_registrations, overload)
    if op.is_attention:
        autocast.register(_registrations, overload, names.index("skip_threshold"))
