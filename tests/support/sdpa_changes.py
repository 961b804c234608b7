"""What replaces a property of a drawn call: each function takes the random numbers and the call."""

import contextlib
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
OTHERS = (torch.int32, torch.complex64, torch.bool)


class Inherited(Tensor):
    """A subclass that changes nothing."""


class Overridden(Tensor):
    """A subclass that has its own attention."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs or {})
        is_attention = func is torch.nn.functional.scaled_dot_product_attention
        return result + 1 if is_attention else result


def one_other_dtype(rng, call):
    i = rng.randrange(3)
    call.args[i] = call.args[i].to(rng.choice(FLOATS + OTHERS))


def all_other_dtypes(rng, call):
    dtype = rng.choice(OTHERS)
    call.args = [x.to(dtype) for x in call.args]


def one_other_size(rng, call):
    i = rng.randrange(3)
    axis = rng.randrange(max(1, call.args[i].dim() - 1))
    if call.args[i].shape[axis] > 1:
        call.args[i] = call.args[i].narrow(axis, 0, 1)


def one_without_an_axis(rng, call):
    i = rng.randrange(3)
    if call.args[i].dim() > 2 and call.args[i].shape[0]:
        call.args[i] = call.args[i][0]


def no_tensor(rng, call):
    call.args[rng.randrange(3)] = rng.choice((None, 1.0, [[1.0]], np.zeros((1, 2, 3, 8))))


def unusual_content(rng, call):
    i = rng.randrange(3)
    if call.args[i].numel():
        x = call.args[i] = call.args[i].clone(memory_format=torch.contiguous_format)
        value = rng.choice((math.nan, math.inf, -math.inf, 6e4, 3e38))
        x.view(-1)[rng.randrange(x.numel())] = value


def a_mask_too(rng, call):
    q, k = call.args[:2]
    if q.dim() > 1 and k.dim() > 1:
        call.kwargs["attn_mask"] = torch.rand(q.shape[-2], k.shape[-2]) < 0.7
        call.kwargs["is_causal"] = True


def an_odd_mask(rng, call):
    shape = [x.shape[-2] for x in call.args[:2] if x.dim() > 1]
    call.kwargs["attn_mask"] = rng.choice(
        (
            [[True]],
            torch.ones(shape).bool().to_sparse(),
            torch.zeros(shape, requires_grad=True),
            causal_lower_right(*(max(1, n) for n in [*shape, 1, 1][:2])),
        )
    )


def an_odd_flag(rng, call):
    name = rng.choice(("is_causal", "enable_gqa"))
    call.kwargs[name] = rng.choice((1, 0, None, "yes", np.bool_(True), torch.tensor(True)))


def an_odd_number(rng, call):
    odd = (math.inf, math.nan, True, "x", None, 10**400, 1e300, -1e30, 1e-300, np.float32(0.5))
    odd = (*odd, torch.tensor(0.5), torch.ones(2))
    call.kwargs["scale"] = rng.choice(odd)


def dropout(rng, call):
    call.kwargs["dropout_p"] = rng.choice(
        (0, 0.1, 1.0, -0.1, 1.5, math.nan, None, False, True, "x", torch.tensor(0.0))
    )


def other_names(rng, call):
    call.kwargs[rng.choice(("mask", "query", "is_casual", "out"))] = True


def gqa_at_any_heads(rng, call):
    if not any(x.dim() > 2 and not x.shape[-3] for x in call.args):
        call.kwargs["enable_gqa"] = True


def gradients(rng, call):
    i = rng.randrange(3)
    call.args[i] = call.args[i].detach().requires_grad_()
    call.around = rng.choice((contextlib.nullcontext, torch.no_grad, torch.enable_grad))


def inference(rng, call):
    call.around = torch.inference_mode


def autocast(rng, call):
    dtype = rng.choice((torch.bfloat16, torch.float16))
    call.around = lambda: torch.autocast("cpu", dtype=dtype)


def a_parameter(rng, call):
    i = rng.randrange(3)
    call.args[i] = torch.nn.Parameter(call.args[i], requires_grad=False)


def a_subclass(rng, call):
    kind = rng.choice((Inherited, Overridden))
    for i in range(3) if rng.random() < 0.5 else [rng.randrange(3)]:
        call.args[i] = call.args[i].as_subclass(kind)


def negated_views(rng, call):
    call.args = [torch._neg_view(x) for x in call.args]


def conjugated_views(rng, call):
    call.args = [x.to(torch.complex64).conj() for x in call.args]


def on_meta(rng, call):
    for i in range(3) if rng.random() < 0.5 else [rng.randrange(3)]:
        call.args[i] = call.args[i].to("meta")


def sparse(rng, call):
    i = rng.randrange(3)
    call.args[i] = call.args[i].to_sparse()


def nested(rng, call):
    layout = rng.choice((torch.jagged, torch.strided))
    parts = [torch.randn(n, 2, 16) for n in rng.sample(range(1, 40), 3)]
    for i in range(3) if rng.random() < 0.8 else [rng.randrange(3)]:
        call.args[i] = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)


def mapped(rng, call):
    """By torch.vmap over the first axis of all three."""

    def through(function):
        def run(q, k, v, *args, **kwargs):
            return torch.vmap(lambda a, b, c: function(a, b, c, *args, **kwargs))(q, k, v)

        return run

    call.through = through


def differentiated(rng, call):
    """By torch.func.grad."""

    def through(function):
        def run(q, *args, **kwargs):
            return torch.func.grad(lambda q: function(q, *args, **kwargs).sum())(q)

        return run

    call.through = through


def with_a_tangent(rng, call):
    """In forward mode; the result is the tangent."""

    def through(function):
        def run(q, *args, **kwargs):
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(q, q)
                out = function(dual, *args, **kwargs)
                return torch.autograd.forward_ad.unpack_dual(out).tangent

        return run

    call.through = through


CHANGES = (
    one_other_dtype,
    all_other_dtypes,
    one_other_size,
    one_other_size,
    one_without_an_axis,
    no_tensor,
    unusual_content,
    unusual_content,
    a_mask_too,
    an_odd_mask,
    an_odd_flag,
    an_odd_number,
    an_odd_number,
    dropout,
    other_names,
    gqa_at_any_heads,
    gradients,
    gradients,
    inference,
    autocast,
    autocast,
    a_parameter,
    a_subclass,
    negated_views,
    conjugated_views,
    on_meta,
    sparse,
    nested,
    mapped,
    differentiated,
    with_a_tangent,
)
