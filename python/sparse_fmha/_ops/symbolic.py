"""Keeps scales symbolic in compiled graphs.

The schemas of the ops have `float`, which torch.compile treats as a constant: it compiles a graph
for each value. So each op with a scale has a second version that takes the scale as a tensor on the
host: a symbolic float stays symbolic only in products with tensors, also for torch's own ops. Only
graphs with a symbolic scale call that version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

SUFFIX = "_symbolic"
SYMBOLIC = (torch.SymFloat, torch.SymInt)

_library = torch.library.Library("sparse_fmha", "FRAGMENT")
_scales: dict[str, int] = {}  # position of the scale among an op's arguments


def has_scale(op: torch._ops.OpOverload) -> bool:
    return any(argument.name == "scale" for argument in op._schema.arguments)


def define(op: torch._ops.OpOverload) -> str:
    """Defines the version of an op with a symbolic scale; returns its name."""
    name = op._opname
    place = [argument.name for argument in op._schema.arguments].index("scale")
    _scales[name] = place
    made = f"{name}{SUFFIX}"
    schema = str(op._schema).replace(f"sparse_fmha::{name}(", f"{made}(")
    schema = schema.replace("float? scale", "Tensor? scale").replace("float scale", "Tensor scale")
    _library.define(schema)

    def run(*given: Any) -> Any:
        args = list(given)
        # The dispatcher drops trailing defaults.
        if place < len(args) and args[place] is not None:
            args[place] = args[place].item()
        return op(*args)

    _library.impl(made, run, "CompositeExplicitAutograd")
    return made


def call(name: str, q: Tensor, *others: Any) -> Any:
    """Calls the op, or its version with a symbolic scale if the scale is symbolic.

    Arguments and results are those of the op's schema.

    DTensors always go to the op itself, whose sharding is registered: one graph per scale value.
    """
    args = [q, *others]
    scale = _scales[name]
    # Ask the type: torch.compile does not see the attributes of a DTensor.
    if not is_symbolic(args[scale]) or hasattr(type(q), "__tensor_flatten__"):
        return getattr(torch.ops.sparse_fmha, name)(*args)
    args[scale] = torch.ones((), dtype=torch.float64, device="cpu") * args[scale]
    return getattr(torch.ops.sparse_fmha, name + SUFFIX)(*args)


def is_symbolic(value: float | None) -> bool:
    """Whether the number is symbolic in the graph that is being traced."""
    if isinstance(value, SYMBOLIC):
        return True
    if value is None or not torch.compiler.is_compiling():
        return False
    return not has_static_value(value)
