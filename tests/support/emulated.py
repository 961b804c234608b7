"""The build of the package whose GPU kernels run on the emulator: tests/emulator/README.md."""

import re
from pathlib import Path

import sparse_fmha

RUNTIME = Path(sparse_fmha.__file__).with_name("libemulated_cuda.so")
UNIT_TESTS = RUNTIME.with_name("emulator_unit_tests")
CAPABILITY = 9, 0  # of the emulated GPU
MISSING = re.compile(
    r"no kernel for arch=sm\d+, [^.;\n]*|needs kernels of sm\d+, and this build has"
)


def is_loaded():
    return RUNTIME.exists()


def missing_row(error):
    """What row of csrc/kernels a call needs that is not among those built; None for other errors.

    Rows that no build has are no reason to skip a test.
    """
    while error is not None:
        if found := MISSING.search(str(error)):
            return found[0]
        error = error.__cause__ or error.__context__
    return None
