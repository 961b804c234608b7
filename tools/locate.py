"""Finds the packages that the build takes headers and libraries from, without importing them.

An isolated build hides the environment that the wheel is for, yet that is where torch is. So after
`sys.path` the directories are searched that this interpreter would use outside of isolation. The
library uses LibTorch's stable ABI: headers of any torch >= MIN_TORCH serve every other one.
"""

from __future__ import annotations

import os
import re
import site
import sys
import sysconfig
from pathlib import Path

MIN_TORCH = (2, 10)
PINNED_TORCH = "torch==2.13.0"
PINNED_CUTLASS = "nvidia-cutlass==4.2.0.0"


def _search_path() -> list[str]:
    dirs = list(sys.path) + [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    config = Path(sys.prefix, "pyvenv.cfg")
    shares_base = not config.is_file() or re.search(
        r"^include-system-site-packages\s*=\s*true", config.read_text(), re.I | re.M
    )
    if shares_base:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        dirs += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
        dirs += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return list(dict.fromkeys(d for d in dirs if d))


def find_package(name: str) -> Path | None:
    """Directory of an installed package."""
    candidates = (Path(d, name) for d in _search_path())
    return next((p for p in candidates if (p / "__init__.py").is_file()), None)


def torch_version(directory: Path) -> str:
    """Version of the torch in `directory`, such as 2.13.0+cpu."""
    match = re.search(r"__version__ = ['\"](.+?)['\"]", (directory / "version.py").read_text())
    return match.group(1) if match else "unknown"


def is_supported_torch(version: str) -> bool:
    """Whether the stable ABI of that torch has what the ops use."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= MIN_TORCH


def torch() -> Path:
    """Directory of a torch whose headers will do; SPARSE_FMHA_TORCH may name it."""
    wanted = os.environ.get("SPARSE_FMHA_TORCH")
    directory = Path(wanted) if wanted else find_package("torch")
    minimum = ".".join(map(str, MIN_TORCH))
    get_one = (
        f"install torch >= {minimum} first (for example `pip install {PINNED_TORCH} "
        "--extra-index-url https://download.pytorch.org/whl/cpu`) or set SPARSE_FMHA_TORCH to the "
        "directory of a torch package"
    )
    if directory is None:
        raise LookupError(f"torch is not installed for {sys.executable}: {get_one}")
    if not (directory / "version.py").is_file():
        raise LookupError(f"SPARSE_FMHA_TORCH={wanted} is not the directory of a torch package")
    version = torch_version(directory)
    if not is_supported_torch(version):
        raise LookupError(f"torch {version} in {directory} is too old: {get_one}")
    return directory


def cutlass() -> Path:
    """Include directory of CUTLASS; CUTLASS_DIR may name a checkout."""
    wanted = os.environ.get("CUTLASS_DIR")
    if wanted:
        return Path(wanted, "include")
    package = find_package("cutlass_library")
    if package is None:
        raise LookupError(
            f"CUTLASS is needed for the GPU kernels: `pip install --no-deps {PINNED_CUTLASS}` or "
            "set CUTLASS_DIR to a checkout of CUTLASS v4.2.0"
        )
    return package / "source" / "include"


def pybind11() -> Path:
    """Directory of pybind11's CMake configuration."""
    package = find_package("pybind11")
    if package is None:
        raise LookupError("pybind11 is needed to build: `pip install pybind11`")
    return package / "share" / "cmake" / "pybind11"


if __name__ == "__main__":
    try:
        print({"torch": torch, "cutlass": cutlass, "pybind11": pybind11}[sys.argv[1]]())
    except LookupError as error:
        sys.exit(str(error))
