"""The build of the package whose GPU kernels run on the emulator: tests/emulator/README.md."""

import ctypes
import re
from pathlib import Path

import sparse_fmha

RUNTIME = Path(sparse_fmha.__file__).with_name("libemulated_cuda.so")
UNIT_TESTS = RUNTIME.with_name("emulator_unit_tests")
CAPABILITY = 9, 0  # of the emulated GPU
MISSING = re.compile(r"no kernel for arch=sm\d+, [^.;\n]*|needs kernels of sm\d+")


def is_loaded():
    return RUNTIME.exists()


def launches():
    """The number of kernels launched so far."""
    count = ctypes.CDLL(str(RUNTIME)).emulator_launches
    count.restype = ctypes.c_int64
    return count()


def why_skipped(error):
    """Why a test that ended with the error is skipped: the row that it needs was not built."""
    while is_loaded() and error is not None:
        if found := MISSING.search(str(error)):
            return f"not built: {found[0]}"
        error = error.__cause__ or error.__context__
    return None
