"""Loads the ops, and adds what Python adds: shapes for tracing, derivatives, vmap, autocast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_fmha import _derivatives, _library, _symbolic, _vmap
from sparse_fmha._block_lists import ceil_div

MECHANISMS = ("fmha", "neighborhood", "block_sparse", "stripe")
AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}

_registrations = torch.library.Library("sparse_fmha", "IMPL")


def _forward_of(threshold: int) -> Callable[..., list[Tensor]]:
    """For an op of attention, by the place of `skip_threshold` among its arguments.

    Out like q and the log-sum-exp `[B, *L, Hq]` in fp32, both contiguous; with a threshold also the
    tiles visited and skipped, `[B, Hq, 2]`.
    """

    def fake(*args: object) -> list[Tensor]:
        q = args[0]
        results = [q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)]
        if len(args) > threshold and args[threshold] is not None:
            results.append(q.new_empty((q.shape[0], q.shape[-2], 2), dtype=torch.int64))
        return results

    return fake


def _anchor_means(q: Tensor, k: Tensor, block: int, step: int, scale: float) -> Tensor:
    """`[B, Hq, blocks]` in fp32."""
    shape = (q.shape[0], q.shape[2], ceil_div(q.shape[1], block))
    return q.new_empty(shape, dtype=torch.float32)


def _anchor_keys(
    q_mean: Tensor, k: Tensor, least: Tensor, block: int, step: int
) -> tuple[Tensor, Tensor]:
    """Bits `[B, Hq, superblocks, words]` and counts, as int32."""
    superblocks = ceil_div(q_mean.shape[2], step)
    words = anchor_words(q_mean.shape[2], block, step)
    shape = (*q_mean.shape[:2], superblocks)
    return k.new_empty((*shape, words), dtype=torch.int32), k.new_empty(shape, dtype=torch.int32)


def _anchor_columns(bits: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Columns `[B, Hq, superblocks, width]` and counts."""
    return bits.new_empty((*bits.shape[:3], width)), bits.new_empty(bits.shape[:3])


def anchor_words(blocks: int, block: int, step: int) -> int:
    """32-bit words with a bit for each candidate of the last superblock of `anchor_keys`."""
    return max(0, (ceil_div(blocks, step) - 1) * step - 2) * block // 32


ANCHOR_OPS = {
    "anchor_means": _anchor_means,
    "anchor_keys": _anchor_keys,
    "anchor_columns": _anchor_columns,
}
FLOAT_ANCHOR_OPS = ("anchor_means",)  # the others return lists of integers


def cast(device: str, *args: object) -> tuple:
    """The arguments, with tensors of that device in the dtype `torch.autocast` asks for there.

    As PyTorch's own ops under autocast, fp64 is left alone.
    """
    dtype = torch.get_autocast_dtype(device)
    casts = (torch.float16, torch.bfloat16, torch.float32)
    return tuple(
        a.to(dtype) if isinstance(a, Tensor) and a.device.type == device and a.dtype in casts else a
        for a in args
    )


def _autocast_of(
    op: torch._ops.OpOverload, device: str, threshold: int
) -> Callable[..., list[Tensor]]:
    def run(*args: object) -> list[Tensor]:
        args = *cast(device, *args[:threshold]), *args[threshold:]
        with torch.autocast(device, enabled=False):
            return op(*args)

    return run


def register() -> None:
    """Registers the ops with torch; once a process."""
    _library.load()
    for mechanism in MECHANISMS:
        name = f"{mechanism}_fwd"
        arguments = getattr(torch.ops.sparse_fmha, name).default._schema.arguments
        threshold = [each.name for each in arguments].index("skip_threshold")
        for each in (name, _symbolic.define(name)):
            op = _register(each, _forward_of(threshold))
            _derivatives.register(_registrations, op)
            for device, key in AUTOCAST_KEYS.items():
                _registrations.impl(each, _autocast_of(op, device, threshold), key)
    for name, fake in ANCHOR_OPS.items():
        if name in FLOAT_ANCHOR_OPS:
            for each in (name, _symbolic.define(name)):
                _derivatives.register(_registrations, _register(each, fake))
        else:
            _derivatives.register_no_derivative(_registrations, _register(name, fake))


def _register(name: str, fake: Callable[..., object]) -> torch._ops.OpOverload:
    """What every op has: shapes for tracing, and vmap."""
    op = getattr(torch.ops.sparse_fmha, name).default
    torch.library.register_fake(op.name(), fake)
    _vmap.register(_registrations, op)
    return op
