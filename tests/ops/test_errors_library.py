"""A package whose op library or extension is missing or of another Python says so."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparse_fmha


def run_without(tmp_path, patterns, code):
    """Runs Python code on a copy of the package that lacks the files of these patterns."""
    copy = tmp_path / "sparse_fmha"
    ignored = shutil.ignore_patterns(*patterns, "__py*")
    shutil.copytree(Path(sparse_fmha.__file__).parent, copy, ignore=ignored, dirs_exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("function", ["kernels", "build_info"])
def test_extension_of_another_python(tmp_path, function):
    """Without `_C` the ops work; the two functions that need it say what is missing."""
    code = (
        "import torch, sparse_fmha as s; x = torch.ones(1, 2, 1, 8); "
        f"print(s.attention(x, x, x).equal(x)); s.{function}()"
    )
    run = run_without(tmp_path, ["_C.*"], code)
    assert run.stdout == "True\n"
    last = run.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: sparse_fmha's extension _C is missing .*pip install", last)


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (None, "libsparse_fmha.so is missing; .*pip install"),
        (b"text", "libsparse_fmha.so cannot be loaded"),
    ],
    ids=["missing", "damaged"],
)
def test_library(tmp_path, library, message):
    """A package without its op library, or with a file that is none."""
    if library is not None:
        (tmp_path / "sparse_fmha").mkdir()
        (tmp_path / "sparse_fmha/libsparse_fmha.so").write_bytes(library)
    run = run_without(tmp_path, ["*.so"], "import sparse_fmha")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sparse_fmha's op library")
    assert str(tmp_path) in last
    assert re.search(message, last)
