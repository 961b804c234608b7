"""Builds the wheel of a release, checks it and uses it in each Python, as `make release`.

    python tools/release.py                                  # all Pythons, all GPUs: half an hour
    SPARSE_FMHA_ARCHS=none python tools/release.py           # without GPU kernels
    python tools/release.py --torch torch==2.10.0            # use it with this torch

The wheel is tagged py3-none-manylinux_2_28: it has a `_C` for each Python, and one op library for
all. It is written to `--out` only if

- it has these files, under the version of pyproject.toml and of CHANGELOG.md;
- its libraries link to and use symbols of only what tools/elf.py allows;
- in a fresh environment of each Python, without a compiler on PATH, it computes the same attention
  as torch. Each environment downloads torch, possibly gigabytes, and is removed afterwards.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import bootstrap
import elf
import pythons

ROOT = Path(__file__).resolve().parent.parent
LARGEST_MB = 30  # of a wheel with the kernels of all architectures
BUILD = """import sys
sys.path.insert(0, "tools")
import build_backend
build_backend.build_wheel(sys.argv[1], {"--global-option": "--quiet"})
"""
SMOKE = """
import sys, torch, sparse_fmha
from torch.nn.functional import scaled_dot_product_attention as sdpa
assert sparse_fmha.__file__.startswith(sys.prefix), sparse_fmha.__file__
assert sparse_fmha.__version__ == sparse_fmha.build_info()["version"] == sys.argv[1]
torch.manual_seed(0)
q, k, v = (torch.randn(2, 150, 4, 40) for _ in range(3))

def check(out, visible):
    heads = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(out, sdpa(*heads, attn_mask=visible).transpose(1, 2))

check(sparse_fmha.attention(q, k, v), None)
window = sparse_fmha.reference.neighborhood_mask(150, 9)
check(sparse_fmha.neighborhood_attention(q, k, v, 9), window)
mask = sparse_fmha.BlockMask.from_dense(torch.rand(150, 150) < 0.5)
check(sparse_fmha.block_sparse_attention(q, k, v, mask), mask.to_dense())
assert sparse_fmha.simulate(4096, 512).predicted_ms > 0
assert any(row["arch"] == "cpu" for row in sparse_fmha.kernels())
try:
    sparse_fmha.attention(q[..., :4], k[..., :4], v[..., :4])
except ValueError as error:  # through the op, with a number in its text
    assert str(error).startswith("head dim of q") and "got 4" in str(error), error
else:
    raise AssertionError("a head dim of 4 was taken")
