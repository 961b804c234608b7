"""Runs the programs that the packaging tests examine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"


def check_output(*command, env=None, cwd=ROOT) -> str:
    """Output of a command that must succeed; a failure shows all of it.

    Without the PYTHONPATH of the tests, through which pip would find the package in the tree and
    install nothing.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=inherited | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
