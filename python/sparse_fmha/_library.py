"""Finds and loads libsparse_fmha.so, which registers the ops."""

from __future__ import annotations

import re
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("libsparse_fmha.so")
OLDEST_TORCH = (2, 10)


def load() -> None:
    """Loads the op library once.

    Raises:
        ImportError: torch is older than 2.10, or the library is missing or does not load.
    """
    numbers = re.findall(r"\d+", torch.__version__)[:2]
    if tuple(map(int, numbers)) < OLDEST_TORCH:
        raise ImportError(
            f"sparse_fmha needs torch >= {'.'.join(map(str, OLDEST_TORCH))}; "
            f"torch {torch.__version__} is installed"
        )
    if not LIBRARY.exists():
        raise ImportError(
            f"sparse_fmha's op library {LIBRARY} is missing; "
            "install the package with `pip install .`"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        raise ImportError(f"sparse_fmha's op library {LIBRARY} does not load: {error}") from error
