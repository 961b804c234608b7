"""Products in the tile registers of AMX; see tests/host/amx."""

import pytest
from host_programs import ROOT, compiled, lines

_C = pytest.importorskip("sparse_fmha._C")
SOURCES = [ROOT / "tests/host/amx/products.cpp", ROOT / "csrc/core/cpu_isa.cpp"]
FLAGS = [
    *("-O2", "-mfma", "-mf16c"),
    *(f"-mavx512{of}" for of in ("f", "bw", "dq", "vl", "bf16")),
]
# Sums of up to 256 numbers in fp32, relative to their magnitudes.
MOST = 4 * 2**-24


def found(folder, registers, *flags):
    program = compiled(
        folder / registers,
        SOURCES,
        *FLAGS,
        "-DSPARSE_FMHA_ISA=avx512_amx",
        f"-DSPARSE_FMHA_TILE_REGISTERS={registers}",
        *flags,
    )
    return lines(program)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    if "avx512_bf16" not in _C.cpu_isas():
        pytest.skip("this CPU has no avx512_bf16, which packs the operands")
    folder = tmp_path_factory.mktemp("amx")
    return found(folder, "EmulatedRegisters", "-DSPARSE_FMHA_EMULATED_TILES")


def test_products_of_all_sizes(emulated):
    """In memory that is NaN where nothing was loaded."""
    assert len(emulated) == 8 * 5 * 5
    for line in emulated:
        size, scores, outputs, _ = line.split()
        assert float(scores) < MOST, size
        assert float(outputs) < MOST, size


def test_the_processor_finds_the_same_bits(emulated, tmp_path):
    if "avx512_amx" not in _C.cpu_isas():
        pytest.skip("this CPU has no AMX")
    assert found(tmp_path, "AmxRegisters", "-DSPARSE_FMHA_HAS_AMX", "-mamx-tile") == emulated
