"""Another package that is missing or too old is one line that says so, at import."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from sparse_fmha import _versions
from sparse_fmha._ops import library

ROOT = Path(__file__).parents[2]
DECLARED = re.findall(r'"([\w-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
# What needs each package, where another than the top module.
NEEDED_BY = {
    "diffusers": "sparse_fmha.integrations.diffusers",
    "transformers": "sparse_fmha.integrations.transformers",
    "matplotlib": "sparse_fmha.plotting.pictures",
    "pillow": "sparse_fmha.cli.photo",
    "rich": "sparse_fmha.cli.demo",
}
USERS = [
    *NEEDED_BY.items(),
    ("matplotlib", "sparse_fmha.cli.photo"),
    ("matplotlib", "sparse_fmha.plotting.blocks"),
    ("matplotlib", "sparse_fmha.plotting.law"),
    ("matplotlib", "sparse_fmha.plotting.tiles"),
    ("matplotlib", "sparse_fmha.cli.demo"),
    ("pillow", "sparse_fmha.cli.demo"),
]


def module_of(package):
    return pytest.importorskip(_versions.MODULES.get(package, package))


def below(floor: str) -> str:
    *first, last = _versions.release(floor)
    numbers = [*first, last - 1] if last else [first[0] - 1, 99]
    return ".".join(map(str, numbers)) + ".9"


def test_floors_are_those_of_the_package():
    declared = dict(DECLARED)
    assert {name: declared.get(name) for name in _versions.FLOORS} == _versions.FLOORS


def test_the_op_library_is_made_for_the_oldest_torch():
    (target,) = re.findall(r"TORCH_TARGET_VERSION=0x(\w+)", (ROOT / "CMakeLists.txt").read_text())
    oldest = int(target[:2], 16), int(target[2:4], 16)
    assert _versions.release(_versions.FLOORS["torch"]) == oldest


@pytest.mark.parametrize("package", ["torch", "numpy"])
def test_below_the_floor_of_the_library(package, monkeypatch):
    module, floor = module_of(package), _versions.FLOORS[package]
    old = below(floor)
    monkeypatch.setattr(module, "__version__", old)
    with pytest.raises(ImportError) as caught:
        library.load()
    assert str(caught.value) == (
        f"sparse_fmha needs {package} >= {floor}; {package} {old} is installed: "
        f"pip install -U '{package}>={floor}'"
    )


@pytest.mark.parametrize(("package", "user"), USERS)
def test_below_the_floor_of_an_optional_module(package, user, monkeypatch):
    other, floor, needs = (
        module_of(package),
        _versions.FLOORS[package],
        importlib.import_module(user),
    )
    monkeypatch.setattr(other, "__version__", below(floor), raising=False)
    with pytest.raises(ImportError) as caught:
        importlib.reload(needs)
    message = str(caught.value)
    assert message.startswith(
        f"{user} needs {package} >= {floor}; {package} {below(floor)} is installed: pip install -U "
    )
    assert re.search(r"'sparse-fmha\[\w+\]'$", message)


@pytest.mark.parametrize(("package", "user"), USERS)
def test_an_optional_package_that_is_missing(package, user, monkeypatch):
    module_of(package)
    needs = importlib.import_module(user)
    monkeypatch.setitem(sys.modules, _versions.MODULES.get(package, package), None)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.reload(needs)
    assert re.fullmatch(
        rf"{user} needs {package} >= [\d.]+, which is not installed: "
        r"pip install 'sparse-fmha\[\w+\]'",
        str(caught.value),
    )


@pytest.mark.parametrize("package", _versions.FLOORS)
def test_the_floor_and_what_is_newer_will_do(package):
    floor = _versions.FLOORS[package]
    for version in (floor, f"{floor}.0", f"{floor}.1+cpu", f"{floor}.dev20260101", "999.0rc1"):
        assert _versions.is_supported(package, version), version
    for version in (below(floor), "0.0.1", "unknown"):
        assert not _versions.is_supported(package, version), version
