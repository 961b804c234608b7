"""Drawn calls of torch's `scaled_dot_product_attention`, of all kinds that a model may make.

A call starts as one that most models make; then some of its properties are replaced by others that
torch may take or refuse. What torch does with it is the expectation.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

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


@dataclass
class Shapes:
    lead: tuple[int, ...]  # what is before the heads
    heads: list[int]  # of query, key, value; empty without heads
    lengths: tuple[int, int]
    dims: list[int]

    def of(self, i: int) -> tuple[int, ...]:
        heads = self.heads[i : i + 1]
        return (*self.lead, *heads, self.lengths[min(i, 1)], self.dims[i])


@dataclass
class Call:
    """Arguments, and where the call is made."""

    args: list[object]
    kwargs: dict[str, object]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    through: Callable[[Callable], Callable] = lambda call: call
    notes: list[str] = field(default_factory=list)


def draw(seed: int) -> Call:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shapes = drawn_shapes(rng)
    dtype = rng.choice(FLOATS)
    tensors = [laid_out(rng, shapes.of(i), dtype) for i in range(3)]
    options: dict[str, object] = {}
    if rng.random() < 0.3:
        options["attn_mask"] = mask(rng, shapes, dtype)
    elif rng.random() < 0.4:
        options["is_causal"] = True
    if rng.random() < 0.25:
        options["scale"] = rng.choice((0.5, 1, 0.0, -0.3, None, 2.5))
    heads = shapes.heads
    if heads and heads[1] not in (0, heads[0]) and rng.random() < 0.8:
        options["enable_gqa"] = True
    call = Call(tensors, options)
    if rng.random() < 0.4:
        for change in rng.sample(CHANGES, rng.choice((1, 1, 2))):
            if all(is_plain(x) for x in call.args):
                change(rng, call)
                call.notes.append(change.__name__)
    spell(rng, call)
    return call


def is_plain(x: object) -> bool:
    return (
        type(x) is Tensor
        and not x.is_nested
        and (x.layout, x.device.type) == (torch.strided, "cpu")
        and x.is_floating_point()
    )


def drawn_shapes(rng: random.Random) -> Shapes:
    lengths = tuple(rng.choice((1, 2, 7, 64, 65, 100, 130)) for _ in range(2))
    if rng.random() < 0.4:
        lengths = (lengths[0],) * 2
    if rng.random() < 0.06:
        lengths = rng.choice(((0, lengths[1]), (lengths[0], 0), (0, 0)))
    dim = rng.choice((8, 16, 24, 64, 64, 128, 256))
    if rng.random() < 0.06:
        dim = rng.choice((1, 4, 12, 264, 512))
    dims = [dim, dim, dim]
    if rng.random() < 0.05:
        dims[rng.choice((1, 2, 2))] = rng.choice((8, 16, 32))
    lead: tuple[int, ...] = (rng.choice((1, 2, 3)),)
    heads = [rng.choice((1, 2, 4))] * 3
    kind = rng.random()
    if kind < 0.3:
        heads = rng.choice(([4, 2, 2], [4, 1, 1], [2, 1, 1], [6, 3, 3]))
    elif kind < 0.36:
        heads = rng.choice(([4, 1, 4], [4, 4, 1], [1, 4, 4], [4, 3, 3], [4, 2, 4], [4, 0, 0]))
    elif kind < 0.45:
        heads = []
    rank = rng.random()
    if rank < 0.03:
        lead, heads = (), []
    elif rank < 0.08:
        lead = (2, *lead)
    return Shapes(lead, heads, lengths, dims)


def laid_out(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the shape, as a view that models make."""
    kind = rng.choice(("plain", "plain", "heads last", "slice", "packed", "expanded", "strided"))
    if kind == "heads last" and len(shape) >= 4:
        order = (*shape[:-3], shape[-2], shape[-3], shape[-1])
        return torch.randn(order).to(dtype).transpose(-3, -2)
    if kind == "slice":
        return torch.randn(*shape[:-2], shape[-2] + 3, shape[-1] + 8).to(dtype)[..., 2:-1, 8:]
    if kind == "packed":
        return torch.randn(*shape[:-1], 3 * shape[-1]).to(dtype).chunk(3, -1)[1]
    if kind == "expanded" and len(shape) > 2:
        return torch.randn(1, *shape[1:]).to(dtype).expand(shape)
    if kind == "strided" and rng.random() < 0.1:
        return torch.randn(*shape[:-1], 2 * shape[-1]).to(dtype)[..., ::2]
    return torch.randn(shape).to(dtype)


def mask(rng: random.Random, shapes: Shapes, dtype: torch.dtype) -> Tensor:
    """Of any rank that broadcasts, and some that do not."""
    whole = (*shapes.lead, *shapes.heads[:1], *shapes.lengths)
    rank = rng.choice((2, 2, len(whole), len(whole), rng.randint(0, len(whole) + 1)))
    shape = [1 if rng.random() < 0.2 else n for n in (1, *whole)[len(whole) + 1 - rank :]]
    if shape and rng.random() < 0.05:
        shape[rng.randrange(len(shape))] += 1
    visible = torch.rand(shape) < rng.choice((0.1, 0.6, 0.97))
    if shape and rng.random() < 0.5:
        visible[..., : rng.randint(0, shape[-1])] = rng.random() < 0.5
    kind = rng.random()
    if kind < 0.75:
        return visible
    if kind < 0.95:
        kept = rng.choice((dtype, dtype, torch.float32))
        return torch.zeros(shape).masked_fill(~visible, -torch.inf).to(kept)
    return visible.to(rng.choice((torch.int64, torch.uint8, torch.complex64)))


# What replaces properties of a call: each takes the random numbers and the call.


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


def spell(rng: random.Random, call: Call) -> None:
    """Moves arguments between places and names."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = (None, None, None, None, 0.0, False)
    places = rng.randint(3, 6) if rng.random() < 0.5 else 3
    for i in range(3, places):
        call.args.append(call.kwargs.pop(names[i], defaults[i]))
    if rng.random() < 0.1:
        named = rng.randint(0, 2)
        call.kwargs = {**dict(zip(names[named:], call.args[named:], strict=False)), **call.kwargs}
        call.args = call.args[:named]
    if rng.random() < 0.01:
        call.args.extend([None] * rng.randint(1, 4))
