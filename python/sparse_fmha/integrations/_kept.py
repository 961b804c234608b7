"""What methods make once for a size and use in all layers and steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(reason="what a method makes for a size is kept on the host")  # type: ignore[untyped-decorator]
@functools.lru_cache(16)
def kept(make: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns `make(*args, **options)`; the last few results are kept.

    They have no inference tensors, because a later call may need gradients.
    """
    with torch.inference_mode(False):
        return make(*args, **options)
