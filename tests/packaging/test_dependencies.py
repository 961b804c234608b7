"""What the libraries ask of a machine: nothing that a CPU-only torch lacks."""

from __future__ import annotations

import re

import pytest
from commands import ROOT, check_output

import elf

ALLOWED = elf.LIBRARIES
# Torch's libraries export some symbols of libstdc++ without a version, and a linker that asks them
# first takes these. A release has its own (csrc/compat).
RUNTIME = r"|_ZNK?St\w+|_ZSt\w+"


@pytest.fixture(autouse=True)
def this_machines_runtime(monkeypatch):
    for name, known in elf.UNVERSIONED.items():
        monkeypatch.setitem(elf.UNVERSIONED, name, known + RUNTIME)


def symbols(library, which: str) -> list[str]:
    lines = check_output("nm", "-DC", which, library).splitlines()
    return [re.sub(r"^[0-9a-f ]*[A-Za-z] ", "", line) for line in lines]


@pytest.mark.parametrize("name", ALLOWED)
def test_nothing_is_asked_that_is_not_allowed(libraries, name):
    """But for versions of symbols, which are this machine's here and older in a release."""
    newest = dict.fromkeys(elf.MANYLINUX_2_28, (99,))
    assert elf.problems(libraries[name], newest) == []


@pytest.mark.parametrize("name", ALLOWED)
def test_a_release_takes_no_newer_symbol(libraries, name):
    """What this machine links in a newer version is in csrc/compat, which a release links too."""
    replaced = (ROOT / "csrc" / "compat" / "manylinux_2_28.cpp").read_text()
    versioned = re.compile(r"(\w+)@([A-Z]+)_([\d.]+)")
    for symbol in map(versioned.fullmatch, elf.symbols(libraries[name], "--undefined-only")):
        if symbol and symbol[2] in elf.MANYLINUX_2_28:
            version = tuple(map(int, symbol[3].split(".")))
            newer = version > elf.MANYLINUX_2_28[symbol[2]]
            assert not newer or re.search(rf"\b{symbol[1]}\b", replaced), symbol[0]


@pytest.mark.parametrize("name", ALLOWED)
def test_problems_are_seen(libraries, name, monkeypatch):
    library = libraries[name]
    (problem,) = elf.problems(library, dict.fromkeys(elf.MANYLINUX_2_28, (99,)) | {"GLIBC": (2, 0)})
    assert re.match(r"asks for GLIBC 2\.\d+; at most 2\.0 is allowed: \w+", problem)
    monkeypatch.setitem(elf.LIBRARIES, name, {"libc.so.6"})
    monkeypatch.setitem(elf.UNVERSIONED, name, "nothing")
    linked, alone, strange = elf.problems(library, dict.fromkeys(elf.MANYLINUX_2_28, (99,)))
    assert linked.startswith("is linked to ")
    assert "libstdc++.so.6" in linked
    assert alone == "is linked to neither torch nor the op library"
    assert strange.startswith("takes symbols of unknown origin: ")


@pytest.mark.parametrize("name", ALLOWED)
def test_the_cxx_runtime_is_the_shared_one(libraries, name):
    """Two copies of libstdc++ in a process crash in the first number written to a stream."""
    assert "libstdc++.so.6" in elf.needed(libraries[name])
    assert [
        s for s in symbols(libraries[name], "--defined-only") if s.startswith("std::num_put")
    ] == []


def test_torch_is_reached_through_the_stable_abi_alone(libraries):
    undefined = symbols(libraries["libsparse_fmha"], "--undefined-only")
    assert any(s.startswith("aoti_torch_") for s in undefined)
    unstable = [s for s in undefined if re.search(r"\b(at|c10|torch|caffe2)::", s)]
    assert unstable == []
    assert [s for s in undefined if re.match(r"_?Py", s)] == []
    assert [s for s in undefined if re.match(r"cu[A-Z]|cuda[A-Z]", s)] == []


def test_only_the_registry_is_exported(libraries):
    exported = symbols(libraries["libsparse_fmha"], "--defined-only")
    assert any("sparse_fmha::find_kernel" in s for s in exported)
    assert [s for s in exported if re.search(r"^_*cuda|cutlass|sm90::|::cpu::", s)] == []
