"""Runs the tests with the lowest and the newest version of every declared dependency.

    python tools/versions.py --list
    python tools/versions.py                               # all rows: hours, and many gigabytes
    python tools/versions.py --only packages               # what continuous integration runs
    python tools/versions.py --only transformers --end lowest
    python tools/versions.py --python 3.12

pyproject.toml has the floors. A row is a virtual environment that is removed afterwards. Its own
packages come first, then those of this interpreter, including sparse_fmha; a row with another
Python sees only its own. Results are rows of a Markdown table, for docs/versions.md.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.requirements import Requirement

import pythons

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
ENDS = ("lowest", "newest")
INTEGRATIONS = ("tests/integrations",)
PICTURES = (
    *(f"tests/cli/test_{name}.py" for name in ("cli", "demo", "simulate_command")),
    "tests/cost/test_simulate.py",
)
RANDOM = ("tests/ops/test_attention.py", "tests/host/test_walks.py")
ALL = ("tests", "--ignore=tests/gpu", "--ignore=tests/packaging")
# The tests of each package's rows; `packages` combines the packages of the first block.
TESTS = {
    "accelerate": INTEGRATIONS,
    "diffusers": INTEGRATIONS,
    "matplotlib": PICTURES,
    "numpy": (
        *PICTURES,
        "tests/skipping/test_calibration.py",
        "tests/skipping/test_calibration_models.py",
    ),
    "pillow": PICTURES,
    "rich": PICTURES,
    "transformers": INTEGRATIONS,
    "hypothesis": RANDOM,
    "pytest": RANDOM,
    "pytest-xdist": (*RANDOM, "--numprocesses=2"),
    "torch": ALL,
}
TOGETHER = tuple(itertools.takewhile(lambda name: name != "hypothesis", TESTS))
BUILD_SDIST = "import sys, build_backend as b; print(b.build_sdist(sys.argv[1]))"
HEADER = "| row | versions | Python | torch | result |\n| --- | --- | --- | --- | --- |"


class RowError(Exception):
    """A row could not be set up or its tests failed; the message is one line."""


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        name, end: select the row; end is lowest or newest.
        packages: packages that get the lowest or newest version.
        tests: arguments of pytest.
        builds: build sparse_fmha in the row, CPU ops only, with the build requirements of `end`.
        python: version such as 3.12, in an environment that shares nothing; None: this interpreter.
    """

    name: str
    end: str
    packages: tuple[str, ...]
    tests: tuple[str, ...]
    builds: bool = False
    python: str | None = None


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared() -> dict[str, str]:
    """Floors of dependencies and extras, by package; packages with a pinned version have none."""
    table = project()["project"]
    lists = [table["dependencies"], *table["optional-dependencies"].values()]
    return _floors(itertools.chain(*lists), {table["name"]})


def build_requirements() -> dict[str, str]:
    """Floors of the build requirements."""
    return _floors(project()["build-system"]["requires"], set())


def _floors(lines: list[str], own: set[str]) -> dict[str, str]:
    floors = {}
    for requirement in map(Requirement, lines):
        kinds = {s.operator: s.version for s in requirement.specifier}
        if requirement.name in own or set(kinds) == {"=="}:
            continue
        if set(kinds) != {">="}:
            raise ValueError(f"pyproject.toml: {requirement}: a floor, NAME>=VERSION, is needed")
        floors[requirement.name] = kinds[">="]
    return floors


def rows() -> Iterator[Row]:
    for end in ENDS:
        yield Row("packages", end, TOGETHER, INTEGRATIONS)
    for (package, tests), end in itertools.product(TESTS.items(), ENDS):
        yield Row(package, end, (package,), tests)
    for end in ENDS:
        yield Row("build", end, tuple(build_requirements()), RANDOM, builds=True)
    for python in pythons.SUPPORTED:
        yield Row(f"python {python}", "newest", ("torch",), ALL, builds=True, python=python)


def requirements(row: Row) -> list[str]:
    """Arguments for pip, such as transformers==5.4; only names for the newest."""
    floors = {**declared(), **build_requirements()}
    lowest = row.end == "lowest"
    return [f"{name}=={floors[name]}" if lowest else name for name in row.packages]


def interpreter(python: str | None) -> str:
    """The interpreter of a version; None: this interpreter."""
    try:
        return sys.executable if python is None else pythons.interpreter(python)
    except LookupError as error:
        raise RowError(error) from None


