"""Base class of the modes that intercept a model's calls; compiled calls are counted, too."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TypeVar

import torch
from torch.overrides import TorchFunctionMode

COMPILED = "inside torch.compile, counted when it was compiled"

Mode = TypeVar("Mode", bound="CallMode")

_entered: list[CallMode] = []


class CallMode(TorchFunctionMode):
    """A mode that counts the calls that it does not handle, by reason."""

    def __init__(self) -> None:
        super().__init__()
        self.left: Counter[str] = Counter()

    def __enter__(self: Mode) -> Mode:
        if not torch.compiler.is_compiling():
            _entered.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: object) -> None:
        if not torch.compiler.is_compiling():
            _entered.remove(self)
        super().__exit__(*exception)  # type: ignore[no-untyped-call]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def count_compiled(name: str) -> None:
    """Counts a call at compilation, in the innermost mode whose class has that name.

    Counting inside the compiled graph would recompile it for each value of the counter.
    """
    modes = [mode for mode in _entered if type(mode).__name__ == name]
    if modes:
        modes[-1].left[COMPILED] += 1
    else:
        warnings.warn(
            f"{name} has no effect inside a compiled function: its calls go to torch and are not "
            "counted",
            stacklevel=2,
        )
