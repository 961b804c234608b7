"""Wheels and environments to examine. Everything here runs the build for real."""

from __future__ import annotations

import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from commands import ROOT, check_output


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.packaging)


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout for this Python, built without isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder]
    check_output(*pip_wheel, "--no-build-isolation", ROOT)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="session")
def libraries(wheel, tmp_path_factory) -> dict[str, Path]:
    """The shared libraries of the wheel by their name up to the first dot."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return {path.name.split(".")[0]: path for path in folder.rglob("*.so")}


@pytest.fixture
def fresh_venv(tmp_path):
    """Returns a function that installs a wheel into a new environment, which sees this torch."""

    def install(wheel: Path) -> Path:
        folder = tmp_path / "venv"
        venv.create(folder, with_pip=True, symlinks=True)
        python = folder / "bin" / "python"
        check_output(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
        site_packages = next(folder.glob("lib/python*/site-packages"))
        site_packages.joinpath("torch.pth").write_text(str(Path(torch.__file__).parents[1]))
        return python

    return install
