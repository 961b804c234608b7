"""What torch ops would do on a GPU, counted without one: kernels, bytes, products, live memory.

An estimate from counts, not a measurement. It knows nothing of caches, of overlap, or of how well a
kernel uses the memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.harness.live import LiveBytes
from sparse_fmha import _checks

BANDWIDTH = 4.8e12  # bytes a second, of an H200's memory
LAUNCH = 3e-6  # seconds a kernel
RATES = {2: 600e12, 4: 50e12, 8: 50e12}  # FLOP/s of products, by bytes of an input's element
# torch scans a dimension that is not the innermost one in one thread for each of the others, and
# takes about this long for an entry: 14 ms for 32768 (docs/lab/2026-11-29-methods.md).
SCAN = 0.4e-6
# Kernels of an op that is not one kernel, and how often they read their input.
KERNELS = {"logsumexp": 3, "topk": 2, "sort": 2, "scatter": 2, "cumsum": 1}
READS = {"logsumexp": 5, "topk": 4, "sort": 4, "_softmax": 1}
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "lift_fresh")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


@dataclass
class Counts:
    """Kernels launched, bytes read and written, FLOPs, seconds by estimate, and bytes held at most
    beside the arguments."""

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: float = 0.0
    peak: int = 0
    by_op: dict[str, list[float]] = field(default_factory=dict)  # kernels, bytes, seconds


def count(call: Callable[..., object], *shapes: tuple[int, ...], dtype: torch.dtype) -> Counts:
    """Counts a call whose arguments are tensors of these shapes, without values ("meta").

    The library treats them as a GPU's, in what it does a few rows at a time. Of its own ops, those
    of dense attention count products; of the others only the bytes of arguments and results count.
    """
    arguments = [torch.empty(shape, dtype=dtype, device="meta") for shape in shapes]
    # Attention refuses tensors without values, but its ops know the shapes of results.
    with mock.patch.object(_checks, "check_tensor"), _Mode() as mode:
        made = call(*arguments)
    del made
    return mode.counts


class _Mode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._live = LiveBytes()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._live.hold(made, given)
        self.counts.peak = self._live.peak
        if not func.is_view and func._schema.name.removeprefix("aten::") not in FREE:
            self._add(func, args, given, made)
        return result

    def _add(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> None:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        kernels = KERNELS.get(name, 1)
        moved = READS.get(name, 1) * sum(map(_bytes, given)) + sum(map(_bytes, made))
        if name in ("gather", "index_select", "index"):  # reads as much as it writes
            moved = sum(map(_bytes, given[1:])) + 2 * sum(map(_bytes, made))
        flops = 0
        if name in PRODUCTS:
            flops = 2 * made[0].numel() * given[-1].shape[-2]
        if name == "sparse_fmha::fmha_fwd":
            q, k = given[:2]
            flops = 4 * q.numel() * k.shape[1] // (2 if True in args[3:4] else 1)
        seconds = moved / BANDWIDTH
        if flops:
            seconds = max(seconds, flops / RATES[given[-1].element_size()])
        if name == "cumsum" and args[1] % given[0].dim() != given[0].dim() - 1:
            seconds = max(seconds, SCAN * given[0].shape[args[1]])
        total = self.counts
        total.kernels += kernels
        total.bytes += moved
        total.flops += flops
        total.seconds += seconds + LAUNCH * kernels
        of_op = total.by_op.setdefault(name, [0, 0, 0.0])
        of_op[:] = of_op[0] + kernels, of_op[1] + moved, of_op[2] + seconds + LAUNCH * kernels


def _bytes(x: Tensor) -> int:
    """Bytes of the elements of x, each once where it is expanded."""
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod(n for n, stride in sizes if stride or n == 0) * x.element_size()
