"""From a fresh checkout to the demo, the docs or the tests: `make` runs this for each.

Needs Python >= 3.10 and a C++17 compiler; the rest is installed into a virtual environment.
Problems with the machine are reported in one line.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import gpus
import locate

ROOT = Path(__file__).resolve().parent.parent
CXX_FOLDERS = ("include", "csrc", "benchmarks", "tests")
PROBE = """#include <Python.h>
#include <optional>
int main() { return std::optional<int>(0).value(); }
"""
# Calls the backend without pip, which would hide the compiler's progress.
BUILD_WHEEL = """import sys
sys.path.insert(0, "tools")
import build_backend
build_backend.build_wheel("dist", {"--global-option": "--quiet"})
"""
# Runs the tests of the integrations with several versions of the packages that they integrate.
VERSIONS = ("tools/versions.py", "--only", "packages", "--end")
# `python -m` cannot run clang_format.
CLANG_FORMAT = "import clang_format; clang_format.clang_format()"


class SetupError(Exception):
    """One line that tells the user what to do."""


def say(text: str) -> None:
    print(f"\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"== {text}", flush=True)


def run(*command: str | Path, what: str) -> None:
    """Runs a command and shows its output."""
    status = subprocess.call([str(c) for c in command], cwd=ROOT)
    if status:
        raise SetupError(f"{what} failed ({status}), see above")


def check_compiler() -> None:
    names = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(names[0]) is None:
        raise SetupError(
            f"no C++ compiler: {names[0]} not found; install one that knows C++17 "
            "(Debian, Ubuntu: apt install g++) or set CXX"
        )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(PROBE)
        python_h = sysconfig.get_path("include")
        command = [*names, "-std=c++17", f"-I{python_h}", "-fsyntax-only", str(source)]
        probe = subprocess.run(command, capture_output=True, text=True)
    if "Python.h" in probe.stderr:
        raise SetupError(
            f"Python.h is not in {python_h}: install the headers of this Python "
            "(Debian, Ubuntu: apt install python3-dev)"
        )
    if probe.returncode:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise SetupError(f"{names[0]} does not compile C++17: {reason}")


def check_archs() -> None:
    try:
        locate.archs()
    except LookupError as error:
        raise SetupError(error) from None


def importable_torch() -> str | None:
    """The version of the torch that this interpreter imports, if new enough."""
    command = [sys.executable, "-c", "import torch; print(torch.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    version = done.stdout.strip()
    return version if done.returncode == 0 and locate.is_supported_torch(version) else None


class Environment:
    """The virtual environment."""

    def __init__(self, path: Path, torch: str) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.torch = torch

    def pip(self, *arguments: str | Path, what: str) -> None:
        run(self.python, "-m", "pip", "install", *arguments, what=what)

    def can_pip(self, *arguments: str) -> subprocess.CompletedProcess:
        command = [
            str(self.python),
            *["-m", "pip", "install", "--quiet", "--retries", "1"],
            *arguments,
        ]
        return subprocess.run(command, capture_output=True, text=True)

    def create(self) -> None:
        """Creates an environment with an up-to-date pip and torch; a complete one is kept."""
        stamp = self.path / "torch-installed"
        if stamp.is_file() and stamp.read_text() == self.torch:
            return
        found = None if self.torch else importable_torch()
        say(f"Creating {self.path.name}" + (f" on top of torch {found}" if found else ""))
        options = ["--clear", *(["--system-site-packages"] if found else [])]
        venv = subprocess.run(
            [sys.executable, "-m", "venv", *options, str(self.path)], capture_output=True, text=True
        )
        if venv.returncode:
            raise SetupError(
                f"{sys.executable} cannot create a virtual environment "
                "(Debian, Ubuntu: apt install python3-venv)"
            )
        if found and sys.prefix != sys.base_prefix:  # system-site-packages sees only the base
            self.site_packages().joinpath("outer.pth").write_text(sysconfig.get_path("purelib"))
        # Reinstall, or pip would accept the installed version without asking the index.
        upgrade = self.can_pip("--upgrade", "--force-reinstall", "pip")
        if upgrade.returncode:
            index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")
            raise SetupError(
                f"cannot reach the package index {index}: check the network, PIP_INDEX_URL and "
                "the proxy settings"
            )
        if not found:
            self.install_torch()
        stamp.write_text(self.torch)

    def site_packages(self) -> Path:
        return next(self.path.glob("lib/python*/site-packages"))

    def install_torch(self) -> None:
        """Installs the requested torch, or the pinned CPU build, never a CUDA build (gigabytes)."""
        wanted = self.torch or f"{locate.PINNED_TORCH}+cpu"
        options = []
        if not self.torch and self.can_pip("--dry-run", "--no-deps", wanted).returncode:
            options = ["--extra-index-url", locate.TORCH_CPU_INDEX]
        say(f"Installing {wanted}")
        self.pip(wanted, *options, what=f"installing {wanted}")

    def install_build_tools(self) -> None:
        text = (ROOT / "pyproject.toml").read_text()
        requires = ast.literal_eval(re.search(r"^requires = (\[.*?\])", text, re.M | re.S)[1])
        self.pip("--quiet", *requires, what="installing the build tools")
        # Outside the environment, where pip would keep reporting missing dependencies.
        folder = self.path / locate.PINNED_CUTLASS
        source = folder / "cutlass_library" / "source"
        if locate.builds_gpu_kernels() and not os.environ.get("CUTLASS_DIR"):
            if not source.is_dir():
                options = ["--quiet", "--no-deps", "--target", folder]
                self.pip(*options, locate.PINNED_CUTLASS, what="installing CUTLASS")
            os.environ["CUTLASS_DIR"] = str(source)

    def build(self, extra: str) -> None:
        """Builds the wheel, with the compiler's progress in view, and installs it."""
        say("Building")
        # Clones share ccache's entries.
        os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
        os.environ.setdefault("CCACHE_NOHASHDIR", "1")
        self.install_build_tools()
        shutil.rmtree(ROOT / "dist", ignore_errors=True)
        run(self.python, "-c", BUILD_WHEEL, what="the build")
        (wheel,) = (ROOT / "dist").glob("*.whl")
        say(f"Installing {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        self.pip("--quiet", "--no-deps", "--force-reinstall", wheel, what="installing the wheel")
        if extra:
            self.pip("--quiet", f"{wheel}[{extra}]", what=f"installing what the {extra} needs")


def builds_docs() -> bool:
    """Whether mkdocs is available for this Python."""
    return sys.version_info >= (3, 11)


def docs_command() -> list[str]:
    """Returns the command that builds the docs site; warnings are errors."""
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # about the future of mkdocs itself
    return ["-m", "mkdocs", "build", "--strict", "--quiet"]


def pytest(*arguments: str) -> list[str]:
    """Runs tests in a process for each core, of one thread, at most eight: each takes 1 GB."""
    workers = min(8, len(os.sched_getaffinity(0)))
    return ["-m", "pytest", "-n", str(workers), "--dist", "worksteal", *arguments]


def checks(python: Path) -> list[str]:
    """Runs every check; returns the names of those that failed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sources = (p for folder in CXX_FOLDERS for p in sorted((ROOT / folder).rglob("*")))
    cxx = [p for p in sources if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    commands = {
        "ruff check": ["-m", "ruff", "check"],
        "ruff format": ["-m", "ruff", "format", "--check"],
        "clang-format": ["-c", CLANG_FORMAT, "--dry-run", "-Werror", *cxx],
        "factories": ["tools/check_factories.py"],
        "mypy": ["-m", "mypy"],
        "pytest": pytest("--durations=25", "-m", "not packaging"),
        "GPU kernels on the emulator": ["tools/emulate.py", "-n", "2"],
        "pytest, packaging": ["-m", "pytest", "-m", "packaging"],
        "lowest versions": [*VERSIONS, "lowest"],
        "newest versions": [*VERSIONS, "newest"],
    }
    if builds_docs():
        commands["docs"] = docs_command()
    # A tensor without a device goes astray by meta, one without a dtype by bfloat16.
    defaults = ("--other-default", "meta", "--other-default", "bfloat16")
    commands["pytest under other defaults"] = pytest(*defaults, "-m", "quick")
    failed = []
    for name, command in commands.items():
        say(name)
        if subprocess.call([str(c) for c in (python, *command)], cwd=ROOT):
            failed.append(name)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("goal", choices=("build", "demo", "docs", "test"))
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--torch", default="", help="a requirement, such as torch==2.12.0")
    options = parser.parse_args()

    if options.goal == "docs" and not builds_docs():
        raise SetupError("the site of the docs is built with Python 3.11 or newer; set PYTHON")
    check_compiler()
    check_archs()
    environment = Environment((ROOT / options.venv).absolute(), options.torch)
    environment.create()
    if options.goal == "demo":
        os.environ["SPARSE_FMHA_ARCHS"], line = gpus.choose(environment.python)
        say(line)
    elif options.goal == "docs":  # pictures are drawn on the CPU
        os.environ["SPARSE_FMHA_ARCHS"] = "none"
    environment.build("" if options.goal == "build" else options.goal)
    if options.goal == "demo":
        say("Running the demo")
        run(environment.python, "-m", "sparse_fmha", "demo", what="the demo")
    elif options.goal == "docs":
        say("Building the site")
        run(environment.python, *docs_command(), what="building the site")
        say(f"{ROOT / 'build' / 'site' / 'index.html'}")
    elif options.goal == "test":
        failed = checks(environment.python)
        if failed:
            raise SetupError(f"failed: {', '.join(failed)}")
        say("All checks passed")


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
