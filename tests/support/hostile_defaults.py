"""Runs the suite under another default device, dtype or both, which only the package meets.

    python -m pytest --other-default meta --other-default bfloat16     # or float64

What tests and other packages make stays on the CPU in fp32, so that each test still says what it
said; a tensor that the package makes without its device or dtype goes astray.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch.overrides import TorchFunctionMode

import sparse_fmha

DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}
CHOICES = ("meta", *DTYPES)
# Left out unless they are named: their subject runs in another process or in C++, where no default
# is seen, or they call one op in so many shapes that it would take minutes more.
NOT_RUN = (
    *("distributed", "gpu", "host", "packaging"),
    *("test_attention.py", "test_benchmark*.py", "test_block_sparse.py"),
    *("test_check_factories.py", "test_cli.py", "test_compile.py", "test_demo.py"),
    *("test_decode.py", "test_derivatives.py", "test_layouts.py", "test_vmap.py"),
    *("test_errors*.py", "test_example_*.py", "test_neighborhood.py"),
    *("test_simulate_command.py", "test_torch.py"),
)
PACKAGE = str(Path(sparse_fmha.__file__).parent) + os.sep
CHECKS = f"{PACKAGE}_checks.py"
TORCH = str(Path(torch.__file__).parent) + os.sep


@functools.cache
def owner(file: str) -> str | None:
    """Whose code a file has; None of torch's, which makes tensors for whoever calls it."""
    if file.startswith(TORCH) or file == __file__ or file.startswith("<"):
        return None
    return "package" if file.startswith(PACKAGE) else "other"


def called_by_package(frame: FrameType | None) -> bool:
    """Whether the nearest caller outside torch is in sparse_fmha."""
    while frame is not None:
        found = owner(frame.f_code.co_filename)
        if found and not (found == "package" and for_its_caller(frame)):
            return found == "package"
        frame = frame.f_back
    return False


def for_its_caller(frame: FrameType) -> bool:
    """A mode and a decorator hand on what others call; the weights of a module follow defaults as
    torch's do."""
    name = frame.f_code.co_name
    module = name == "__init__" and isinstance(frame.f_locals.get("self"), torch.nn.Module)
    decorator = name == "call" and frame.f_code.co_filename == CHECKS
    return module or decorator or name == "__torch_function__"


class OthersKeepDefaults(TorchFunctionMode):
    """Whatever is not called by the package runs with the CPU and fp32 as defaults."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if called_by_package(sys._getframe(1)):
            return func(*args, **kwargs)
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"):
                return func(*args, **kwargs)
        finally:
            torch.set_default_dtype(dtype)


def apply(names: list[str]) -> None:
    """Sets the default device, dtype or both, until the process ends."""
    for name in names:
        if name in DTYPES:
            torch.set_default_dtype(DTYPES[name])
        else:
            torch.set_default_device(name)
    torch.compile = cannot_compile
    OthersKeepDefaults().__enter__()


def cannot_compile(*args, **kwargs):
    pytest.skip("code that is compiled does not tell who makes a tensor")
