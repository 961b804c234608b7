"""Finds and loads libsparse_fmha.so, which registers the ops."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from sparse_fmha._versions import require

LIBRARY = Path(__file__).parents[1] / "libsparse_fmha.so"  # beside the package's own files


def load() -> None:
    """Loads the op library once.

    Raises:
        ImportError: torch or numpy is too old, or the library is missing or does not load.
    """
    require("torch")
    if "numpy" in sys.modules:  # torch imports it if installed
        require("numpy")
    if not LIBRARY.exists():
        raise ImportError(
            f"sparse_fmha's op library {LIBRARY} is missing; "
            "install the package with `pip install .`"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(
            f"sparse_fmha's op library {LIBRARY} cannot be loaded: {error}"
        ) from error
