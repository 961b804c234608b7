"""Drives CMake and Ninja; everything else is in pyproject.toml.

Environment: SPARSE_FMHA_ARCHS (a list of 90a, 80, 86, or none for the CPU alone), CUTLASS_DIR,
SPARSE_FMHA_TORCH, CMAKE_ARGS, MAX_JOBS; SPARSE_FMHA_RELEASE, interpreters with a : between them,
makes one wheel for all of them and for manylinux_2_28, which tools/release.py checks. The CMake
trees are kept in build/, so that a second build is quick, also after one for other architectures.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
import locate  # noqa: E402

RELEASE = [p for p in os.environ.get("SPARSE_FMHA_RELEASE", "").split(os.pathsep) if p]


def tool(name: str) -> str:
    """Path of cmake or ninja: of the package that this Python sees, else of PATH."""
    package = importlib.util.find_spec(name)
    # PREFIX/lib/python3.x/site-packages/ninja/__init__.py has its program in PREFIX/bin.
    beside = Path(package.origin).parents[4] / "bin" if package and package.origin else ""
    found = shutil.which(name, path=str(beside)) or shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is needed to build: pip install {name}")
    return found


def jobs() -> int:
    """One compiler per core, as far as 3 GB of memory for each will go; MAX_JOBS overrides it."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fit = min(len(os.sched_getaffinity(0)), max(1, memory // (3 << 30)))
    wanted = os.environ.get("MAX_JOBS") or str(fit)
    if not wanted.isdecimal() or int(wanted) < 1:
        raise SystemExit(f"error: MAX_JOBS={wanted}: a number of at least 1 is needed")
    return int(wanted)


def cmake_options() -> list[str]:
    """Those of CMAKE_ARGS."""
    try:
        return shlex.split(os.environ.get("CMAKE_ARGS", ""))
    except ValueError as error:
        raise SystemExit(f"error: CMAKE_ARGS={os.environ['CMAKE_ARGS']}: {error}") from None


def tree() -> Path:
    """The CMake tree. One with fewer architectures than all is apart: CMake deletes the objects of
    targets that are gone, and the kernels are half an hour of work."""
    try:
        archs, _ = locate.archs()
    except LookupError as error:
        raise SystemExit(f"error: {error}") from None
    name = ["release" if RELEASE else "cmake", sys.implementation.cache_tag]
    if set(archs) != set(locate.ARCHS):
        name += sorted(archs) or ["none"]
    return ROOT / "build" / "-".join(name)


def release_options() -> list[str]:
    return ["-DSPARSE_FMHA_MANYLINUX=ON", f"-DSPARSE_FMHA_PYTHONS={';'.join(RELEASE)}"]


class Wheel(bdist_wheel):
    def get_tag(self):
        if not RELEASE:
            return super().get_tag()
        # `_C` has a file for each Python, and the op library is free of Python.
        return "py3", "none", f"manylinux_2_28_{os.uname().machine}"


class Build(build):
    def run(self):
        # setuptools never removes a module here that was removed from the source.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    def run(self):
        package_dir = Path(self.get_ext_fullpath("sparse_fmha._C")).resolve().parent
        cmake, folder = tool("cmake"), tree()
        archs = os.environ.get("SPARSE_FMHA_ARCHS", "")
        configure = [
            *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DSPARSE_FMHA_ARCHS={archs}",
            *(release_options() if RELEASE else ()),
            *cmake_options(),
        ]
        install = [cmake, "--install", str(folder), "--prefix", str(package_dir.parent), "--strip"]
        for command in (configure, [cmake, "--build", str(folder), "-j", str(jobs())], install):
            status = subprocess.call(command)
            if status:
                raise SystemExit(f"failed ({status}): {shlex.join(command)}")


setup(
    ext_modules=[Extension("sparse_fmha._C", sources=[])],
    cmdclass={"bdist_wheel": Wheel, "build": Build, "build_ext": CMakeBuild},
)
