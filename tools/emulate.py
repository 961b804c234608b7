"""Builds the package for the emulator of tests/emulator and runs its tests.

    emulate.py [--build FOLDER] [PYTEST ARGUMENT...]

The kernels are those of CMake's default (tests/emulator/CMakeLists.txt), for all architectures that
nvcc can build. Without an nvcc there is nothing to run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import locate

ROOT = Path(__file__).resolve().parent.parent


def tool(name: str) -> str:
    """A program of this Python's environment, else one of the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "emulator")
    options, rest = parser.parse_known_args()
    if not locate.builds_gpu_kernels():
        print("emulator: not built, as no GPU kernels are")
        return 0
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    configure = [tool("cmake"), "-S", ROOT, "-B", options.build, "-G", "Ninja"]
    configure += ["-DSPARSE_FMHA_EMULATED=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    if os.environ.get("CUTLASS_DIR"):
        configure.append(f"-DCUTLASS_DIR={os.environ['CUTLASS_DIR']}")
    for command in (configure, [tool("cmake"), "--build", options.build]):
        if status := subprocess.call([str(word) for word in command]):
            return status
    environment = {**os.environ, "PYTHONPATH": str(options.build / "python")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *rest, "tests/emulator"]
    return subprocess.call(command, cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())
