"""C++ programs of tests, compiled by the host's compiler."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import locate

ROOT = Path(__file__).parents[2]


def compiled(program: Path, sources: list[Path], *flags: str) -> Path:
    """The program that the sources make; skips the test without a compiler."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    command = [compiler, "-std=c++17", *flags, "-I", ROOT / "include", *sources, "-o", program]
    subprocess.run(list(map(str, command)), check=True)
    return program


def lines(program: Path, *arguments: str) -> list[str]:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def cuda_headers() -> Path:
    """Where CUDA's headers are; skips the test if nowhere."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    with contextlib.suppress(LookupError):
        homes.insert(0, str(locate.nvcc().resolve().parents[1]))
    folders = [Path(home, "include") for home in homes if home]
    found = next((at for at in folders if (at / "cuda_runtime_api.h").is_file()), None)
    if found is None:
        pytest.skip("there are no headers of CUDA")
    return found


def cutlass_headers() -> Path:
    """Where CUTLASS's headers are; skips the test if nowhere."""
    try:
        found = locate.cutlass()
    except LookupError:
        found = ROOT / ".cutlass" / "include"
    if not (found / "cutlass" / "version.h").is_file():
        pytest.skip("there are no headers of CUTLASS")
    return found