print(torch.__version__)
"""


class ReleaseError(Exception):
    """One line that says what is wrong with the wheel or the machine."""


def find_pythons(versions: list[str]) -> dict[str, str]:
    found = {}
    for version in versions:
        try:
            program = pythons.interpreter(version)
        except LookupError as error:
            raise ReleaseError(f"{error}; install it, or name those there are: --pythons") from None
        include = output(program, "-c", "import sysconfig as s; print(s.get_path('include'))")
        if not Path(include.strip(), "Python.h").is_file():
            raise ReleaseError(f"{program} has no Python.h in {include.strip()}")
        found[version] = program
    return found


def output(*command: str | Path, env: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        print(*done.stdout.splitlines()[-40:], sep="\n", file=sys.stderr)
        raise ReleaseError(f"failed ({done.returncode}): {' '.join(map(str, command))[:200]}")
    return done.stdout


def version_of_release() -> str:
    """The version of pyproject.toml; CHANGELOG.md must have it, too."""
    version = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    changes = (ROOT / "CHANGELOG.md").read_text()
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changes, re.M):
        raise ReleaseError(f"CHANGELOG.md has no dated section for {version}")
    return version


def build(environment: bootstrap.Environment, found: dict[str, str], folder: Path) -> Path:
    os.environ["SPARSE_FMHA_RELEASE"] = os.pathsep.join(found.values())
    os.environ.setdefault("CCACHE_BASEDIR", str(ROOT))
    os.environ.setdefault("CCACHE_NOHASHDIR", "1")
    bootstrap.run(environment.python, "-c", BUILD, folder, what="the build")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check(wheel: Path, version: str, found: dict[str, str], folder: Path) -> None:
    """Raises if the wheel lacks a file, is too large or requires too much of a machine."""
    machine = os.uname().machine
    name = f"sparse_fmha-{version}-py3-none-manylinux_2_28_{machine}.whl"
    if wheel.name != name:
        raise ReleaseError(f"the wheel is {wheel.name}; {name} is needed")
    size = wheel.stat().st_size / 1e6
    if size > LARGEST_MB:
        raise ReleaseError(f"the wheel has {size:.1f} MB; at most {LARGEST_MB} are wanted")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    package = folder / "sparse_fmha"
    libraries = sorted(package.rglob("*.so"))
    wanted = {f"_C.cpython-{v.replace('.', '')}-{machine}-linux-gnu.so" for v in found}
    wanted.add("libsparse_fmha.so")
    if {path.name for path in libraries} != wanted:
        raise ReleaseError(f"the wheel has {[path.name for path in libraries]}; not {wanted}")
    for file in ("py.typed", "_C.pyi", "__init__.py"):
        if not (package / file).is_file():
            raise ReleaseError(f"the wheel has no sparse_fmha/{file}")
    problems = [f"{path.name} {text}" for path in libraries for text in elf.problems(path)]
    if problems:
        raise ReleaseError("; ".join(problems))
    for path in libraries:
        newest = (f"{k} {'.'.join(map(str, v))}" for k, v in elf.newest_versions(path).items())
        print(f"{path.name}: {', '.join(newest)}")


def use(wheel: Path, version: str, program: str, torch: str, folder: Path) -> str:
    """Installs the wheel into a new environment and runs it; returns torch's version."""
    output(program, "-m", "venv", folder)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    output(*install, "--upgrade", "pip")
    output(*install, torch, wheel)
    # Only the programs of the environment: no compiler, no tools.
    env = {"PATH": str(folder / "bin"), "HOME": str(folder)}
    found = output(python, "-I", "-c", SMOKE, version, env=env, cwd=folder)
    shown = output(folder / "bin" / "sparse-fmha", "--version", env=env, cwd=folder)
    if shown != f"sparse-fmha {version}\n":
        raise ReleaseError(f"sparse-fmha --version says {shown.strip()}")
    return found.split()[-1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("build/wheels"), help="where the wheel goes"
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="what builds it")
    parser.add_argument("--torch", default="torch", help="what it is used with: a requirement")
    parser.add_argument(
        "--pythons", nargs="+", default=list(pythons.SUPPORTED), metavar="3.X", help="default: all"
    )
    options = parser.parse_args(argv)
    version = version_of_release()
    found = find_pythons(options.pythons)
    bootstrap.check_compiler()
    bootstrap.check_archs()
    environment = bootstrap.Environment((ROOT / options.venv).absolute(), "")
    environment.create()
    environment.install_build_tools()
    with tempfile.TemporaryDirectory(prefix="release-") as temporary:
        work = Path(temporary)
        bootstrap.say(f"Building {version} for Python {', '.join(found)}")
        wheel = build(environment, found, work)
        bootstrap.say(f"Checking {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
        check(wheel, version, found, work / "unpacked")
        for number, program in found.items():
            bootstrap.say(f"Using it in Python {number}")
            torch = use(wheel, version, program, options.torch, work / "venv")
            shutil.rmtree(work / "venv")
            print(f"Python {number}, torch {torch}: passed")
        out = ROOT / options.out
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy2(wheel, out)
        bootstrap.say(f"{out / wheel.name}")


if __name__ == "__main__":
    try:
        main()
    except (ReleaseError, bootstrap.SetupError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
