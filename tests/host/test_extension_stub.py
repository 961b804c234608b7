"""`_C.pyi` has the names, the arguments and the defaults of the compiled module."""

from __future__ import annotations

import ast
import keyword
from pathlib import Path
from types import ModuleType

import pytest

import sparse_fmha
from sparse_fmha._build import BuildInfo, KernelRow

_C = pytest.importorskip("sparse_fmha._C")
STUB = Path(sparse_fmha.__file__).with_name("_C.pyi")


def arguments_of(function):
    """(name, default or "") of each argument, from the signature that pybind11 writes."""
    signature = function.__doc__.splitlines()[0]
    # Types are left out: the stub has narrower ones, such as int for what converts to it.
    text, depth = "", 0
    for letter in signature[signature.index("(") + 1 : signature.rindex(") ->")]:
        depth += (letter in "[(") - (letter in "])")
        if depth == 0 and letter not in "])":
            text += letter
    for argument in filter(None, text.split(",")):
        name, _, default = argument.partition("=")
        yield name.partition(":")[0].strip(), default.strip()


def compiled(thing, prefix=""):
    """{dotted name: its arguments, or None of what is no function}."""
    found = {}
    for name, value in vars(thing).items():
        if name.startswith("_") and name != "__init__":
            continue
        path = prefix + name
        if isinstance(value, (ModuleType, type)):
            found[path] = None
            found |= compiled(value, f"{path}.")
        elif isinstance(value, property):
            found[path] = None
        elif callable(value):
            found[path] = list(arguments_of(value))
    return found


def stubbed(nodes, classes, prefix=""):
    """As `compiled`, of the stub's syntax; classes that begin with _ stand for what uses them."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.AnnAssign):  # a submodule
            found[prefix + node.target.id] = None
            inner = classes[node.annotation.id].body
            found |= stubbed(inner, classes, f"{prefix}{node.target.id}.")
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            path = prefix + node.name
            found[path] = None
            for base in (classes[base.id] for base in node.bases):
                found |= stubbed(base.body, classes, f"{path}.")
            found |= stubbed(node.body, classes, f"{path}.")
        elif isinstance(node, ast.FunctionDef):
            is_property = any(ast.unparse(d) == "property" for d in node.decorator_list)
            found[prefix + node.name] = None if is_property else list(stub_arguments(node))
    return found


def stub_arguments(node):
    given = node.args.args
    defaults = [""] * (len(given) - len(node.args.defaults))
    defaults += [ast.unparse(default) for default in node.args.defaults]
    for argument, default in zip(given, defaults, strict=True):
        name = argument.arg
        yield name[:-1] if keyword.iskeyword(name[:-1]) else name, default


def test_the_stub_is_the_module():
    tree = ast.parse(STUB.read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    wanted = compiled(_C)
    assert len(wanted) > 40
    assert stubbed(tree.body, classes) == wanted


def test_rows_and_build_information_have_the_keys_of_their_types():
    rows = _C.kernel_table()
    assert rows
    for row in rows:
        assert row.keys() == KernelRow.__required_keys__
    for row in sparse_fmha.kernels():
        assert row.keys() <= KernelRow.__required_keys__ | KernelRow.__optional_keys__
    assert _C.build_info().keys() == BuildInfo.__required_keys__
