"""What the libraries ask of a machine: nothing that a CPU-only torch lacks."""

from __future__ import annotations

import re

import pytest
from commands import check_output

# libstdc++ and the C library are those of the machine; libtorch_cpu and libc10 are in every torch.
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
ALLOWED = {
    "libsparse_fmha": SYSTEM | {"libtorch_cpu.so", "libc10.so"},
    "_C": SYSTEM | {"libsparse_fmha.so"},
}


def dynamic(library) -> str:
    return check_output("readelf", "-dW", library)


def symbols(library, which: str) -> list[str]:
    lines = check_output("nm", "-DC", which, library).splitlines()
    return [re.sub(r"^[0-9a-f ]*[A-Za-z] ", "", line) for line in lines]


@pytest.mark.parametrize("name", ALLOWED)
def test_needed_libraries_are_on_the_allow_list(libraries, name):
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic(libraries[name])))
    assert needed - ALLOWED[name] == set()
    assert needed & (ALLOWED[name] - SYSTEM), "neither torch nor the op library is linked"


@pytest.mark.parametrize("name", ALLOWED)
def test_the_cxx_runtime_is_the_shared_one(libraries, name):
    """Two copies of libstdc++ in a process crash in the first number written to a stream."""
    assert "[libstdc++.so.6]" in dynamic(libraries[name])
    assert [
        s for s in symbols(libraries[name], "--defined-only") if s.startswith("std::num_put")
    ] == []


@pytest.mark.parametrize("name", ALLOWED)
def test_no_path_of_the_build_machine(libraries, name):
    run_paths = re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", dynamic(libraries[name]))
    assert run_paths == ([] if name == "libsparse_fmha" else ["$ORIGIN"])


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
    assert [s for s in exported if re.search(r"\bcuda|cutlass|sm90::|::cpu::", s)] == []
