"""The source distribution has all that a build needs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import PurePosixPath

import pytest
from commands import ROOT, TOOLS, check_output

BUILD_SDIST = "import sys, build_backend as b; print(b.build_sdist(sys.argv[1]))"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    check_output(sys.executable, "-c", BUILD_SDIST, folder, env={"PYTHONPATH": str(TOOLS)})
    (path,) = folder.glob("*.tar.gz")
    return path


def test_every_tracked_file_is_in_the_sdist(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = set(check_output("git", "-c", "safe.directory=*", "ls-files").splitlines())
    with tarfile.open(sdist) as archive:
        packed = {str(PurePosixPath(*PurePosixPath(n).parts[1:])) for n in archive.getnames()}
    assert tracked - packed == set()


def test_isolated_build_from_the_sdist(sdist, tmp_path, fresh_venv):
    """pip isolates the build from torch, and the backend takes its headers all the same."""
    pip_wheel = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", sdist]
    log = check_output(*pip_wheel, "--wheel-dir", tmp_path, env={"SPARSE_FMHA_ARCHS": "none"})
    assert "Downloading torch" not in log
    assert "Building CXX object" in log
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "sparse_fmha/libsparse_fmha.so" in archive.namelist()
    use = "import sparse_fmha; print({row['arch'] for row in sparse_fmha.kernels()})"
    assert check_output(fresh_venv(wheel), "-c", use, cwd=tmp_path).strip() == "{'cpu'}"


def test_a_failing_build_says_so(sdist, tmp_path):
    options = ["--no-deps", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(sdist)]
    env = {**os.environ, "SPARSE_FMHA_ARCHS": "70"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "SPARSE_FMHA_ARCHS=70: 70 is not supported" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))
