"""Generates source files of the kernels that reduce scores: sm90/scores.

    score_kernels.py [--rows=REGEX] FOLDER [ARCH...]

writes into the folder the source files of those of the architectures (as in SPARSE_FMHA_ARCHS) in
whose name the regular expression is found, and score_kernels.inc, which names them for the
registry. Prints ARCH:FILE for each source file.
"""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path

from kernel_list import DTYPES, write_changed

ARCH = "90a"
HEAD_DIMS = (64, 128, 256)


def source(name: str, element: str, head_dim: int) -> str:
    return f"""\
#include "sparse_fmha/sm90/scores/launch.h"

namespace sparse_fmha {{
ScoreKernels {name}() {{
  return sm90::score_kernels<cutlass::{element}, {head_dim}>("{name}");
}}
}}  // namespace sparse_fmha
"""


def write(folder: Path, archs: list[str], wanted: str = "") -> list[str]:
    """Writes the files into the folder; returns the names of the kernels."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for (element, dtype), head_dim in itertools.product(DTYPES.items(), HEAD_DIMS):
        name = f"sm90_scores_{dtype}_d{head_dim}"
        if ARCH in archs and re.search(wanted, name):
            write_changed(folder / f"{name}.cu", source(name, element, head_dim))
            names.append(name)
    listed = "".join(f"SPARSE_FMHA_SCORES({name})\n" for name in names)
    write_changed(folder / "score_kernels.inc", listed)
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("archs", nargs="*")
    parser.add_argument("--rows", default="")
    given = parser.parse_args()
    for name in write(given.folder, given.archs, given.rows):
        print(f"{ARCH}:{name}")
