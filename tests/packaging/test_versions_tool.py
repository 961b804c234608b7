"""tools/versions.py has rows for every declared dependency, and a row that tested nothing fails."""

from __future__ import annotations

import re

import pytest
from commands import ROOT

import build_backend
import pythons
import versions

PACKAGES = {**versions.declared(), **versions.build_requirements()}


def test_every_declared_dependency_has_a_floor_and_both_rows():
    rows = list(versions.rows())
    for package in PACKAGES:
        ends = [row.end for row in rows if package in row.packages]
        assert set(ends) == set(versions.ENDS), package
    assert set(versions.TESTS) == set(versions.declared())
    names = [(row.name, row.end) for row in rows]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", list(versions.rows()), ids=lambda row: f"{row.name}-{row.end}")
def test_rows_ask_for_the_floors_and_run_tests_that_are_there(row):
    assert [re.split("=", wanted)[0] for wanted in versions.requirements(row)] == list(row.packages)
    for wanted in versions.requirements(row):
        name, _, version = wanted.partition("==")
        assert version == (PACKAGES[name] if row.end == "lowest" else "")
    for path in (test for test in row.tests if not test.startswith("--numprocesses")):
        assert (ROOT / path.removeprefix("--ignore=")).exists(), path


def test_the_oldest_python_is_the_declared_one():
    declared = versions.project()["project"]["requires-python"]
    assert declared == f">={pythons.SUPPORTED[0]}"


def test_the_oldest_setuptools_is_the_declared_one():
    assert PACKAGES["setuptools"].split(".")[0] == str(build_backend.OLDEST_SETUPTOOLS)


@pytest.mark.parametrize("requirement", ["numpy", "numpy>1", "numpy>=1,<3"])
def test_a_dependency_without_a_plain_floor(requirement):
    with pytest.raises(ValueError, match="a floor, NAME>=VERSION, is needed"):
        versions._floors([requirement], set())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "tarnsformers"], "no row tarnsformers; there are: packages, "),
        (["--only", "numpy", "--only", "none"], "no row none; there are: "),
        (["--only", "numpy", "--tests", "tests/none.py"], "--tests tests/none.py: no such file"),
        (["--python", "3.9"], "no row python 3.9; there are: "),
        (["--python", "3.12", "--end", "lowest"], "--end lowest: python 3.12 has no such row"),
    ],
)
def test_options_that_match_nothing(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        versions.main(arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("found", "summary", "result"),
    [
        ("5.4.0", "12 passed, 3 skipped in 1.50s", "| 12 passed, 3 skipped |"),
        ("5.4.0", "3 skipped in 1.50s", "| no test ran |"),
        ("5.3.0", "12 passed in 1.50s", "| transformers 5.3.0 is there, not transformers==5.4 |"),
    ],
)
def test_what_a_row_says(capsys, monkeypatch, found, summary, result):
    monkeypatch.setattr(versions, "create", lambda row, folder: folder)
    monkeypatch.setattr(versions, "versions", lambda _, names: dict.fromkeys(names, found))
    monkeypatch.setattr(versions, "declared", lambda: {"transformers": "5.4"})
    outputs = {"pytest": summary, "python -V": "Python 3.11.7"}
    monkeypatch.setattr(versions, "check_output", lambda *_, what, **__: outputs[what])
    status = versions.main(["--only", "transformers", "--end", "lowest"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("| transformers, lowest | ")
    assert line.endswith(result)
    assert status == int(not re.search("12 passed, 3", result))


def test_a_python_that_is_not_here(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert versions.main(["--python", "3.12"]) == 1
    assert "no python3.12 on PATH or in" in capsys.readouterr().out.splitlines()[-1]
