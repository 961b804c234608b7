"""Which module of the package imports which: no circles, and each package only what is below it.

Counted are imports at the top, inside functions and under TYPE_CHECKING alike. An import of a
module also runs the packages it is in, but for those that the importing module is in itself.
"""

import ast
from pathlib import Path

import pytest

import sparse_fmha

ROOT = Path(sparse_fmha.__file__).parent
PACKAGE = ROOT.name
COMPILED = f"{PACKAGE}._C"  # imports nothing

LEAVES = {
    "_arch",
    "_build",
    "_checks",
    "_extension",
    "_sizes",
    "_tables",
    "_versions",
}  # any part may use these
# Each part of the package, a folder or a file, and the others that it may import: only parts that
# stand before it. "" is the package's own `__init__.py`.
LAYERS = {
    "reference": set(),
    "plotting": set(),
    "_ops": set(),
    "merge": {"_ops"},
    "masks": {"plotting"},
    "skipping": {"_ops"},
    "selection": {"_ops", "masks"},
    "attention": {"_ops", "merge", "masks", "skipping"},
    "decode": {"_ops", "skipping", "attention"},
    "varlen": {"_ops", "masks", "skipping", "attention"},
    "cost": {"plotting", "masks", "skipping", "attention", "decode"},
    "_routing": {"_ops", "masks", "attention"},
    "sdpa": {"_routing"},
    "calibration": {"skipping", "_routing"},
    "plot_calibration": {"plotting", "calibration"},
    "patterns": {"_ops", "merge", "masks", "selection", "attention"},
    "nn": {"masks", "attention"},
    "": {
        "_ops",
        "reference",
        "merge",
        "masks",
        "skipping",
        "selection",
        "attention",
        "decode",
        "varlen",
        "cost",
        "sdpa",
        "patterns",
        "nn",
    },
    "distributed": {"_ops", "masks", "skipping", "attention", ""},
    "integrations": {
        "merge",
        "masks",
        "selection",
        "attention",
        "decode",
        "varlen",
        "cost",
        "calibration",
        "patterns",
        "",
        "distributed",
    },
    "cli": {"reference", "plotting", "cost", "patterns", "integrations", ""},
    "__main__": {"cli"},
}


def sources(root):
    """The text of every module, and which of them are packages."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path.read_text(encoding="utf-8")
    return found


def imported(text, modules):
    """The modules that a text names in imports, wherever these stand."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not resolved here"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def import_graph(texts, compiled=()):
    """{module: the modules that it imports}, of the modules in `texts` alone."""
    modules = {*texts, *compiled}
    graph = {}
    for name, text in texts.items():
        graph[name] = set()
        for target in imported(text, modules):
            parts = target.split(".")
            for n in range(1, len(parts) + 1):
                module = ".".join(parts[:n])
                own = n < len(parts) and f"{name}.".startswith(f"{module}.")
                if module in texts and not own:
                    graph[name].add(module)
    return graph


def circle(graph):
    """The modules of a circle, the first one again at the end; empty if there is none."""
    done, way = set(), []

    def follow(module):
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        way.append(module)
        for target in sorted(graph[module]):
            if found := follow(target):
                return found
        way.pop()
        done.add(module)
        return []

    for module in graph:
        if found := follow(module):
            return found
    return []


def part_of(module):
    return module.split(".")[1] if "." in module else ""


def crossings(graph, layers, leaves):
    """Imports that the table does not allow, each as "module imports module"."""
    found = []
    for module, targets in graph.items():
        part = part_of(module)
        allowed = leaves if part in leaves else {part} | leaves | layers[part]
        found += [
            f"{module} imports {target}"
            for target in sorted(targets)
            if part_of(target) not in allowed
        ]
    return found


@pytest.fixture(scope="module")
def graph():
    return import_graph(sources(ROOT), {COMPILED})


def test_no_circle(graph):
    assert len(graph) > 70
    found = circle(graph)
    assert not found, " -> ".join(found)


def test_each_part_imports_only_what_is_below(graph):
    found = crossings(graph, LAYERS, LEAVES)
    assert not found, "\n".join(found)


def test_the_table_names_what_there_is(graph):
    assert LEAVES | set(LAYERS) == {part_of(module) for module in graph}
    before = set()
    for part, allowed in LAYERS.items():
        assert allowed <= before, f"{part} may import {allowed - before}, which stand behind it"
        before.add(part)


@pytest.mark.parametrize(
    "back",
    [
        "from p.low import a",
        "import p.low.a",
        "def f():\n    from p.low.a import x",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.low.a import x",
    ],
)
def test_a_circle_is_found(back):
    texts = {"p": "", "p.low": "", "p.low.a": "from p.low import b", "p.low.b": "import torch"}
    assert circle(import_graph(texts)) == []
    texts["p.low.b"] = back
    assert circle(import_graph(texts)) == ["p.low.a", "p.low.b", "p.low.a"]


def test_a_circle_by_the_package_is_found():
    """Of what a package imports itself, and what asks the package for it."""
    texts = {"p": "from p import a", "p.a": "import p", "p.b": "from p import _C"}
    assert circle(import_graph(texts, {"p._C"})) == ["p", "p.a", "p"]


def test_what_a_folder_runs_counts():
    texts = {"p.x": "from p.low import a", "p.low": "from p.low import b", "p.low.a": ""}
    graph = import_graph({**texts, "p.low.b": "from p import x"})
    assert graph["p.x"] == {"p.low", "p.low.a"}
    assert circle(graph) == ["p.x", "p.low", "p.low.b", "p.x"]


def test_an_import_from_above_is_found():
    graph = import_graph({"p.low.a": "from p import high, leaf", "p.high": "", "p.leaf": ""})
    layers = {"low": set(), "high": {"low"}}
    assert crossings(graph, layers, {"leaf"}) == ["p.low.a imports p.high"]
