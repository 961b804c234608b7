"""Scales that stay variables of a compiled graph.

The schemas of the ops have `float`, which torch.compile takes for a constant: it makes a graph for
each value. So each op with a scale is there once more with the scale as a tensor on the host: a
symbolic float stays a variable only in products with tensors, also for torch's own ops. Graphs that
have such a variable call that op; all others, and eager code, do not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

SUFFIX = "_symbolic"
SYMBOLIC = (torch.SymFloat, torch.SymInt)

_library = torch.library.Library("sparse_fmha", "FRAGMENT")
_scales: dict[str, int] = {}  # the place of the scale among an op's arguments


def has_scale(op: torch._ops.OpOverload) -> bool:
    return any(argument.name == "scale" for argument in op._schema.arguments)


def define(op: torch._ops.OpOverload) -> str:
    """Defines the op of a symbolic scale beside an op; returns what it is called."""
    name = op._opname
    place = [argument.name for argument in op._schema.arguments].index("scale")
    _scales[name] = place
    made = f"{name}{SUFFIX}"
    schema = str(op._schema).replace(f"sparse_fmha::{name}(", f"{made}(")
    schema = schema.replace("float? scale", "Tensor? scale").replace("float scale", "Tensor scale")
    _library.define(schema)

    def run(*args: object) -> Tensor | list[Tensor]:
        args = list(args)
        # The dispatcher leaves out defaults at the end.
        if place < len(args) and args[place] is not None:
            args[place] = args[place].item()
        return op(*args)

    _library.impl(made, run, "CompositeExplicitAutograd")
    return made


def call(name: str, q: Tensor, *others: object) -> Tensor | list[Tensor]:
    """Calls the op, or that of a symbolic scale where a graph has it as a variable.

    DTensors always go to the op itself, whose sharding is registered: a graph for each value.
    """
    args = [q, *others]
    scale = _scales[name]
    # Asked of the type: torch.compile does not see the attributes of a DTensor.
    if not is_symbolic(args[scale]) or hasattr(type(q), "__tensor_flatten__"):
        return getattr(torch.ops.sparse_fmha, name)(*args)
    args[scale] = torch.ones((), dtype=torch.float64, device="cpu") * args[scale]
    return getattr(torch.ops.sparse_fmha, name + SUFFIX)(*args)


def is_symbolic(value: float | None) -> bool:
    """Whether a graph that is being traced has the number as a variable."""
    if isinstance(value, SYMBOLIC):
        return True
    if value is None or not torch.compiler.is_compiling():
        return False
    return not has_static_value(value)
