"""What a type checker says of the public functions: mypy on `typing_cases.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy")

CASES = Path(__file__).with_name("typing_cases.py")
ROOT = CASES.parents[2]


def test_each_call_has_its_type_and_no_other(tmp_path):
    """The cases hold, and each fails where another type is expected."""
    text = CASES.read_text()
    wrong = tmp_path / "wrong_cases.py"
    expected = re.compile(r", [\w.]+(\[\w+\])?( \| \w+)*\)$", re.M)
    wrong.write_text(expected.sub(", bytes)", text))
    places = [n for n, line in enumerate(text.splitlines(), 1) if "assert_type(" in line]
    assert len(places) > 30
    command = [sys.executable, "-m", "mypy", "--no-pretty", str(CASES), str(wrong)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert not done.stderr
    found = re.findall(r"^(.+?):(\d+): error: .*\[(.+)\]$", done.stdout, re.M)
    failed = [(Path(path).name, int(n), code) for path, n, code in found if "cases.py" in path]
    assert failed == [(wrong.name, n, "assert-type") for n in places], done.stdout
