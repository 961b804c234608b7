"""Loads the ops, and adds what Python adds to them: shapes for tracing, and autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_fmha import _library

NAMES = ("fmha_fwd", "neighborhood_fwd")


def _outputs(q: Tensor, *_args: object, **_kwargs: object) -> tuple[Tensor, Tensor]:
    """Out like q and the log-sum-exp `[B, *L, Hq]` in fp32, both contiguous."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


def _backward_of(name: str):
    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(
            f"sparse_fmha::{name} has no backward pass yet; call it under torch.no_grad(), "
            "or detach its inputs"
        )

    return backward


def register() -> None:
    """Registers the ops with torch; once a process."""
    _library.load()
    for name in NAMES:
        torch.library.register_fake(f"sparse_fmha::{name}", _outputs)
        torch.library.register_autograd(f"sparse_fmha::{name}", _backward_of(name))
