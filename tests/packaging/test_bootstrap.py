"""What `make demo` and `make test` say on a machine that lacks something."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

BASE_PYTHON = Path(sys.base_prefix, "bin", f"python3.{sys.version_info.minor}")


@pytest.fixture
def machine(tmp_path):
    """Returns a function that runs `make demo` with only the named programs on PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()

    def run(*programs: str, scripts: dict[str, str] | None = None, **env: str):
        for name in ("make", "sh", "env", *programs):
            found = shutil.which(name)
            assert found is not None, name
            tools.joinpath(name).symlink_to(found)
        for name, text in (scripts or {}).items():
            tools.joinpath(name).write_text(text)
            tools.joinpath(name).chmod(0o755)
        command = ["make", "demo", f"VENV={tmp_path / 'venv'}", f"PYTHON={env.pop('PYTHON')}"]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={"PATH": str(tools), "HOME": str(tmp_path), **env},
            capture_output=True,
            text=True,
        )
        errors = [line for line in done.stderr.splitlines() if not line.startswith("make")]
        return done.returncode, errors

    return run


def test_no_python(machine):
    status, errors = machine(PYTHON="python3")
    assert status != 0
    assert errors == [
        "error: python3 not found; install Python 3.10 or newer, or set PYTHON",
    ]


def test_old_python(machine):
    old = '#!/bin/sh\nif [ "$1" = -V ]; then echo Python 3.8.18; else exit 1; fi\n'
    status, errors = machine(scripts={"python3": old}, PYTHON="python3")
    assert status != 0
    assert errors == ["error: Python 3.10 or newer is needed; python3 is Python 3.8.18; set PYTHON"]


def test_no_compiler(machine):
    status, errors = machine(PYTHON=str(BASE_PYTHON))
    assert status != 0
    assert len(errors) == 1
    assert errors[0].startswith("error: no C++ compiler: c++ not found; install one")
    assert "apt install g++" in errors[0]


def test_compiler_without_cxx17(machine):
    old = "#!/bin/sh\necho \"c++: error: unrecognized option '-std=c++17'\" >&2\nexit 1\n"
    status, errors = machine(scripts={"c++": old}, PYTHON=str(BASE_PYTHON))
    assert status != 0
    assert errors == [
        "error: c++ does not compile C++17: c++: error: unrecognized option '-std=c++17'"
    ]


def test_unreachable_package_index(machine):
    index = "http://127.0.0.1:9/simple"
    offline = {"PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    status, errors = machine("c++", PYTHON=str(BASE_PYTHON), **offline)
    assert status != 0
    assert len(errors) == 1
    assert errors[0].startswith(f"error: cannot reach the package index {index}: check the network")


def test_old_setuptools():
    """As in a new environment of Python 3.10, where pip builds without isolation."""
    script = "import setuptools; setuptools.__version__ = '65.5.0'; import build_backend"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT / "tools", capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: setuptools 65.5.0 is too old; building takes 77 or newer: "
        "pip install -U setuptools, or leave out --no-build-isolation"
    ]
