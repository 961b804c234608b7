"""Bytes of tensors that are alive at once, by their storages; on the meta device at any size."""

import gc
import inspect
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_fmha import _checks


class Live(TorchDispatchMode):
    """The most bytes that tensors made in this context have at once; what an op's kernel allocates
    inside itself is not seen."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {self.key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and self.key(x) not in given | self.sizes.keys():
                self.add(x.untyped_storage(), self.key(x))
        return result

    @staticmethod
    def key(x):
        return x.untyped_storage()._cdata

    def add(self, storage, key):
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.now -= self.sizes.pop(key)


def peak_bytes(call):
    """Of a call in inference mode, its result included."""
    gc.collect()
    with torch.inference_mode(), Live() as live:
        call()
    return live.peak


def allow_meta(monkeypatch):
    """Lets public functions take tensors of the meta device, which are refused otherwise."""
    monkeypatch.setitem(_checks.DTYPES, "meta", _checks.DTYPES["cuda"])
    for _, function in inspect.getmembers(_checks, inspect.isfunction):
        defaults = function.__defaults__ or ()
        if ("cpu", "cuda") in defaults:
            more = tuple((*d, "meta") if d == ("cpu", "cuda") else d for d in defaults)
            monkeypatch.setattr(function, "__defaults__", more)
