"""The gate that keeps kernels with spills or serialised WGMMA out of the library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from commands import TOOLS

import locate
import ptxas

GOOD = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90a'
ptxas info    : Function properties for _Z6kernelv
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 9 barriers, 8 bytes cumulative stack size, 1024 bytes smem
"""
SPILL = GOOD.replace("0 bytes spill stores, 0 bytes", "24 bytes spill stores, 32 bytes")
SERIALISED = GOOD + (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to function call in the function '_Z6kernelv'\n"
)
FIGURES = {  # of GOOD
    "entries": 1,
    "registers": 168,
    "stack_bytes": 8,
    "spill_store_bytes": 0,
    "spill_load_bytes": 0,
    "static_smem_bytes": 1024,
}
# A stand-in for nvcc: prints a log to stderr, writes the object, exits as told.
COMPILER = """import sys
log, status, _, obj = sys.argv[1:]
sys.stderr.write(open(log).read())
open(obj, "w").write("object")
sys.exit(int(status))
"""
SPILLING_KERNEL = """__global__ void kernel(float* x, int n) {
  float a[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) a[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * n + threadIdx.x] = a[i] * a[63 - i];
}
"""


@pytest.fixture
def compile_log(tmp_path):
    """Returns a function that runs the gate on a compiler with this log; status, object, output."""

    def run(log: str, status: int = 0):
        script, log_file, obj = (tmp_path / n for n in ("nvcc.py", "log", "kernel.cu.o"))
        script.write_text(COMPILER)
        log_file.write_text(log)
        command = [sys.executable, script, log_file, str(status), "-o", obj]
        gate = [sys.executable, TOOLS / "ptxas.py", "compile", *command]
        done = subprocess.run([str(c) for c in gate], capture_output=True, text=True)
        return done.returncode, obj, done.stderr

    return run


def test_figures_are_kept(compile_log):
    status, obj, output = compile_log(GOOD)
    assert status == 0
    assert output == ""
    assert json.loads(ptxas.report_path(str(obj)).read_text()) == {"kernel": FIGURES}


def test_figures_are_those_of_each_row():
    name = "_ZN11sparse_fmha4sm906kernelINS0_12KernelConfigINS_5DenseEN7cutlass{}ELi{}ELi192ELi80"
    first, second = (
        GOOD.replace("_Z6kernelv", name.format(*of))
        for of in (("6half_t", 64), ("10bfloat16_t", 128))
    )
    lean = second.replace("168 registers", "90 registers")
    assert ptxas.parse(GOOD + first + lean, "sm90_dense") == {
        "sm90_dense": FIGURES,
        "sm90_dense_float16_d64": FIGURES,
        "sm90_dense_bfloat16_d128": FIGURES | {"registers": 90},
    }
    spill = second.replace("0 bytes spill stores, 0 bytes", "24 bytes spill stores, 32 bytes")
    (fault,) = ptxas.faults(first + spill, ptxas.parse(first + spill, "sm90_dense"))
    assert fault.startswith("register spills in sm90_dense_bfloat16_d128: 24 bytes stored")


def test_rows_that_share_a_kernel_have_its_figures():
    name = "_ZN4sm806kernelINS0_12DecodeConfigINS_5DenseEN7cutlass6half_tELi64ELi64EEEvv"
    found = ptxas.parse(GOOD.replace("_Z6kernelv", name), "sm80_decode_dense")
    rows = ("sm80_decode_dense_float16_d64", "sm86_decode_dense_float16_d64")
    assert found == dict.fromkeys(rows, FIGURES)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (SPILL, "register spills in kernel: 24 bytes stored, 32 bytes loaded"),
        (SERIALISED, "(C7510)"),
        ("", "ptxas printed no figures"),
    ],
)
def test_a_fault_fails_the_compile_and_leaves_nothing(compile_log, log, reason):
    assert compile_log(GOOD)[0] == 0
    status, obj, output = compile_log(log)
    assert status != 0
    assert reason in output
    assert not obj.exists()
    assert not ptxas.report_path(str(obj)).exists()


def test_a_failed_compile_leaves_no_report(compile_log):
    assert compile_log(GOOD)[0] == 0
    status, obj, _ = compile_log(GOOD, status=2)
    assert status == 2
    assert not ptxas.report_path(str(obj)).exists()


def test_an_object_without_report_is_not_collected(tmp_path, capsys):
    basics = tmp_path / "basics.json"
    basics.write_text(json.dumps({"cpu_isas": "baseline;avx2"}))
    obj = tmp_path / "kernel.cu.o"
    assert ptxas.collect(str(basics), str(tmp_path / "out"), [str(obj)]) != 0
    assert "was not checked" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not locate.builds_gpu_kernels(), reason="needs nvcc")
def test_a_real_spill_is_seen(tmp_path):
    source, obj = tmp_path / "kernel.cu", tmp_path / "kernel.cu.o"
    source.write_text(SPILLING_KERNEL)
    nvcc = [locate.nvcc(), "-arch=sm_90a", "-Xptxas", "-v", "-c", source, "-o", obj]
    gate = [sys.executable, TOOLS / "ptxas.py", "compile", *nvcc]
    assert subprocess.call([str(c) for c in gate]) == 0
    assert ptxas.report_path(str(obj)).exists()

    gate.append("-maxrregcount=24")
    done = subprocess.run([str(c) for c in gate], capture_output=True, text=True)
    assert done.returncode != 0
    assert "register spills" in done.stderr
    assert not obj.exists()
