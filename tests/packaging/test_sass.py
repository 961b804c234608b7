"""The gate that keeps kernels without their matrix instructions out of the library."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from commands import ROOT, TOOLS, check_output

import cubin
import locate
import sass

needs_nvcc = pytest.mark.skipif(not locate.builds_gpu_kernels(), reason="needs nvcc")
IMAGES = ("80", "86", "87", "89", "90", "100", "103", "110", "120", "121")  # of docs/gpus.md
# In the library's namespaces, as the names of kernels say what they must have.
MMA = """#include <cstdint>
namespace sparse_fmha { namespace sm80 {
__global__ void attention_kernel(uint32_t const* a, float* c, int n) {
  float d[4] = {};
  for (int i = 0; i < n; ++i) {
    PRODUCT
    c[4 * i] = d[0] + d[1];
    c[4 * i + 1] = d[2] + d[3];
  }
}
}}
"""
MMA_SYNC = """asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[i]), "r"(a[i + 1]), "r"(a[i + 2]), "r"(a[i + 3]), "r"(a[i + 4]), "r"(a[i + 5]));"""
WGMMA = """asm volatile("{.reg .pred p; setp.ne.b32 p, 1, 0;\\n"
      "wgmma.fence.sync.aligned;\\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %4, p, 1, 1, 0, 0;\\n"
      "wgmma.commit_group.sync.aligned;\\nwgmma.wait_group.sync.aligned 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(uint64_t{a[i]}));"""
FMAS = "for (int j = 0; j < 4; ++j) d[j] += a[i + j] * a[i + 4 * j + 1];"
SPILLS = """__global__ void copy(float* x, int n) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = a[i] * a[63 - i];
}
"""
EMPTY = """namespace sparse_fmha { namespace sm80 {
__global__ void attention_kernel(float* c) {
#if __CUDA_ARCH__ >= 1030
  c[threadIdx.x] = 1;
#endif
}
}}
"""
OF_80 = ("-gencode", "arch=compute_80,code=[compute_80,sm_80]")
OF_90A = ("-gencode", "arch=compute_90a,code=sm_90a")


@pytest.fixture
def build(tmp_path):
    """Returns a function that compiles a source through the gate; status, object, stderr."""

    def run(source, *flags):
        file, obj = tmp_path / "kernel.cu", tmp_path / "kernel.cu.o"
        file.write_text(source)
        nvcc = [locate.nvcc(), *flags, "-c", file, "-o", obj]
        gate = [sys.executable, TOOLS / "sass.py", "compile", *nvcc]
        done = subprocess.run([str(c) for c in gate], capture_output=True, text=True)
        return done.returncode, obj, done.stderr

    return run


@needs_nvcc
@pytest.mark.parametrize("mode", ["size", "speed", "balance", "none"])
def test_a_kernel_of_mma_sync_is_good_however_it_is_packed(build, mode):
    source = MMA.replace("PRODUCT", MMA_SYNC)
    status, obj, errors = build(source, *OF_80, f"--compress-mode={mode}")
    assert (status, errors) == (0, "")
    kernels = list(sass.kernels(obj))
    assert sorted(kernel.image for kernel in kernels) == ["compute_80", "sm_80"]
    assert all("attention_kernel" in kernel.name for kernel in kernels)


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "flags", "reasons"),
    [
        (MMA.replace("PRODUCT", FMAS), OF_80, ["sm_80: ", "has no HMMA", "has no mma.sync"]),
        (SPILLS, (*OF_80, "-maxrregcount=24"), ["uses local memory: ", " STL, ", " LDL"]),
        (EMPTY, OF_80, ["sm_80: ", "does nothing", "compute_80: "]),
        (
            MMA.replace("PRODUCT", MMA_SYNC).replace("sm80", "sm90"),
            OF_90A,
            ["sm_90: ", "has no HGMMA"],
        ),
        ("int nothing;\n", OF_80, ["has no kernels"]),
    ],
    ids=["no products", "local memory", "empty", "mma.sync on Hopper", "no kernel"],
)
def test_a_fault_fails_the_compile_and_leaves_nothing(build, source, flags, reasons):
    status, obj, errors = build(source, *flags)
    assert status != 0
    assert not obj.exists()
    for reason in reasons:
        assert reason in errors


@needs_nvcc
def test_a_kernel_of_wgmma_is_good(build):
    source = MMA.replace("PRODUCT", WGMMA).replace("sm80", "sm90")
    assert build(source, *OF_90A)[::2] == (0, "")


@needs_nvcc
def test_a_failed_compile_keeps_its_status(build):
    status, obj, errors = build("#error no\n", *OF_80)
    assert status != 0
    assert not obj.exists()
    assert "error" in errors


