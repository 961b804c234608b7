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

SUFFIX = "_symbolic"
SYMBOLIC = (torch.SymFloat, torch.SymInt)

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
        # The dispatcher leaves out defaults at the end.
        if places.scale < len(args) and args[places.scale] is not None:
            args[places.scale] = args[places.scale].item()
        return op(*args)

    _library.impl(made, run, "CompositeExplicitAutograd")
    return made


def call(name: str, q: Tensor, *others: object) -> Tensor | tuple[Tensor, ...]:
    """Calls the op, or that of symbolic numbers where a graph has one of them as a variable.

    DTensors always go to the op itself, whose sharding is registered: a graph for each value.
    """
    args = [q, *others]
    scale, lists = _places[name]
    symbolic = is_symbolic(args[scale]) or any(is_symbolic(n) for i in lists for n in args[i])
    # Asked of the type: torch.compile does not see the attributes of a DTensor.
    if not symbolic or hasattr(type(q), "__tensor_flatten__"):
        return getattr(torch.ops.sparse_fmha, name)(*args)
    if args[scale] is not None:
        args[scale] = torch.ones((), dtype=torch.float64, device="cpu") * args[scale]
    return getattr(torch.ops.sparse_fmha, name + SUFFIX)(*args)


def is_symbolic(value: float | None) -> bool:
    """Whether a graph that is being traced has the number as a variable."""
    if isinstance(value, SYMBOLIC):
        return True
    if value is None or not torch.compiler.is_compiling():
        return False
    return not has_static_value(value)
