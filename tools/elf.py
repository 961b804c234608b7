"""Checks what the shared libraries of a wheel require of a machine.

Like auditwheel and abi3audit, but with this project's allow-lists: its libraries are linked to
torch's, which auditwheel would copy into the wheel. Needs readelf and nm from binutils.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# System libraries. libtorch_cpu and libc10 are in every torch, CPU or CUDA.
SYSTEM = {
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libm.so.6",
    "libc.so.6",
    "libpthread.so.0",
    "libdl.so.2",
    "librt.so.1",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
LIBRARIES = {
    "libsparse_fmha": SYSTEM | {"libtorch_cpu.so", "libc10.so"},
    "_C": SYSTEM | {"libsparse_fmha.so"},
}
# The newest symbol versions that manylinux_2_28 allows.
MANYLINUX_2_28 = {
    "GLIBC": (2, 28),
    "GLIBCXX": (3, 4, 24),
    "CXXABI": (1, 3, 11),
    "GCC": (7, 0, 0),
}
# Unversioned symbols that the libraries may use: torch's stable C interface, this project's own,
# weak symbols of the C++ runtime, and Python's in `_C`.
UNVERSIONED = {
    "libsparse_fmha": r"aoti_torch_\w+|torch_\w+|_ITM_\w+|__gmon_start__",
    "_C": r"_?Py\w+|_ZN\w*11sparse_fmha\w+|_ITM_\w+|__gmon_start__",
}


def kind(library: Path) -> str:
    """The library's name up to the first dot: a key of LIBRARIES."""
    return library.name.split(".")[0]


def output(*command: str | Path) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout


def needed(library: Path) -> set[str]:
    """The libraries that a library is linked to."""
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-dW", library)))


def run_paths(library: Path) -> list[str]:
    return re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", output("readelf", "-dW", library))


def symbols(library: Path, which: str) -> list[str]:
    """Names of dynamic symbols with their versions; `which` is an option of nm."""
    lines = output("nm", "-D", which, library).splitlines()
    return [re.sub(r"^[0-9a-f ]*[A-Za-z] ", "", line) for line in lines]


def newest_versions(library: Path) -> dict[str, tuple[int, ...]]:
    """The newest symbol version required, by version name such as GLIBC."""
    found: dict[str, tuple[int, ...]] = {}
    for name, text in re.findall(r"Name: ([A-Z]+)_([\d.]+)", output("readelf", "-VW", library)):
        version = tuple(map(int, text.split(".")))
        found[name] = max(version, found.get(name, ()))
    return found


def problems(library: Path, limits: dict[str, tuple[int, ...]] = MANYLINUX_2_28) -> list[str]:
    """Reasons why a library may not load on another machine, one line each; empty if none."""
    found = []
    allowed = LIBRARIES[kind(library)]
    extra = needed(library) - allowed
    if extra:
        found.append(f"is linked to {', '.join(sorted(extra))}")
    if not needed(library) & (allowed - SYSTEM):
        found.append("is linked to neither torch nor the op library")
    own = ["$ORIGIN"] if kind(library) == "_C" else []
    if run_paths(library) != own:
        found.append(f"has the run path {run_paths(library)}; {own} is needed")
    for name, version in newest_versions(library).items():
        if version > limits.get(name, ()):
            most = ".".join(map(str, limits.get(name, ()))) or "none"
            shown = ".".join(map(str, version))
            whose = _whose(library, name, shown)
            found.append(f"asks for {name} {shown}; at most {most} is allowed: {whose}")
    strange = [
        symbol
        for symbol in symbols(library, "--undefined-only")
        if "@" not in symbol and not re.fullmatch(UNVERSIONED[kind(library)], symbol)
    ]
    if strange:
        found.append(f"takes symbols of unknown origin: {', '.join(strange[:5])}")
    return found


def _whose(library: Path, name: str, version: str) -> str:
    end = f"@{name}_{version}"
    taken = [s for s in symbols(library, "--undefined-only") if s.endswith(end)]
    return ", ".join(symbol.removesuffix(end) for symbol in taken[:5])
