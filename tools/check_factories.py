"""Finds tensors that are created on the default device.

    python tools/check_factories.py [FILE or FOLDER ...]

A torch factory called without `device=` follows `torch.set_default_device`, so its result may be on
another device than the tensors that it is used with. Prints file:line and the missing argument for
each such call.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("python", "examples", "benchmarks")
FACTORIES = frozenset(
    ["arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty",
     "empty_permuted", "empty_strided", "eye", "from_file", "full", "hamming_window",
     "hann_window", "kaiser_window", "linspace", "logspace", "ones", "rand", "randint", "randn",
     "randperm", "range", "scalar_tensor", "sparse_coo_tensor", "tensor", "tril_indices",
     "triu_indices", "zeros"]
)  # fmt: skip


def factory(node: ast.expr) -> str | None:
    """The name of the factory that an expression refers to: `arange` for `torch.arange`."""
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "torch":
        return node.attr if node.attr in FACTORIES | {"Generator"} else None
    return None


def problems(source: str) -> Iterator[tuple[int, str]]:
    """Line and message of each factory that is called, passed or imported without a device."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name in FACTORIES:
                    yield node.lineno, f"{alias.name} is imported; call torch.{alias.name}"
        if not isinstance(node, ast.Call) or any(k.arg in ("device", None) for k in node.keywords):
            continue
        name = factory(node.func)
        if name == "Generator":
            if not node.args:
                yield node.lineno, "torch.Generator has no device"
        elif name:
            yield node.lineno, f"torch.{name} has no device="
        for argument in node.args:
            handed = factory(argument)
            if handed in FACTORIES:
                yield argument.lineno, f"torch.{handed} is handed on without device="


def check(paths: list[Path]) -> list[str]:
    """Problems in Python files and in folders of them, as `path:line: message`."""
    files = (f for p in paths for f in (sorted(p.rglob("*.py")) if p.is_dir() else [p]))
    return [f"{f}:{line}: {text}" for f in files for line, text in problems(f.read_text())]


if __name__ == "__main__":
    found = check([Path(p) for p in sys.argv[1:]] or [ROOT / folder for folder in FOLDERS])
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