def check_output(*command: str | Path, what: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(*done.stdout.splitlines()[-60:], sep="\n", file=sys.stderr)
        raise RowError(f"{what} failed ({done.returncode})")
    return done.stdout


def create(row: Row, folder: Path) -> Path:
    """Creates the environment with everything installed; returns its interpreter."""
    options = [] if row.python else ["--without-pip"]
    check_output(interpreter(row.python), "-m", "venv", *options, folder, what="making the venv")
    python = folder / "bin" / "python"
    if row.python is None:  # includes packages that another environment shares with this one
        shared = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
        site_packages = next(folder.glob("lib/python*/site-packages"))
        site_packages.joinpath("shared.pth").write_text("\n".join(shared))
    install = [python, "-m", "pip", "install", "--quiet"]
    if "torch" in row.packages:
        install.append("--no-cache-dir")  # it would hold gigabytes
    wanted = requirements(row)
    check_output(*install, "--upgrade", *wanted, what=f"installing {' '.join(wanted)}")
    if row.builds:
        wheel = build(row, python, folder / "wheel")
        which = f"{wheel}[test]" if row.python else wheel
        deps = [] if row.python else ["--no-deps", "--force-reinstall"]
        check_output(*install, *deps, which, what=f"installing {wheel.name}")
    return python


def build(row: Row, python: Path, folder: Path) -> Path:
    """Builds the wheel from a source distribution, so that the build trees here do not change."""
    tools = {"PYTHONPATH": str(ROOT / "tools"), "SPARSE_FMHA_ARCHS": "none"}
    if row.python:  # the row `build` already has its own
        newest = list(build_requirements())
        check_output(python, "-m", "pip", "install", "-q", *newest, what="installing build tools")
    folder.mkdir()
    check_output(python, "-c", BUILD_SDIST, folder, env=tools, what="making the sdist")
    (sdist,) = folder.glob("*.tar.gz")
    wheel = [python, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder]
    check_output(*wheel, sdist, env=tools, what="building the wheel")
    return next(folder.glob("*.whl"))


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    script = "import sys, importlib.metadata as m; print(*map(m.version, sys.argv[1:]))"
    return dict(
        zip(
            names,
            check_output(python, "-c", script, *names, what="reading versions").split(),
            strict=True,
        )
    )


def run(row: Row) -> str:
    """Runs a row and returns its line of the table.

    Raises:
        RowError: it cannot be set up, a test fails or none ran.
    """
    with tempfile.TemporaryDirectory(prefix="versions-") as temporary:
        python = create(row, Path(temporary, "venv"))
        found = versions(python, row.packages)
        for wanted in map(Requirement, requirements(row)):
            if not wanted.specifier.contains(found[wanted.name]):
                raise RowError(f"{wanted.name} {found[wanted.name]} is there, not {wanted}")
        env = {"PYTHONPATH": ""} if row.builds else {}
        tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *row.tests]
        output = check_output(*tests, what="pytest", env=env)
        summary = re.findall(r"^(\d+ passed.*?) in [\d.]+s", output, re.M)
        if not summary:
            raise RowError("no test ran")
        torch = versions(python, ("torch",))["torch"]
        version = check_output(python, "-V", what="python -V").split()[1]
    listed = ", ".join(f"{name} {number}" for name, number in found.items())
    return f"| {row.name}, {row.end} | {listed} | {version} | {torch} | {summary[-1]} |"


def choose(only: list[str], pythons: list[str], end: str | None) -> list[Row]:
    """Selects rows; raises ValueError if an option matches nothing."""
    wanted = {*only, *(f"python {python}" for python in pythons)}
    every = list(rows())
    names = list(dict.fromkeys(row.name for row in every))
    unknown = wanted - set(names)
    if unknown:
        raise ValueError(f"no row {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    chosen = [r for r in every if not wanted or r.name in wanted]
    chosen = [r for r in chosen if end in (None, r.end)]
    if not chosen:
        raise ValueError(f"--end {end}: {', '.join(sorted(wanted))} has no such row")
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="these rows")
    parser.add_argument("--python", action="append", default=[], metavar="3.X", help="and these")
    parser.add_argument("--end", choices=ENDS, help="one of the two (default: both)")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="these instead of a row's own")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    options = parser.parse_args(argv)
    try:
        chosen = choose(options.only, options.python, options.end)
        absent = [p for p in options.tests or () if not (ROOT / p.partition("::")[0]).exists()]
        if absent:
            raise ValueError(f"--tests {' '.join(absent)}: no such file")
    except ValueError as error:
        parser.error(str(error))
    if options.tests:
        chosen = [replace(row, tests=tuple(options.tests)) for row in chosen]
    if options.list:
        for row in chosen:
            print(f"{row.name}, {row.end}: {' '.join(requirements(row))}")
        return 0
    print(HEADER, flush=True)
    failed = 0
    for row in chosen:
        try:
            print(run(row), flush=True)
        except RowError as error:
            failed += 1
            print(
                f"| {row.name}, {row.end} | {' '.join(requirements(row))} | | | {error} |",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
