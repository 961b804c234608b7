"""Which machine code a GPU runs, and what is said of one that runs none of it."""

from __future__ import annotations

import re

import pytest

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
