"""Which architecture's kernels calls on GPUs take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def arch_override(arch: str) -> Iterator[None]:
    """Makes calls on GPUs take the kernels of another architecture, for tests and benchmarks.

    It holds for all threads of the process, because gradients are computed in other threads. What
    the architecture lacks raises; no other one is tried. Kernels that were never run on the device
    may be used inside.

    Args:
        arch: "sm80", "sm86" or "sm90"; `kernels()` has their rows.

    Raises:
        ValueError: there is no such architecture.
        RuntimeError: from a call inside: the GPU cannot run these kernels, or this build has none.
        ImportError: the extension `_C` is missing for this Python.
    """
    from sparse_fmha._extension import _C

    before = _C.set_arch_override(arch)
    try:
        yield
    finally:
        _C.set_arch_override(before)


def allow_untested(allow: bool = True) -> None:
    """Lets calls take kernels that were never run on a GPU like the tensors'.

    `kernels()` has the status of each row by compute capability: "measured" (tests passed, figures
    are published), "ran" (tests passed) or "compiled" (never run there). A call that would take a
    compiled row raises a RuntimeError until this function is called once, or
    `SPARSE_FMHA_ALLOW_UNTESTED=1` is in the environment.

    Args:
        allow: whether they may be taken, from now on and in all threads.

    Raises:
        ImportError: the extension `_C` is missing for this Python.
    """
    from sparse_fmha._extension import _C

    _C.allow_untested(allow)
