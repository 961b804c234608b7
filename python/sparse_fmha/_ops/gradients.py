"""The backward pass of the attention ops: the tensors that a call saves, and the ops it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_fmha._ops import derivatives, errors

FORWARD, BACKWARD = "_fwd", "_bwd"
EXTRA = ("extra_k", "extra_v")
PAGES = "page_table"
BIAS = "key_bias"
THRESHOLD = "skip_threshold"
SAVE = "save_skipped"
SOFTCAP = "softcap"


def setup_context(names: list[str]) -> Callable[[Any, tuple[Any, ...], Any], None]:
    """Makes `setup_context` of a forward op from the names of its arguments."""

    def run(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors, *output[:2], *output[3:])
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.deterministic = torch.are_deterministic_algorithms_enabled()

    return run


def saving(op: torch._ops.OpOverload) -> Callable[[derivatives.Arguments], Any] | None:
    """Makes `saving` of a forward op: with thresholds, it returns which tiles it skipped, too."""
    names = [argument.name for argument in op._schema.arguments]
    if SAVE not in names:
        return None
    defaults = [argument.default_value for argument in op._schema.arguments]
    threshold, save = names.index(THRESHOLD), names.index(SAVE)

    def run(args: derivatives.Arguments) -> derivatives.Arguments | None:
        skips = len(args) > threshold and args[threshold] is not None
        if not skips or (len(args) > save and args[save]):
            return None
        return *args[:save], *defaults[len(args) : save], True

    return run


def backward(op: torch._ops.OpOverload, names: list[str]) -> Callable[..., list[Tensor | None]]:
    """Makes `backward` of a forward op from the names of its arguments."""
    backward_op = _backward_of(op)
    place = {name: i for i, name in enumerate(names)}
    given = [name for name in names if name not in ("q", "k", "v", THRESHOLD, SOFTCAP, SAVE)]

    def run(
        ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_counts: None
    ) -> list[Tensor | None]:
        found: list[Tensor | None] = [None] * len(names)
        # Only for the given arguments: the dispatcher drops trailing defaults.
        needed = dict(zip(names, ctx.needs_input_grad, strict=False))
        if dout is None and dlse is None:
            return found
        tensors = ctx.saved_tensors  # checkpoints allow reading them once
        saved, (out, lse, *skipped) = tensors[: len(names)], tensors[len(names) :]
        inputs = [x if x is not None else y for x, y in zip(saved, ctx.others, strict=True)]
        if dout is None:
            dout = out.new_zeros(()).expand_as(out)
        need_dq = needed["q"]
        need_dkv = any(needed.get(name) for name in ("k", "v", *EXTRA))
        if PAGES in place and inputs[place[PAGES]] is not None:
            raise NotImplementedError(
                f"{op._schema.name} has no backward pass for keys in pages; call it without "
                f"{PAGES}, or under torch.no_grad()"
            )
        threshold = inputs[place[THRESHOLD]]
        if PAGES in place and threshold is not None:
            raise NotImplementedError(
                f"{op._schema.name} has no backward pass yet where it may skip tiles; call it "
                f"without {THRESHOLD} and statistics, or under torch.no_grad()"
            )
        if needed.get(THRESHOLD):
            raise NotImplementedError(
                f"{op._schema.name} has no backward pass for {THRESHOLD}, which says what is left "
                "out; detach it"
            )
        need_dbias = bool(needed.get(BIAS))
        q, k, v = inputs[:3]
        others = [inputs[place[name]] for name in given]
        # Packed sequences have no bias, no tiles to skip, and only kernels that are deterministic.
        more = (need_dbias, ctx.deterministic, threshold) if BIAS in place else ()
        flags = (need_dq, need_dkv, *more, inputs[place[SOFTCAP]], *skipped)
        gradients = _run(backward_op, dout, dlse, q, k, v, out, lse, *others, *flags)
        if need_dbias:
            # Of each batch entry and query head.
            found[place[BIAS]] = gradients.pop().sum_to_size(inputs[place[BIAS]].shape)
        for name, gradient in zip(("q", "k", "v", *EXTRA), gradients, strict=False):
            if needed.get(name):
                found[place[name]] = gradient
        return found

    return run


def _backward_of(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    name = op._opname.replace(FORWARD, BACKWARD)
    overload: torch._ops.OpOverload = getattr(torch.ops.sparse_fmha, name).default
    return overload


def _run(op: torch._ops.OpOverload, *args: Any) -> list[Tensor]:
    try:
        gradients: list[Tensor] = op(*args)
    except RuntimeError as error:
        raise errors.typed(error) from None
    return gradients