@needs_nvcc
def test_code_for_every_gpu_from_one_ptx(build):
    """Each GPU of the table that runs the family, as far as this nvcc knows it."""
    known = check_output(locate.nvcc(), "--list-gpu-code").split()
    wanted = [image for image in IMAGES if f"sm_{image}" in known]
    assert {"80", "86", "87", "89", "90"} <= set(wanted)
    codes = ",".join(f"sm_{image}" for image in wanted)
    flags = "-gencode", f"arch=compute_80,code=[{codes}]"
    status, obj, errors = build(MMA.replace("PRODUCT", MMA_SYNC), *flags)
    assert (status, errors) == (0, "")
    counts = {}
    for image in cubin.images(obj):
        ((_, code),) = cubin.functions(image.content)
        counts[str(image.capability)] = sum(sass.census(code)[op] for op in sass.HMMA)
    assert set(counts) == set(wanted)
    assert min(counts.values()) >= 1


@needs_nvcc
def test_the_library_is_good(libraries):
    """All images of the built wheel."""
    library = libraries["libsparse_fmha"]
    found = Counter(kernel.image for kernel in sass.kernels(library))
    assert set(found) == {"sm_90", "sm_80", "compute_80"}
    assert found["sm_80"] == found["compute_80"] > 100
    assert sass.faults(library) == []


@needs_nvcc
def test_the_build_compiles_kernels_through_the_gate(tmp_path):
    """All of them: without it an object of no use would be kept."""
    cmake = Path(sys.executable).with_name("cmake")
    configure = [cmake if cmake.exists() else "cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja"]
    options = ["-DSPARSE_FMHA_ARCHS=80;90a", "-DSPARSE_FMHA_ROWS=^sm(80|90)_dense_float16_d64$"]
    check_output(*configure, *options, f"-DPython_EXECUTABLE={sys.executable}")
    text = (tmp_path / "build.ninja").read_text()
    objects = re.findall(r"^build \S+\.cu\.o: ", text, re.M)
    assert len(objects) > 2
    assert text.count(f"{TOOLS / 'sass.py'} compile ") == len(objects)


def instruction(op: int, predicate: int = 7) -> bytes:
    return bytes([op & 0xFF, op >> 8 | predicate << 4]) + bytes(14)


def code(*ops: int) -> bytes:
    return b"".join(map(instruction, ops))


NAME = "_ZN11sparse_fmha4sm8016attention_kernelIiEEvv"
WORK = code(*[0x221] * 30)  # FFMA


def test_the_predicate_is_no_part_of_an_instruction():
    found = sass.census(instruction(0x23C) + instruction(0x23C, predicate=9))
    assert found == {0x23C: 2}


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        (NAME, code(0x23C), []),
        (NAME, b"", ["has no HMMA"]),
        (NAME.replace("sm80", "sm90"), code(0x23C), ["has no HGMMA"]),
        (NAME.replace("sm80", "sm90"), code(0xDF0), []),
        (NAME, code(0x23C, 0x387, 0x983, 0x983), ["uses local memory: 1 STL, 2 LDL"]),
        ("_ZN11sparse_fmha6device11round_sumsEv", b"", []),
        ("_ZN11sparse_fmha6device11search_keysI6__halfLi64EEEvv", b"", ["has no HMMA"]),
        ("_ZN11sparse_fmha6device11search_keysIfLi64EEEvv", b"", []),
        ("_ZN11sparse_fmha6device11keep_blocksEv", code(0x387), []),
        ("_ZN11sparse_fmha4sm9022few_rows_decode_kernelEv", code(0x23C), []),
    ],
)
def test_what_a_kernel_must_have(name, more, expected):
    assert sass.code_faults(name, WORK + more) == expected


def test_padding_is_no_work():
    assert sass.code_faults(NAME, code(0x23C, *[0x918] * 100, 0x947, 0x94D)) == [
        "does nothing: 1 instructions"
    ]


@pytest.mark.parametrize(
    ("packed", "whole"),
    [
        (b"\x50hello", b"hello"),
        (b"\x17a\x01\x00\x00", b"a" * 12),  # a match that reaches into itself
        (b"\x20ab\x02\x00\x10c", b"ab" * 3 + b"c"),
        (b"\xf0\x05" + bytes(range(20)), bytes(range(20))),
    ],
)
def test_lz4(packed, whole):
    assert cubin.unpack_lz4(packed) == whole


def test_what_is_no_object_has_no_code(tmp_path):
    file = tmp_path / "file.o"
    file.write_bytes(b"text, and by chance \x50\xed\x55\xba\x01\x00\x02\x00 in it")
    assert sass.faults(file) == ["there is no GPU code"]
