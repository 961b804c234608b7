"""Finds torch, CUTLASS, pybind11 and nvcc for the build, and the GPU architectures that it can
build for.

Packages are found without importing them. An isolated build hides the environment that the package
is for, although torch is there. So after `sys.path`, the directories that this interpreter would
use outside of isolation are searched. Headers of any torch >= MIN_TORCH work for every other such
torch, because the library uses only LibTorch's stable ABI.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import arch_table

ROOT = Path(__file__).resolve().parent.parent
_floor = re.search(r'"torch>=(\d+)\.(\d+)"', ROOT.joinpath("pyproject.toml").read_text())
MIN_TORCH = tuple(map(int, _floor.groups()))
PINNED_TORCH = "torch==2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PINNED_CUTLASS = "nvidia-cutlass==4.2.0.0"
MIN_CUDA = (12, 5)  # the first version with cudaGetDriverEntryPointByVersion
# Supported architectures, and the compute capabilities of the GPUs that run each.
ARCHS = {arch.nvcc: list(arch.capabilities) for arch in arch_table.read()}


def _linked(directory: str) -> list[str]:
    """Folders added by the directory's .pth files, which make nested environments see packages."""
    files = sorted(Path(directory).glob("*.pth"))
    lines = [line for file in files for line in file.read_text(errors="replace").splitlines()]
    folders = (line.strip() for line in lines if not line.startswith(("#", "import")))
    return [str(Path(directory, f)) for f in folders if f and Path(directory, f).is_dir()]


def _search_path() -> list[str]:
    own = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    dirs = [*sys.path, *own, *(each for directory in own for each in _linked(directory))]
    config = Path(sys.prefix, "pyvenv.cfg")
    isolated = config.is_file() and not re.search(
        r"^include-system-site-packages\s*=\s*true", config.read_text(), re.I | re.M
    )
    if not isolated:
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        dirs += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
        dirs += [*site.getsitepackages([sys.base_prefix]), site.getusersitepackages()]
    return list(dict.fromkeys(d for d in dirs if d))


def _package(name: str) -> Path | None:
    candidates = (Path(d, name) for d in _search_path())
    return next((p for p in candidates if (p / "__init__.py").is_file()), None)


def torch_version(directory: Path) -> str:
    """The version of the torch in `directory`, such as 2.13.0+cpu."""
    match = re.search(r"__version__ = ['\"](.+?)['\"]", (directory / "version.py").read_text())
    return match.group(1) if match else "unknown"


def is_supported_torch(version: str) -> bool:
    """Whether the stable ABI of that torch has everything that the ops use."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= MIN_TORCH


def torch_requirement() -> str | None:
    """The requirement in SPARSE_FMHA_TORCH, if it is not a directory."""
    wanted = os.environ.get("SPARSE_FMHA_TORCH", "")
    return wanted if re.match(r"torch\b[^/]*$", wanted) else None


def torch() -> Path:
    """Directory of a torch with suitable headers."""
    wanted = None if torch_requirement() else os.environ.get("SPARSE_FMHA_TORCH")
    directory = Path(wanted) if wanted else _package("torch")
    get_one = (
        f"install torch >= {'.'.join(map(str, MIN_TORCH))} first, for example "
        f"`pip install {PINNED_TORCH}+cpu --extra-index-url {TORCH_CPU_INDEX}`, or set "
        "SPARSE_FMHA_TORCH to the directory of a torch package"
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
    package = _package("cutlass_library")
    if package is None:
        raise LookupError(
            f"the GPU kernels need CUTLASS: `pip install --no-deps {PINNED_CUTLASS}`, or set "
            "CUTLASS_DIR to a checkout of CUTLASS v4.2.0, or build without them: "
            "SPARSE_FMHA_ARCHS=none"
        )
    return package / "source" / "include"


def pybind11() -> Path:
    """Directory of pybind11's CMake configuration."""
    package = _package("pybind11")
    if package is None:
        raise LookupError("pybind11 is needed to build: `pip install pybind11`")
    return package / "share" / "cmake" / "pybind11"


def nvcc() -> Path:
    """The CUDA compiler: CUDACXX, CUDA_HOME, CUDA_PATH, PATH, then the usual place."""
    if os.environ.get("CUDACXX"):
        return Path(os.environ["CUDACXX"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    path = [*(f"{h}/bin" for h in homes if h), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(path))
    if found is None:
        raise LookupError("no nvcc found on PATH, in CUDA_HOME or in /usr/local/cuda")
    return Path(found)


def capable_nvcc() -> Path:
    """An nvcc that can build the kernels."""
    found = nvcc()
    needed = f"nvcc >= {'.'.join(map(str, MIN_CUDA))} is needed"
    try:
        text = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise LookupError(f"{needed}; {found} does not run: {error.strerror}") from None
    version = re.search(r"release (\d+)\.(\d+)", text)
    if version is None:
        raise LookupError(f"{needed}; {found} does not say its version")
    if tuple(map(int, version.groups())) < MIN_CUDA:
        raise LookupError(f"{needed}; {found} is {'.'.join(version.groups())}")
    return found


def archs() -> tuple[list[str], str]:
    """The architectures that a build in this environment compiles kernels for.

    SPARSE_FMHA_ARCHS is "none", a list, or empty for all that the nvcc found can build. If the
    result is empty, the second value says why.

    Raises:
        LookupError: SPARSE_FMHA_ARCHS has an unsupported architecture, or needs an nvcc that is
            missing.
    """
    wanted = os.environ.get("SPARSE_FMHA_ARCHS", "")
    if wanted == "none":
        return [], "as asked (SPARSE_FMHA_ARCHS)"
    asked = re.split("[,;]", wanted) if wanted else []
    for arch in asked:
        if arch not in ARCHS:
            raise LookupError(
                f"SPARSE_FMHA_ARCHS={wanted}: {arch} is not supported; allowed are none, or a list "
                f"of: {', '.join(ARCHS)}"
            )
    try:
        capable_nvcc()
    except LookupError as error:
        if asked:
            raise LookupError(
                f"SPARSE_FMHA_ARCHS={wanted}: {error}; set CUDACXX, or SPARSE_FMHA_ARCHS=none"
            ) from None
        return [], str(error)
    return asked or list(ARCHS), ""


def builds_gpu_kernels() -> bool:
    """Whether a build in this environment compiles GPU kernels."""
    return bool(archs()[0])


def _archs_for_cmake() -> str:
    found, reason = archs()
    return ";".join(found) or f"none: {reason}"


if __name__ == "__main__":
    find = {
        "torch": torch,
        "cutlass": cutlass,
        "pybind11": pybind11,
        "nvcc": capable_nvcc,
        "archs": _archs_for_cmake,
    }
    try:
        print(find[sys.argv[1]]())
    except LookupError as error:
        sys.exit(str(error))
