"""What a file of benchmarks uses of the others follows from its folder."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
USES = {
    "harness": {"harness"},
    "cases": {"cases"},
    "peers": {"peers", "cases", "harness"},
    "tables": {"tables", "harness"},
    "studies": {"studies", "tables", "peers", "cases", "harness"},
}


def imported(path):
    """The modules of benchmarks that a file imports, as they are named after `benchmarks.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("benchmarks.") for name in names if name[:10] == "benchmarks")


def test_each_folder_uses_what_it_may():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")}
    assert folders == set(USES)
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for folder, allowed in USES.items()
        for path in (ROOT / folder).glob("*.py")
        for name in imported(path)
        if name.partition(".")[0] not in allowed
    ]
    assert not wrong
