"""Drawn calls of torch's `scaled_dot_product_attention`, of all kinds that a model may make.

A call starts as one that most models make; then some of its properties are replaced by others that
torch may take or refuse. What torch does with it is the expectation.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from sdpa_changes import CHANGES, FLOATS
from torch import Tensor


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
