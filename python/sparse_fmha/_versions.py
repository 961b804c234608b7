"""The lowest versions of other packages that this library supports."""

from __future__ import annotations

import importlib
import importlib.metadata
import re

# Same as in pyproject.toml (a test compares them); tools/versions.py runs the tests with these.
FLOORS = {
    "torch": "2.10",
    "numpy": "1.26",
    "matplotlib": "3.8",
    "pillow": "10.1",
    "rich": "13.0",
    "diffusers": "0.37",
    "transformers": "5.4",
}
MODULES = {"pillow": "PIL"}  # where it differs from the package's name


def release(version: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: (2, 13, 0) for 2.13.0+cpu."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def is_supported(package: str, version: str) -> bool:
    """Whether the package's version is at or above its floor."""
    found, floor = release(version), release(FLOORS[package])
    return found + (0,) * (len(floor) - len(found)) >= floor


def require(*packages: str, by: str = "sparse_fmha", extra: str = "") -> None:
    """Checks that packages are installed and recent enough.

    Args:
        packages: keys of FLOORS.
        by: what needs the packages, for the message.
        extra: the extra of this package that installs them.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ImportError: a package is below its floor. Either message is one line.
    """
    for package in packages:
        name = MODULES.get(package, package)
        wanted = f"'sparse-fmha[{extra}]'" if extra else f"'{package}>={FLOORS[package]}'"
        needs = f"{by} needs {package} >= {FLOORS[package]}"
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ModuleNotFoundError(
                f"{needs}, which is not installed: pip install {wanted}", name=name
            ) from None
        version = getattr(module, "__version__", None) or importlib.metadata.version(package)
        if not is_supported(package, version):
            raise ImportError(
                f"{needs}; {package} {version} is installed: pip install -U {wanted}", name=name
            )
