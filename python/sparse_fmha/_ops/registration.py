"""Loads the ops, and adds what Python adds: shapes for tracing, derivatives, vmap, autocast."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from sparse_fmha._ops import autocast, derivatives, library, shapes, symbolic, vmap

MECHANISMS = ("fmha", "neighborhood", "block_sparse", "stripe")
THRESHOLD = 3  # place of the threshold among the arguments of the ops that skip

_registrations = torch.library.Library("sparse_fmha", "IMPL")

ANCHOR_OPS = {
    "anchor_means": shapes.anchor_means,
    "anchor_keys": shapes.anchor_keys,
    "anchor_columns": shapes.anchor_columns,
}
FLOAT_ANCHOR_OPS = ("anchor_means",)  # the others return lists of integers


def _autocast_of(name: str, device: str, skips: bool):
    def run(*args: object) -> tuple[Tensor, ...]:
        threshold = args[THRESHOLD] if skips else None
        args = autocast.cast(device, *args)
        if skips:
            args = (*args[:THRESHOLD], threshold, *args[THRESHOLD + 1 :])
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.sparse_fmha, name)(*args)

    return run


def register() -> None:
    """Registers the ops with torch; once a process."""
    library.load()
    for mechanism, skips in itertools.product(MECHANISMS, (False, True)):
        name = f"{mechanism}_skip_fwd" if skips else f"{mechanism}_fwd"
        fake = shapes.outputs_and_tiles if skips else shapes.outputs
        for each in (name, symbolic.define(name)):
            op = _register(each, fake)
            derivatives.register(_registrations, op)
            for device, key in autocast.KEYS.items():
                _registrations.impl(each, _autocast_of(each, device, skips), key)
    for name, fake in ANCHOR_OPS.items():
        if name in FLOAT_ANCHOR_OPS:
            for each in (name, symbolic.define(name)):
                derivatives.register(_registrations, _register(each, fake))
        else:
            derivatives.register_no_derivative(_registrations, _register(name, fake))


def _register(name: str, fake: Callable[..., object]) -> torch._ops.OpOverload:
    """What every op has: shapes for tracing, and vmap."""
    op = getattr(torch.ops.sparse_fmha, name).default
    torch.library.register_fake(op.name(), fake)
    vmap.register(_registrations, op)
    return op
