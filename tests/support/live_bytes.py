"""Bytes of tensors that are alive at once, by their storages; on the meta device at any size."""

import gc
import inspect
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness.live import LiveBytes
from sparse_fmha import _checks


class Live(TorchDispatchMode):
    """The most bytes that tensors made in this context have at once; what an op's kernel allocates
    inside itself is not seen."""

    def __init__(self):
        super().__init__()
        self.bytes = LiveBytes()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tensors_in((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self.bytes.hold(tensors_in(result), given)
        return result


def tensors_in(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak_bytes(call):
    """Of a call in inference mode, its result included."""
    gc.collect()
    with torch.inference_mode(), Live() as live:
        call()
    return live.bytes.peak


def allow_meta(monkeypatch):
    """Lets public functions take tensors of the meta device, which are refused otherwise."""
    monkeypatch.setitem(_checks.DTYPES, "meta", _checks.DTYPES["cuda"])
    for _, function in inspect.getmembers(_checks, inspect.isfunction):
        defaults = function.__defaults__ or ()
        if ("cpu", "cuda") in defaults:
            more = tuple((*d, "meta") if d == ("cpu", "cuda") else d for d in defaults)
            monkeypatch.setattr(function, "__defaults__", more)
