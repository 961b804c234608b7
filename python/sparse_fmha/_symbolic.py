"""Windows and scales that stay variables of a compiled graph.

The schemas of the ops have `int[]` and `float`, which torch.compile takes for constants: it makes a
graph for each value. So each op with a window or a scale is there once more with `SymInt[]`, and
with the scale as a tensor on the host: a symbolic float stays a variable only in products with
tensors, also for torch's own ops. Graphs that have such a variable call that op; all others, and
eager code, do not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

SUFFIX = "_symbolic"

_library = torch.library.Library("sparse_fmha", "FRAGMENT")


class Places(NamedTuple):
    """Of an op's arguments that may be symbolic."""

    scale: int
    lists: tuple[int, ...]


_places: dict[str, Places] = {}


def define(name: str) -> str:
    """Defines the op of symbolic numbers beside that of this name; returns what it is called."""
    op = getattr(torch.ops.sparse_fmha, name).default
    arguments = op._schema.arguments
    lists = tuple(i for i, each in enumerate(arguments) if str(each.type) == "List[int]")
    places = Places([each.name for each in arguments].index("scale"), lists)
    _places[name] = places
    made = f"{name}{SUFFIX}"
    schema = str(op._schema).replace(f"sparse_fmha::{name}(", f"{made}(")
    schema = schema.replace("float? scale", "Tensor? scale").replace("float scale", "Tensor scale")
    _library.define(schema.replace(" int[] ", " SymInt[] "))

    def run(*args: object) -> Tensor | tuple[Tensor, ...]:
        args = list(args)
        for i in range(places.scale, len(args))[:1]:  # defaults at the end are not given
            args[i] = None if args[i] is None else args[i].item()
        return op(*args)

    _library.impl(made, run, "CompositeExplicitAutograd")
    return made


def call(name: str, q: Tensor, *others: object) -> Tensor | tuple[Tensor, ...]:
    """Calls the op, or that of symbolic numbers where a graph has one of them as a variable.

    DTensors are given to the op itself, whose sharding is registered, and the graph is for these
    numbers.
    """
    args = [q, *others]
    scale, lists = _places[name]
    if not (is_symbolic(args[scale]) or any(is_symbolic(n) for i in lists for n in args[i])):
        return getattr(torch.ops.sparse_fmha, name)(*args)
    if is_traceable_wrapper_subclass(q):
        return getattr(torch.ops.sparse_fmha, name)(*args)
    if args[scale] is not None:
        args[scale] = torch.ones((), dtype=torch.float64, device="cpu") * args[scale]
    return getattr(torch.ops.sparse_fmha, name + SUFFIX)(*args)


def is_symbolic(value: float | None) -> bool:
    """Whether a graph that is being traced has the number as a variable."""
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return True
    if value is None or not torch.compiler.is_compiling():
        return False
    return not has_static_value(value)
