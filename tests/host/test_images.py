"""Which machine code a GPU runs, and what is said of one that runs none of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from host_programs import ROOT, compiled, cuda_headers, lines

from sparse_fmha import _C

NONE = ""
ALL = ["90a", "80", "86"]
PTX = "compute_80"


def why(arch, gpu, driver, images, archs=ALL, toolkit=13000):
    major, minor = map(int, gpu.split("."))
    return _C.why_no_image(arch, "cuda:0 (A GPU)", major, minor, driver, archs, images, toolkit)


@pytest.mark.parametrize(
    ("arch", "gpu", "driver", "images"),
    [
        ("sm90", "9.0", 13000, ["90a"]),
        ("sm90", "9.0", 12000, ["90a", "80", PTX]),
        ("sm80", "8.0", 13000, ["90a", "80", PTX]),
        ("sm80", "8.0", 12000, ["80", PTX]),  # machine code needs no compiler
        ("sm80", "8.7", 12000, ["80", PTX]),
        ("sm86", "8.9", 12000, ["80", PTX]),
        ("sm86", "8.9", 12000, ["86", PTX]),
        ("sm86", "8.9", 13000, ["90a", "100", PTX]),  # PTX
        ("sm80", "9.0", 13000, ["90a", "80", PTX]),  # an override, from PTX
        ("sm80", "9.0", 12000, ["90a", "90", PTX]),
        ("sm80", "10.0", 13010, ["80", PTX]),  # a later driver
        ("sm80", "10.3", 12000, ["100", PTX]),
        ("sm86", "12.1", 12000, ["120", PTX]),
        ("sm80", "11.0", 14000, [PTX]),
    ],
)
def test_what_runs(arch, gpu, driver, images):
    assert why(arch, gpu, driver, images) == NONE


@pytest.mark.parametrize(
    ("arch", "gpu", "driver", "images", "has", "build"),
    [
        ("sm80", "9.0", 12080, ["90a", "80", PTX], "code for 80, PTX of compute_80", "90"),
        ("sm80", "10.0", 12080, ["80", PTX], "code for 80, PTX of compute_80", "100"),
        ("sm86", "8.6", 12080, ["89", PTX], "code for 89, PTX of compute_80", "86"),
        ("sm86", "12.0", 12080, ["90a", "80", PTX], "code for 80, PTX of compute_80", "120"),
        ("sm80", "8.0", 12090, ["86", "100", PTX], "code for 86, code for 100, PTX of", "80"),
        ("sm80", "10.0", 12080, ["103", PTX], "code for 103, PTX of compute_80", "100"),
        ("sm80", "11.0", 12080, ["100", "120", PTX], "code for 100, code for 120, PTX", "110"),
        ("sm80", "8.0", 12090, [PTX], "PTX of compute_80", "80"),
    ],
)
def test_a_driver_that_is_too_old_for_the_ptx(arch, gpu, driver, images, has, build):
    text = why(arch, gpu, driver, images)
    assert text.startswith(f"cuda:0 (A GPU), compute capability {gpu}, needs kernels of {arch}, ")
    known = f"{driver // 1000}.{driver % 1000 // 10}"
    assert f"this build has them as {has}" in text
    assert "code for 90a" not in text, "it is not of this architecture"
    assert f"knows CUDA up to {known}, and compiles no PTX of CUDA 13.0." in text
    assert "Install a driver of CUDA 13.0 or later" in text
    assert text.endswith(f"or build with {build} in SPARSE_FMHA_IMAGES")


@pytest.mark.parametrize(
    ("driver", "toolkit", "runs"),
    [
        (13000, 13010, False),
        (13010, 13010, True),
        (13020, 13010, True),
        (12050, 12060, True),  # one version of PTX
        (12040, 12060, False),
        (12060, 12080, False),
        (12040, 12050, False),
        (0, 12050, False),
    ],
)
def test_which_driver_compiles_the_ptx_of_which_toolkit(driver, toolkit, runs):
    assert (why("sm80", "10.0", driver, ["80", PTX], toolkit=toolkit) == NONE) == runs


@pytest.mark.parametrize(
    ("arch", "gpu", "archs", "images", "is_for", "build"),
    [
        ("sm86", "8.9", ["90a"], ["90a"], "sm90", "86"),  # an L4 and a build for Hopper
        ("sm80", "8.0", ["90a", "86"], ["90a", "80", PTX], "sm90, sm86", "80"),
        ("sm90", "9.0", ["80", "86"], ["80", PTX], "sm80, sm86", "90a"),
        ("sm86", "12.0", [], [], "none", "86"),
    ],
)
def test_a_build_without_the_architecture(arch, gpu, archs, images, is_for, build):
    text = why(arch, gpu, 14000, images, archs)
    assert f"compute capability {gpu}, needs kernels of {arch}, and this build has none" in text
    assert f"it is for {is_for}. Build with {build} in SPARSE_FMHA_ARCHS" in text


def test_no_image_and_no_ptx():
    text = why("sm80", "10.0", 14000, ["90a", "80"])
    assert "has them as code for 80, none of which it runs. Build with 100 in " in text
    assert "driver" not in text
    assert "PTX" not in text


def test_hoppers_own_code_runs_on_nothing_else():
    assert why("sm90", "10.0", 14000, ["90a", "80", PTX])


def test_what_this_build_has():
    build = _C.build_info()
    assert bool(build["images"]) == bool(build["archs"])
    for arch in ("sm90", "sm80", "sm86"):
        for major, minor in _C.gpu_archs()[arch]:
            text = _C.why_no_image(arch, "a GPU", major, minor, 20000)
            has = {"sm90": "90a", "sm80": "80", "sm86": "86"}[arch] in build["archs"]
            assert (text == NONE) == has, text
            assert has or re.search("and this build has none", text)


@pytest.fixture(scope="module")
def say(tmp_path_factory):
    """What a library for Hopper and sm86, by CUDA 13.1, says of a GPU and a driver."""
    sources = ["csrc/core/arch.cpp", "csrc/core/images.cpp", "csrc/cuda/device_arch.cpp"]
    program = compiled(
        tmp_path_factory.mktemp("device_arch") / "say",
        [Path(__file__).with_name("device_arch") / "main.cpp", *(ROOT / of for of in sources)],
        *("-isystem", str(cuda_headers())),
        '-DSPARSE_FMHA_BUILT_ARCHS="90a 86"',
        '-DSPARSE_FMHA_BUILT_IMAGES="90a 120 compute_80"',
        "-DSPARSE_FMHA_BUILT_TOOLKIT=13010",
    )

    def of(gpu, driver, *more):
        return "\n".join(lines(program, *gpu.split("."), str(driver), *more))

    return of


@pytest.mark.parametrize(
    ("gpu", "driver", "more", "said"),
    [
        ("9.0", 13000, (), "^sm90$"),
        ("9.0", 13010, ("override", "sm86"), "^sm86$"),
        ("8.9", 13010, (), r"^raised .*sm86 were compiled for .*8\.9, but never run"),
        ("12.0", 13000, (), r"^raised .*sm86 were compiled for .*12\.0, but never run"),
        # What does not run is said before what was not tested.
        (
            "8.9",
            13000,
            (),
            r"cuda:0 \(NVIDIA Fake\), compute capability 8\.9, .* no PTX of CUDA 13",
        ),
        ("8.0", 13010, (), "needs kernels of sm80, and this build has none: it is for sm90, sm86"),
        (
            "9.0",
            13000,
            ("override", "sm86"),
            r"code for 120, PTX of compute_80, none .* with 90 in",
        ),
        ("9.0", 13010, ("override", "sm80"), "needs kernels of sm80, and this build has none"),
        ("8.9", 13010, ("override", "sm90"), "8.9 does not run these kernels"),
        ("7.5", 13010, (), "capability 7.5 is not supported"),
        ("9.0", 12040, ("count", "35"), "cudaGetDeviceCount: what CUDA says\nThis build has code "),
        ("9.0", 0, ("count", "35"), "made by CUDA 13.1; no driver is found"),
        (
            "8.9",
            13000,
            ("error", "209"),
            r"launching: what CUDA says\ncuda:0 \(NVIDIA Fake\), .* 8\.9",
        ),
        (
            "8.9",
            13000,
            ("error", "222"),
            "made by CUDA 13.1; the driver knows CUDA up to 13.0. Inst",
        ),
        ("8.9", 13000, ("error", "98"), "code for 90a, code for 120, PTX of compute_80, made by"),
        ("8.9", 13000, ("error", "1"), "^raised sparse_fmha: launching: what CUDA says$"),
    ],
)
def test_what_a_call_says(say, gpu, driver, more, said):
    assert re.search(said, say(gpu, driver, *more))
