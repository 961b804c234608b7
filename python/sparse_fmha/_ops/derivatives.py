"""Derivatives of the ops, under autograd and the transforms of torch.func."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch._library.utils import fill_defaults
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

AFTER_AUTOGRAD = torch._C._after_autograd_keyset
any_requires_grad = torch._C._any_requires_grad
is_grad_enabled = torch.is_grad_enabled
num_dispatch_modes = torch._C._len_torch_dispatch_stack

Arguments = tuple[object, ...]
Backward = Callable[..., Sequence[Tensor | None]]
SetupContext = Callable[..., None]


def register(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    backward: Backward | None = None,
    setup_context: SetupContext | None = None,
    saving: Callable[[Arguments], Arguments | None] | None = None,
) -> None:
    """Registers the derivatives of an op. Missing derivatives raise NotImplementedError.

    Used instead of `torch.library.register_autograd`, whose ops silently drop forward-mode tangents
    and fail under the transforms of torch.func.

    Args:
        library: keeps the registration alive.
        op: a functional op without keyword-only arguments.
        backward: `backward(ctx, *grads)` returns one gradient or None for each argument of the
            schema. Without it the op has no backward pass. For second derivatives, the ops that it
            calls must be registered too.
        setup_context: `setup_context(ctx, inputs, output)`, as in `torch.autograd.Function`.
        saving: `saving(args)` returns the arguments by which the op returns one more result, for
            `setup_context` alone, or None if they are to stay. Called where gradients are recorded.
    """
    apply = _apply_of(op, backward, setup_context)

    redispatch = op._handle.redispatch_boxed

    def run(keyset: torch._C.DispatchKeySet, *args: object) -> object:
        # This runs in every call, so every microsecond counts. forward_ad does not report levels
        # that a compiled graph opens, but tracing always has a dispatch mode.
        grad_mode = is_grad_enabled()
        recorded = grad_mode and any_requires_grad(*args)
        if recorded or forward_ad._current_level >= 0 or num_dispatch_modes():
            with enable_single_level_autograd_function():
                below = functools.partial(_redispatch, op, keyset & AFTER_AUTOGRAD, grad_mode)
                more = saving(args) if recorded and saving is not None else None
                return apply(*args, below) if more is None else apply(*more, below)[:-1]
        return redispatch(keyset & AFTER_AUTOGRAD, *args)

    library.impl(op._opname, run, "Autograd", with_keyset=True)


def wanted(*args: object) -> bool:
    """Whether a call with these arguments may need a derivative or be inside a transform.

    If not, the op may be called below autograd, which saves a quarter of its host time.
    """
    return (is_grad_enabled() and any_requires_grad(*args)) or _transformed()


def wanted_in_graph(*tensors: Tensor) -> bool:
    """`wanted` in code that torch.compile traces."""
    return (is_grad_enabled() and any(x.requires_grad for x in tensors)) or _transformed()


def _transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def refuse(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Registers an op without derivatives: calls that autograd would record raise."""

    def run(keyset: torch._C.DispatchKeySet, *args: Any) -> object:
        recorded = is_grad_enabled() and any_requires_grad(*args)
        each = (x for a in args for x in (a if isinstance(a, (list, tuple)) else (a,)))
        if recorded or any(has_tangent(x) for x in each if isinstance(x, Tensor)):
            raise NotImplementedError(
                f"{op.name()} has no derivatives; call it under torch.no_grad(), or detach its "
                "inputs"
            )
        return op._handle.redispatch_boxed(keyset & AFTER_AUTOGRAD, *args)

    library.impl(op._opname, run, "Autograd", with_keyset=True)


def register_no_derivative(library: torch.library.Library, op: torch._ops.OpOverload) -> None:
    """Registers an op whose outputs are not differentiable, like those of `torch.argmax`."""
    library.impl(op._opname, torch.library.fallthrough_kernel, "Autograd")


def requires_grad(tensor: Tensor) -> bool:
    """Whether autograd or a transform of torch.func records operations on the tensor."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in _levels(tensor))


def has_tangent(tensor: Tensor) -> bool:
    """Whether the tensor carries a tangent of a forward-mode derivative."""
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None
        for x in _levels(tensor)
        if not is_batchedtensor(x)  # its tangent is that of the tensor it wraps
    )


def _levels(tensor: Tensor) -> list[Tensor]:
    """The tensor at each level of nested torch.func transforms, and the innermost plain tensor.

    torch.compile can trace only the first level; there the ops raise.
    """
    levels = [tensor]
    while not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(levels[-1]):
        levels.append(get_unwrapped(levels[-1]))
    return levels


def _redispatch(
    op: torch._ops.OpOverload, keyset: torch._C.DispatchKeySet, grad_mode: bool, *args: object
) -> object:
    """Runs the op below autograd, including the outer levels of nested transforms.

    These need the modes that autograd.Function switches off while it runs `forward`.
    """
    with (
        torch.set_grad_enabled(grad_mode),
        forward_ad._set_fwd_grad_enabled(True),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return op.redispatch(keyset, *args)


def _apply_of(
    op: torch._ops.OpOverload, backward: Backward | None, setup_context: SetupContext | None
) -> Callable[..., Any]:
    """Returns `apply` of the op's autograd.Function. Its last argument runs the op."""
    schema = op._schema

    def forward(*inputs: Any) -> Any:
        *args, redispatch = inputs
        results = redispatch(*args)
        return tuple(results) if isinstance(results, list) else results  # autograd needs a tuple

    def set_up(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Any) -> None:
        if setup_context is not None:
            setup_context(ctx, fill_defaults(schema, inputs[:-1], {})[0], output)

    def run_backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward is None and schema.name.endswith("_bwd"):
            raise NotImplementedError(
                f"{schema.name} has no backward pass yet: second derivatives are not supported"
            )
        if backward is None:
            raise NotImplementedError(
                f"{schema.name} has no backward pass yet; call it under torch.no_grad(), or "
                "detach its inputs"
            )
        return *backward(ctx, *grads), None

    def jvp(ctx: FunctionCtx, *tangents: Tensor | None) -> NoReturn:
        raise NotImplementedError(
            f"{schema.name} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, "
            "torch.autograd.forward_ad); detach its inputs"
        )

    methods = {
        "forward": forward,
        "setup_context": set_up,
        "backward": run_backward,
        "jvp": jvp,
    }
    # Built as torch.func builds such classes: Function.apply would go through all transforms again,
    # but the dispatcher is already inside one.
    function: Any = type(
        schema.name.replace("::", "_"),
        (torch.autograd.function._SingleLevelFunction,),
        {name: staticmethod(method) for name, method in methods.items()},
    )
    apply: Callable[..., Any] = function.apply
    return apply
