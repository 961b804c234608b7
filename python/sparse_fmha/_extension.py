"""The extension `_C`. Import it from here and only where needed: the ops work without it."""

from __future__ import annotations

import platform

import torch  # noqa: F401  loads libtorch_cpu.so, which the extension links to

try:
    from sparse_fmha import _C
except ImportError as error:
    raise ImportError(
        f"sparse_fmha's extension _C is missing for Python {platform.python_version()}; "
        "kernels(), build_info(), explain() and simulate() need it; install the package with "
        f"`pip install .` ({error})"
    ) from error

__all__ = ["_C"]
