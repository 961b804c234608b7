"""Finds Python interpreters on this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUPPORTED = ("3.10", "3.11", "3.12", "3.13")


def interpreter(version: str) -> str:
    """The interpreter of a version such as 3.12, from PATH or else from pyenv.

    Raises:
        LookupError: there is none.
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python{version}")]
    for program in filter(None, found):
        if subprocess.run([program, "-V"], capture_output=True).returncode == 0:
            return str(program)
    raise LookupError(f"no python{version} on PATH or in {pyenv}")
